"""Lay out the release and sign it: the only step that sees a key."""
