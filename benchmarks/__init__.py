"""What is measured, how, and the last figures (``results/``) with the command that made them."""
