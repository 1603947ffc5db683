"""Clean means understood to the last byte: nothing hides behind, between or instead of what a reader looks at."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from defense_core.artifact_scan import State, scan_artifact
from defense_core.bundle import load_bundle
from defense_core.compressed import expand
from defense_core.errors import QuarantineError, UnsafeArtifact
from defense_core.limits import LoadLimits
from defense_core.untrusted import check_static
from tests.hostile.hostile_archives import good_torch, zipped
from tests.hostile.hostile_formats import onnx_bytes

LIMITS = LoadLimits(max_bytes=16 << 20, timeout_s=30)
EVIL = b"cos\nsystem\n(S'echo hi'\ntR."
PLAIN = save({"weight": torch.arange(6.0)})
OTHER_BYTES = b"not a pickle, but nobody looked at it"


def _judged(path: Path, data: bytes) -> tuple[str, set[str]]:
    path.write_bytes(data)
    scan = scan_artifact(path, LIMITS)
    return scan.state.value, {finding.rule for finding in scan.findings}


def _members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _legacy(value: object, **more: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False, **more)
    return buffer.getvalue()


WEIGHTS = {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.int16), "c": torch.zeros(0)}


# -- files by torch before 1.6 ---------------------------------------------------------


class _Old(pickle._Pickler):  # type: ignore[name-defined]
    """Writes as torch before 0.4 did, which told views apart: tensors as (storage key, elements, view)."""

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, tuple) or value[:1] != ("storage",):
            return None
        return ("storage", torch.FloatStorage, *value[1:])


def _with_views(view: object, elements: int = 6) -> bytes:
    """One root storage of ``elements``, of which a view is a tensor of two."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    buffer = io.BytesIO(b"".join(pickle.dumps(item, protocol=2) for item in head))
    buffer.seek(0, io.SEEK_END)

    class Tensor:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return torch._utils._rebuild_tensor, (("storage", "7", "cpu", elements, view), 0, (2,), (1,))

    _Old(buffer, 2).dump({"weight": Tensor()})
    return (
        buffer.getvalue() + pickle.dumps(["7"], protocol=2) + struct.pack(f"<q{elements}f", elements, *range(elements))
    )


