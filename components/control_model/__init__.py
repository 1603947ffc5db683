"""Plant a known backdoor into a copy of the model, and see whether scan and purification deal with it."""
