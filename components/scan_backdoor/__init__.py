"""Look for a backdoor in a model."""
