"""Static scan of artifacts: what may be said of a file before anything in it is loaded.

Three states. *Clean*: a format that is understood to its last byte, and nothing in it that could run.
*Dangerous*: something that could run, escape or exhaust. *Inconclusive*: everything else; it is never clean.
"""

from defense_core.artifact_scan.findings import RULES, ArtifactScan, FileScan, ScanFinding, State
from defense_core.artifact_scan.scan import require_clean, scan_artifact

__all__ = ["RULES", "ArtifactScan", "FileScan", "ScanFinding", "State", "require_clean", "scan_artifact"]