def test_an_old_file_is_read_to_the_end_of_its_storages(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.pt", _legacy(WEIGHTS)
    assert _judged(path, whole) == ("clean", set())
    for cut in (1, 20, 60):
        assert _judged(path, whole[:-cut]) == ("inconclusive", {"damaged"})
    assert _judged(path, whole + EVIL) == ("dangerous", {"pickle-hidden"})
    assert _judged(path, whole + OTHER_BYTES) == ("dangerous", {"pickle-hidden"})
    assert "os.system" in str(scan_artifact(_written(path, whole + EVIL), LIMITS).findings)


def test_an_old_file_whose_storages_are_not_those_of_its_tensors(tmp_path: Path) -> None:
    path, whole = tmp_path / "m.pt", _legacy({"a": torch.arange(3.0)})
    body = struct.pack("<q3f", 3, *range(3))
    assert whole.endswith(body)
    lying = whole.removesuffix(body) + struct.pack("<q3f", 2, *range(3))
    assert _judged(path, lying) == ("dangerous", {"tensor-lies"})
    keys = whole[: -len(body)].rindex(b"\x80\x02]")
    for table in ([], ["1", "1"], ["1"], "1", [["1"]], {"1": 1}):
        state, rules = _judged(path, whole[:keys] + pickle.dumps(table, protocol=2) + body)
        assert state != "clean", table
        assert rules <= {"tensor-lies", "too-slow"}, table


def test_views_of_very_old_files(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    assert _judged(path, _with_views(("8", 2, 3))) == ("clean", set())
    assert torch.load(path, weights_only=True)["weight"].tolist() == [2.0, 3.0]
    for view in (("8", 5, 3), ("8", 0, 1), ("8", -1, 3), ("8", 0), "8"):
        assert _judged(path, _with_views(view)) == ("dangerous", {"tensor-lies"}), view


@pytest.mark.parametrize("protocol", [2, 3])
@pytest.mark.parametrize(
    "value",
    [
        {"epoch": 3, "best": None},
        {"a": torch.ones(4), "tied": torch.ones(4).expand(3, 4), "view": torch.arange(9.0)[2:5]},
        {str(kind): torch.zeros(3).to(kind) for kind in (torch.bool, torch.bfloat16, torch.complex64, torch.float64)},
        torch.ones(2),
        [torch.ones(2).untyped_storage(), torch.ones(2).storage()],
    ],
    ids=["no tensors", "views", "types", "one tensor", "storages"],
)
def test_old_files_as_torch_writes_them_are_clean(value: object, protocol: int, tmp_path: Path) -> None:
    assert _judged(tmp_path / "m.pt", _legacy(value, pickle_protocol=protocol)) == ("clean", set())


# -- members of torch's archives -------------------------------------------------------


@pytest.mark.parametrize("value", [EVIL, EVIL * 1000, b"", b"3; rm", b"three\n", b"little\n", b"\xff\xfe"])
@pytest.mark.parametrize("member", ["version", "byteorder", ".data/serialization_id", ".format_version"])
def test_a_plain_member_of_a_torch_file_holds_nothing_else(member: str, value: bytes, tmp_path: Path) -> None:
    members = _members(good_torch())
    name = next(iter(members)).partition("/")[0] + "/" + member
    assert name in members
    path = tmp_path / "m.pt"
    assert _judged(path, zipped({**members, name: value})) == ("dangerous", {"archive-unsafe"})
    with pytest.raises(UnsafeArtifact, match="not what torch writes there"):
        check_static(path, LIMITS)


@pytest.mark.parametrize("value", [EVIL, EVIL * 1000, b""])
@pytest.mark.parametrize("member", ["archive_version", "archive_format", "version", "byteorder", ".data/version"])
def test_a_plain_member_of_a_torch_export_archive_holds_nothing_else(member: str, value: bytes, tmp_path: Path) -> None:
    members = {"m/archive_format": b"pt2", "m/archive_version": b"0", "m/byteorder": b"little"}
    path = tmp_path / "m.pt2"
    assert _judged(path, zipped(members)) == ("clean", set())
    assert _judged(path, zipped({**members, f"m/{member}": value})) == ("dangerous", {"archive-unsafe"})


@pytest.mark.parametrize("record", [EVIL, OTHER_BYTES, b""])
def test_a_record_that_no_tensor_names(record: bytes, tmp_path: Path) -> None:
    members = _members(good_torch())
    root = next(iter(members)).partition("/")[0]
    found = _judged(tmp_path / "m.pt", zipped({**members, f"{root}/data/777": record}))
    assert found == ("dangerous", {"tensor-lies"})


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"version": b"2\n"},
        {"version": b"10\n"},
        {"version": b"3"},
        {"byteorder": b"big"},
        {".storage_alignment": b"4096"},
        {".data/serialization_id": b"0"},
        {"byteorder": None, ".data/serialization_id": None, ".format_version": None, ".storage_alignment": None},
    ],
)
def test_members_as_versions_of_torch_write_them_are_clean(change: dict[str, bytes | None], tmp_path: Path) -> None:
    members: dict[str, bytes | None] = dict(_members(good_torch()))
    root = next(iter(members)).partition("/")[0]
    members |= {f"{root}/{name}": value for name, value in change.items()}
    data = zipped({name: value for name, value in members.items() if value is not None})
    assert _judged(tmp_path / "m.pt", data) == ("clean", set())


# -- compressed streams and tar archives -----------------------------------------------

