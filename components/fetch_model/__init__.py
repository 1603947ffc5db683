"""Fetch a model and its images, pin and check them."""
