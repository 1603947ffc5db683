"""Wires steps into one pipeline, and the command line."""