PACKED: dict[str, Callable[[bytes], bytes]] = {
    "m.gz": lambda data: gzip.compress(data, mtime=0),
    "m.bz2": bz2.compress,
    "m.xz": lzma.compress,
    "m.joblib": zlib.compress,
}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _tar(*members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("tail", [EVIL, OTHER_BYTES, b"\n"], ids=["pickle", "text", "newline"])
@pytest.mark.parametrize("name", PACKED)
def test_bytes_behind_a_compressed_stream(name: str, tail: bytes, tmp_path: Path) -> None:
    state, rules = _judged(tmp_path / name, PACKED[name](PLAIN) + tail)
    expected = ("inconclusive", {"damaged"}) if name == "m.gz" else ("dangerous", {"archive-unsafe"})
    assert (state, rules) == expected


def test_a_second_zlib_stream_that_joblib_joins_to_the_first(tmp_path: Path) -> None:
    joined = zlib.compress(EVIL[:11]) + zlib.compress(EVIL[11:])
    assert _judged(tmp_path / "m.joblib", joined)[0] == "dangerous"


@pytest.mark.parametrize("name", PACKED)
def test_compressed_streams_are_clean_to_their_end_and_damaged_before_it(name: str, tmp_path: Path) -> None:
    packed = PACKED[name](PLAIN)
    assert _judged(tmp_path / name, packed) == ("clean", set())
    assert _judged(tmp_path / name, packed[:-3]) == ("inconclusive", {"damaged"})


@pytest.mark.parametrize("name", ["m.gz", "m.bz2", "m.xz"])
def test_streams_of_parallel_packers_are_read_as_one(name: str, tmp_path: Path) -> None:
    pack = PACKED[name]
    several = pack(PLAIN[:40]) + pack(b"") + pack(PLAIN[40:])
    assert _judged(tmp_path / name, several) == ("clean", set())
    padded = several + bytes(8)
    assert _judged(tmp_path / name, padded)[0] == ("dangerous" if name == "m.bz2" else "clean")
    path = _written(tmp_path / name, pack(bytes(3 << 20)) + pack(b"end"))
    with open(tmp_path / "plain", "wb") as sink:
        expand(path, sink, 4 << 20, bare_zlib=True)
    assert (tmp_path / "plain").read_bytes() == bytes(3 << 20) + b"end"
    with open(tmp_path / "plain", "wb") as sink, pytest.raises(UnsafeArtifact, match="unpacks to too much"):
        expand(path, sink, 3 << 20, bare_zlib=True)


@pytest.mark.parametrize("name", ["m.gz", "m.bz2", "m.xz"])
def test_streams_without_end_are_refused(name: str, tmp_path: Path) -> None:
    assert _judged(tmp_path / name, PACKED[name](b"") * 20_001)[1] == {"archive-unsafe"}


def test_an_xz_stream_that_asks_for_more_memory_than_packers_do_is_damage(tmp_path: Path) -> None:
    packed = lzma.compress(PLAIN, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30, "preset": 0}])
    assert _judged(tmp_path / "m.xz", packed) == ("inconclusive", {"damaged"})
    usual = lzma.compress(PLAIN, preset=9 | lzma.PRESET_EXTREME)
    assert _judged(tmp_path / "m.xz", usual) == ("clean", set())


def test_padding_between_xz_streams_is_whole_words(tmp_path: Path) -> None:
    first, second = lzma.compress(PLAIN[:40]), lzma.compress(PLAIN[40:])
    for zeros, state in ((4, "clean"), (100_000, "clean"), (3, "dangerous"), (99_999, "dangerous")):
        assert _judged(tmp_path / "m.xz", first + bytes(zeros) + second)[0] == state


_EMPTY_BLOCK = bytes(512)
HIDDEN_IN_TAR = {
    "a second archive": lambda tar, more: tar + more,
    "a member behind one zero block": lambda tar, more: tar.rstrip(b"\x00").ljust(1024, b"\x00") + _EMPTY_BLOCK + more,
    "a pickle in the last block": lambda tar, more: tar[:-100] + EVIL.ljust(100, b"\x00"),
    "a pickle behind the last block": lambda tar, more: tar + EVIL,
    "half a block": lambda tar, more: tar[:1024] + OTHER_BYTES,
}


@pytest.mark.parametrize("name", HIDDEN_IN_TAR)
@pytest.mark.parametrize("packed", ["m.tar", "m.bz2"])
def test_bytes_behind_the_end_of_a_tar_archive(name: str, packed: str, tmp_path: Path) -> None:
    tar = HIDDEN_IN_TAR[name](_tar(("m.safetensors", PLAIN)), _tar(("evil.py", b"import os")))
    path = tmp_path / packed
    assert _judged(path, bz2.compress(tar) if packed == "m.bz2" else tar)[0] == "dangerous"
    with pytest.raises(UnsafeArtifact, match="behind"):
        load_bundle(path, limits=LIMITS)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_archives_of_every_form_and_blocking_are_clean(form: int, tmp_path: Path) -> None:
    tar = _tar(("m.safetensors", PLAIN), ("config.json", b"{}"), form=form)
    end = len(tar.rstrip(b"\x00"))
    without_end = tar[: -(-end // 512) * 512]
    for data in (tar, without_end, without_end + _EMPTY_BLOCK, without_end + bytes(1024), tar + bytes(1 << 20)):
        assert _judged(tmp_path / "m.tar", data) == ("clean", set())


@pytest.mark.parametrize(
    "command",
    [
        "tar cf m.tar a", "tar czf m.tgz a", "tar cjf m.tar.bz2 a", "tar cJf m.tar.xz a", "gzip -k a/m.safetensors",
        "bzip2 -k a/m.safetensors", "xz -k a/m.safetensors", "tar --format=v7 -cf m.tar a", "zip -qr m.zip a",
    ],
)  # fmt: skip
def test_archives_by_common_tools_are_clean(command: str, tmp_path: Path) -> None:
    words = command.split()
    tools = [words[0], *(tool for flag, tool in (("cjf", "bzip2"), ("cJf", "xz"), ("czf", "gzip")) if flag in words)]
    if not all(map(shutil.which, tools)):
        pytest.skip(f"no {' or no '.join(tools)}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m.safetensors").write_bytes(PLAIN)
    subprocess.run(words, cwd=tmp_path, check=True, timeout=60)
    scan = scan_artifact(tmp_path, LIMITS)
    assert (scan.state is State.CLEAN, len(scan.files)) == (True, 2), scan.findings


# -- texts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        b"cthis\ns\n.",
        b"cos\nsystem\n.",
        b"(S'id'\nios\nsystem\n.",
        b"N.cos\nsystem\n.",
        b"I1\n0" * 1100 + b"cos\nsystem\n.",
        b"cthis\ns\n.\nand then a readme\n",
    ],
    ids=["import", "function", "inst", "second pickle", "behind 1100 objections", "text behind"],
)
@pytest.mark.parametrize("name", ["README.md", "notes.txt", "labels", "table.csv"])
def test_a_text_that_imports_when_it_is_unpickled(name: str, text: bytes, tmp_path: Path) -> None:
    state, rules = _judged(tmp_path / name, text)
    assert (state, "pickle-hidden" in rules) == ("dangerous", True)
    with pytest.raises(QuarantineError):
        check_static(tmp_path / name, LIMITS)


