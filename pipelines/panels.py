"""Headings under which ``quarantine --help`` lists the commands."""

WHOLE = "The whole pipeline"
STEP = "One step, on files"
CLUSTER = "On a cluster and a registry"
EVIDENCE = "Policies, evidence and reports"
