"""Figures as one JSON file per benchmark, with the command, commit and machine that made them."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from defense_core.files import write_atomic

FOLDER = Path(__file__).resolve().parent / "results"


def write_results(
    name: str, rows: Sequence[Mapping[str, Any]], *, command: str, started: datetime, folder: Path = FOLDER
) -> Path:
    """Write ``<folder>/<name>.json``, whole or not at all.

    The file names the commit, the machine and the time of this run. Where rows of earlier runs are among ``rows``, as
    :func:`read_rows` gave them, it lists every run under ``runs``, and each row's ``measured`` is its run's number.

    Args:
        name: name of the file, without ending.
        rows: one mapping of field names to JSON values per row.
        command: what to run to get these figures again.
        started: when the run began, with its time zone.
        folder: where to.

    Raises:
        StorageError: the file cannot be written.
    """
    here = {"commit": commit(), "device": device(), "started": started.astimezone(UTC).isoformat(timespec="seconds")}
    made = [row.get("measured", here) for row in rows]
    runs = [here]
    for run in made:
        if run not in runs:
            runs.append(run)
    content: dict[str, Any] = {"schema": 1, "command": command, **here}
    if len(runs) > 1:
        content["runs"] = runs
        content["rows"] = [{**row, "measured": runs.index(run)} for row, run in zip(rows, made, strict=True)]
    else:
        content["rows"] = [{field: value for field, value in row.items() if field != "measured"} for row in rows]
    path = folder / f"{name}.json"
    write_atomic(path, (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode())
    return path


def read_rows(name: str, *, folder: Path = FOLDER) -> list[dict[str, Any]]:
    """Rows of a results file, each with the commit, the machine and the time of its run under ``measured``; none where
    there is no such file."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return []
    content = json.loads(path.read_text("utf-8"))
    runs = runs_of(content)
    return [{**row, "measured": runs[row.get("measured", 0)]} for row in content["rows"]]


def runs_of(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """Commit, machine and time of every run that a results file holds rows of, the latest first."""
    return list(content.get("runs", [{field: content[field] for field in ("commit", "device", "started")}]))


def commit() -> str:
    """Short hash of HEAD, or ``"unknown"`` outside a repository with commits."""
    command = ["git", "-C", str(FOLDER.parent), "rev-parse", "--short", "--verify", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return answer.stdout.strip() if answer.returncode == 0 else "unknown"


def device() -> str:
    """The machine in a few words: ``"2-core Intel Xeon, 23 GiB"``."""
    cores = len(os.sched_getaffinity(0))
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cores}-core {_processor()}, {memory_gib:.0f} GiB"


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    text = description.read_text() if description.is_file() else ""
    named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    words = re.sub(r"\((R|TM|tm|C)\)|@.*|\b(CPU|Processor)\b", " ", named[1]) if named else platform.machine()
    return " ".join(words.split())
