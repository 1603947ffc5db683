"""Collect every record of a run into one report, whatever failed."""
