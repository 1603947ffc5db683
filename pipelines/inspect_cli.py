"""``quarantine inspect``: the static scan of a file or folder.

Exit codes: 0 clean, 1 dangerous, 2 inconclusive, 3 usage.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import options as o

if TYPE_CHECKING:
    from defense_core.artifact_scan import ArtifactScan

_STYLES = {"clean": "green", "dangerous": "red", "inconclusive": "yellow"}


def inspect(
    path: Annotated[Path, typer.Argument(help="A model file, or a folder; nothing in it is loaded.")],
    sarif: Annotated[str, typer.Option(help="Also write the findings to this file, as SARIF 2.1.0.")] = "",
    max_bytes: o.MaxBytes = o.DEFAULT_LIMITS.max_bytes,
    load_timeout_s: o.LoadTimeout = o.DEFAULT_LIMITS.timeout_s,
    as_json: o.AsJson = False,
) -> None:
    """Scan a file or folder without loading it: clean, dangerous or inconclusive, with reasons."""
    from defense_core import __version__
    from defense_core.artifact_scan import scan_artifact
    from defense_core.artifact_scan.sarif import to_sarif
    from defense_core.files import write_atomic
    from defense_core.limits import LoadLimits
    from pipelines.console import print_json

    scan = scan_artifact(path, LoadLimits(max_bytes=max_bytes, timeout_s=load_timeout_s))
    if sarif:
        base = path if path.is_dir() else path.parent
        log = to_sarif(scan, version=__version__, base="" if base.is_absolute() else str(base))
        write_atomic(Path(sarif), (json.dumps(log, indent=2, ensure_ascii=False) + "\n").encode())
    if as_json:
        print_json(scan.to_mapping())
    else:
        _print(scan, path)
    raise typer.Exit(scan.state.exit_code)


def _print(scan: ArtifactScan, path: Path) -> None:
    from pipelines.console import out, table

    if scan.findings:
        rows = [(each.rule, each.state.value, each.where, each.message) for each in scan.findings]
        table("Findings", ("rule", "state", "where", "what"), rows)
    state = scan.state.value
    kinds = ", ".join(sorted({file.kind for file in scan.files})) or "no file"
    out.print(f"[{_STYLES[state]}]{state}[/{_STYLES[state]}]  ", end="")
    out.print(
        f"{path}: {len(scan.files)} files, {sum(file.bytes for file in scan.files)} bytes ({kinds})", markup=False
    )
