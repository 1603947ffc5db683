"""Choose the best purified candidate by a declared rule."""
