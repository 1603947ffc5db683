"""Decide by policy and evidence whether a model may be promoted."""
