"""What judging a hostile file may cost."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from defense_core.artifact_scan import ArtifactScan, State, scan_artifact

SECONDS = 15
"""What a file may take on a busy machine; each took longer, or would have taken hours."""


def spent_s() -> float:
    """Processor seconds of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])


@contextmanager
def quickly() -> Iterator[None]:
    started = spent_s()
    yield
    assert spent_s() - started < SECONDS


def scanned(path: Path, data: bytes) -> ArtifactScan:
    path.write_bytes(data)
    with quickly():
        scan = scan_artifact(path)
    assert scan.state is not State.CLEAN
    return scan


def rules(scan: ArtifactScan) -> set[str]:
    return {finding.rule for finding in scan.findings}
