"""Lay out the release and sign it: it sees the key, and no registry."""