@pytest.mark.parametrize("text", [b"I1\n.", b"N.", b"(lI1\naI2\na.", b"N." * 1000])
def test_a_text_that_is_a_harmless_pickle_to_its_end(text: bytes, tmp_path: Path) -> None:
    assert _judged(tmp_path / "labels.txt", text) == ("inconclusive", {"format-unsupported"})


ORDINARY = {
    "README.md": "# Model\n\ncat\ndog\n\nAccuracy: 99 %.\n",
    "notes.txt": "N.B. read me first.\nIt's a text.\n",
    "dots.txt": "...\nand so on.\n",
    "contents.md": "contents\n--------\n\n1. what\n2. why\n",
    "labels.txt": "cat\ndog\nairplane\ntruck\n",
    "classes.txt": "classification\nmodel\nsegmentation\ndetection\n",
    ".dockerignore": ".dockerignore\nDockerfile\n.git\n.hg\n.svn\napp.yaml\n",
    "numbers.csv": "0.5,0.25\n1.0,2.0\n",
    "head.csv": "id,label\n1,cat\n2,dog\n",
    "column.csv": "confidence\n0.93\n0.5\n",
    "config.yaml": "model:\n  name: small_cnn\n  width: 4\n",
    "inline.yaml": "import: os\nclass: Net\n",
    "config.json": json.dumps({"width": 4, "names": ["a.", "b."]}),
    "list.json": "[0.5, 1.0]",
    "net.toml": "[model]\nname = 'net'\n",
    "code.txt": "import os\nimport sys\n\nclass Net:\n    pass\n",
    "VERSION": "1.0.0\n",
    "LICENSE": "Permission is hereby granted, free of charge, to any person\n",
    "Dockerfile": "FROM scratch\nCOPY model /\n",
    "dna.txt": "NNNNACGT\n",
    "umlaut.txt": "Übergröße.\nçédille\n",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_texts_stay_clean(name: str, tmp_path: Path) -> None:
    assert _judged(tmp_path / name, ORDINARY[name].encode()) == ("clean", set())


@pytest.mark.parametrize("start", [b"0.", b".", b"N.", b"]."])
def test_raw_numbers_and_other_formats_that_begin_like_a_pickle_are_no_findings(start: bytes, tmp_path: Path) -> None:
    """Two bytes in a few hundred are a pickle that names nothing; only an import makes one."""
    members = {"m/archive_format": b"pt2", "m/data/weights/weight_0": start.ljust(64, b"\x3f")}
    assert _judged(tmp_path / "m.pt2", zipped(members)) == ("clean", set())
    hidden = {**members, "m/data/weights/weight_0": b"cos\nsystem\n.".ljust(64, b"\x3f")}
    assert _judged(tmp_path / "m.pt2", zipped(hidden)) == ("dangerous", {"pickle-hidden"})
    relu = onnx_bytes([b"\x22\x04Relu"])
    assert _judged(tmp_path / "m.onnx", relu) == ("clean", set())
