"""State, signed, what was promoted to where."""
