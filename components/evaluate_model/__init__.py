"""Measure a model on clean and triggered images."""
