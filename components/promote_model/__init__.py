"""Register the decided model; move the alias only on allow."""
