"""Results files: their fields, and that a failed write leaves the old one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.results import write_results

STARTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def test_file_says_what_made_it(tmp_path: Path) -> None:
    rows = [{"size_bytes": 1, "seconds": 0.5}]
    path = write_results("fetch", rows, command="python -m benchmarks.fetch", started=STARTED, folder=tmp_path)
    content = json.loads(path.read_text())
    assert path == tmp_path / "fetch.json"
    assert content.keys() == {"schema", "command", "commit", "device", "started", "rows"}
    assert (content["schema"], content["rows"], content["started"]) == (1, rows, "2026-01-02T03:04:05+00:00")
    assert content["commit"]
    assert "-core " in content["device"]
    assert content["device"].endswith(" GiB")


def test_figures_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    write_results("fetch", [], command="one", started=STARTED, folder=tmp_path)
    with pytest.raises(ValueError, match="JSON"):
        write_results("fetch", [{"seconds": float("nan")}], command="two", started=STARTED, folder=tmp_path)
    assert json.loads((tmp_path / "fetch.json").read_text())["command"] == "one"
