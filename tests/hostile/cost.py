"""What judging a hostile file may cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from defense_core.artifact_scan import ArtifactScan, State, scan_artifact

SECONDS = 15
"""What a file may take on a busy machine; each took longer, or would have taken hours."""


@contextmanager
def quickly() -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < SECONDS


def scanned(path: Path, data: bytes) -> ArtifactScan:
    path.write_bytes(data)
    with quickly():
        scan = scan_artifact(path)
    assert scan.state is not State.CLEAN
    return scan


def rules(scan: ArtifactScan) -> set[str]:
    return {finding.rule for finding in scan.findings}
