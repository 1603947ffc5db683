"""Take up a run that ended at its decision, from its release."""
