"""Purify a model with one method."""
