"""Results files: their fields, and that a failed write leaves the old one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.markdown import source
from benchmarks.results import read_rows, write_results

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


def test_rows_keep_the_run_that_measured_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [("a1", "2-core A", 1), ("b2", "2-core B", 2), ("b2", "2-core B", 3)]
    for number, (commit, device, day) in enumerate(runs):
        monkeypatch.setattr(results, "commit", lambda commit=commit: commit)
        monkeypatch.setattr(results, "device", lambda device=device: device)
        rows = [*read_rows("fetch", folder=tmp_path), {"number": number}]
        write_results("fetch", rows, command="bench", started=STARTED.replace(day=day), folder=tmp_path)
    measured = {row["number"]: row["measured"] for row in read_rows("fetch", folder=tmp_path)}
    assert [(measured[n]["commit"], measured[n]["device"], int(measured[n]["started"][8:10])) for n in range(3)] == runs
    content = json.loads((tmp_path / "fetch.json").read_text())
    assert (content["commit"], content["started"][:10]) == ("b2", "2026-01-03")
    assert source(content) == (
        "\n`bench` at commit `b2`, 2-core B, 2026-01-03; `a1`, 2-core A, 2026-01-01; `b2`, 2-core B, 2026-01-02.\n"
    )


def test_a_file_whose_rows_are_all_new_names_one_run(tmp_path: Path) -> None:
    write_results("fetch", [{"number": 0}], command="bench", started=STARTED, folder=tmp_path)
    write_results("fetch", [{"number": 1}], command="bench", started=STARTED.replace(day=3), folder=tmp_path)
    content = json.loads((tmp_path / "fetch.json").read_text())
    assert "runs" not in content
    assert content["rows"] == [{"number": 1}]
