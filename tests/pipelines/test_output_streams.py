"""Names and characters that cannot be shown, and readers that go away: neither changes what a command says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save
from torch import ones

from defense_core.errors import visible

ROOT = Path(__file__).parents[2]
ODD = os.fsdecode(b"b\xff.pkl")


def _quarantine(*words: str, encoding: str = "utf-8", out: int = subprocess.PIPE) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "pipelines.cli", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.PIPE, timeout=120, check=False
    )


def test_a_name_that_is_no_utf8_is_shown_as_an_escape(tmp_path: Path) -> None:
    folder = tmp_path / ODD
    folder.mkdir()
    (folder / ODD).write_bytes(b"cos\nsystem\n.")
    (folder / "m.safetensors").write_bytes(save({"a": ones(2)}))
    done = _quarantine("inspect", str(folder))
    assert (done.returncode, b"Traceback" in done.stderr) == (1, False)
    assert rb"b\udcff.pkl" in done.stdout
    told = _quarantine("inspect", str(folder), "--json", "--sarif", str(tmp_path / "o.sarif"))
    assert told.returncode == 1
    listed = json.loads(told.stdout.decode("utf-8"))["listed"]
    assert [row["path"] for row in listed] == [r"b\udcff.pkl", "m.safetensors"]
    json.dumps(listed, ensure_ascii=False).encode("utf-8")
    log = json.loads((tmp_path / "o.sarif").read_text("utf-8"))
    uris = [each["location"]["uri"] for each in log["runs"][0]["artifacts"]]
    assert uris == ["b%5Cudcff.pkl", "m.safetensors"]
    assert log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uris[0]


def test_the_folder_of_a_sarif_log_keeps_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from defense_core.artifact_scan import scan_artifact
    from defense_core.artifact_scan.sarif import to_sarif

    monkeypatch.chdir(tmp_path)
    Path(ODD).mkdir()
    (Path(ODD) / "a b.safetensors").write_bytes(save({"a": ones(2)}))
    log = to_sarif(scan_artifact(Path(ODD)), version="1", base=ODD)
    assert log["runs"][0]["artifacts"][0]["location"]["uri"] == "b%FF.pkl/a%20b.safetensors"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_path_that_is_not_there_is_bad_usage_under_any_name(encoding: str, tmp_path: Path) -> None:
    for name in (ODD, "caf\u00e9\U0001f600.pkl"):
        missing = str(tmp_path / name)
        done = _quarantine("inspect", missing, "--json", encoding=encoding)
        assert done.returncode == 3
        assert json.loads(done.stdout.decode(encoding))["what"] == visible(f"{missing} does not exist")
        plain = _quarantine("inspect", missing, encoding=encoding)
        assert (plain.returncode, b"Traceback" in plain.stderr) == (3, False)


def test_a_terminal_without_our_characters_gets_escapes() -> None:
    done = _quarantine("policy", "diff", "strict", "standard", encoding="latin-1")
    assert (done.returncode, done.stderr) == (1, b"")
    assert rb"\u2192" in done.stdout


def _into_a_closed_pipe(*words: str) -> subprocess.CompletedProcess[bytes]:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return _quarantine(*words, out=writer)
    finally:
        os.close(writer)


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_reader_that_goes_away_is_no_verdict(more: tuple[str, ...], tmp_path: Path) -> None:
    clean, dangerous = tmp_path / "m.safetensors", tmp_path / "m.pkl"
    clean.write_bytes(save({"a": ones(2)}))
    dangerous.write_bytes(b"\x80\x02cos\nsystem\n.")
    for path in (clean, dangerous, tmp_path / "nothing"):
        done = _into_a_closed_pipe("inspect", str(path), *more)
        told_on_stderr = path.name == "nothing" and not more
        assert done.returncode == (3 if told_on_stderr else 2), done.stderr
        assert b"Traceback" not in done.stderr
    assert _quarantine("inspect", str(clean), *more).returncode == 0


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("methods",), ("methods", "--json")])
def test_no_command_fails_for_want_of_a_reader(words: tuple[str, ...]) -> None:
    done = _into_a_closed_pipe(*words)
    assert (done.returncode, done.stderr) == (2, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("words", [("--version",), ("methods",), ("methods", "--json")])
def test_a_full_disk_is_no_verdict(words: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = _quarantine(*words, out=full.fileno())
    assert done.returncode == 2
    assert b"No space left" in done.stderr
