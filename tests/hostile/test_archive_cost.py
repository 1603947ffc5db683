"""Small archives that made their readers work for minutes are refused before a reader opens them."""

from __future__ import annotations

import gzip
import io
import itertools
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from defense_core.archives import checked_zip, unpacked
from defense_core.artifact_scan import State, scan_artifact
from defense_core.artifact_scan import scan as scan_module
from defense_core.artifact_scan.budget import Budget
from defense_core.errors import CorruptArtifact, UnsafeArtifact
from defense_core.image_files import DataLimits, read_images
from defense_core.limits import LoadLimits
from defense_core.zip_layout import MAX_ENTRY_BYTES
from tests.hostile.cost import quickly, rules, scanned
from tests.hostile.hostile_archives import zipped

# -- tar -------------------------------------------------------------------------------


def extended(kind: bytes, body: bytes) -> bytes:
    info = tarfile.TarInfo("././@PaxHeader")
    info.type, info.size = kind, len(body)
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


def record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    length = len(rest) + 1
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return str(length).encode() + rest


def member(name: str = "bundle.json", content: bytes = b"{}") -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


SPARSE = record("GNU.sparse.map", ",".join(["0"] * 200_000))
LONG_SPARSE = record("GNU.sparse.map", ",".join(["0"] * 10_000_000))
TARS: dict[str, bytes] = {
    "sparse map": extended(b"x", SPARSE) + member(),
    "long sparse map": extended(b"x", LONG_SPARSE) + member(),
    "sparse map for all": extended(b"g", SPARSE) + member(),
    "sparse map in the padding": extended(b"x", record("a", "b"))[:-490] + record("GNU.sparse.map", "0,1"),
    "one large header": extended(b"x", record("comment", "x" * (2 << 20))) + member(),
    "many headers": (extended(b"x", record("comment", "x" * 300_000)) + member()) * 4,
    "a chain of headers": extended(b"x", record("a", "b")) * 2000 + member(),
    "records in records": extended(b"x", b"2 " * 500_000 + b"=") + member(),
    "digits": extended(b"x", record("comment", "1" * 1_000_000)) + member(),
    "another size": extended(b"x", record("size", "0")) + member(),
    "long name": extended(b"L", b"x" * (8 << 20)) + member(),
    "old sparse file": extended(b"S", b"") + member(),
    "a folder with content": extended(b"5", b"x" * 512) + member(),
    "a size that is not octal": member()[:124] + b"\x80" + member()[125:],
    "many members": member() * 100_000,
}  # fmt: skip


@pytest.mark.parametrize("name", TARS)
def test_tar_files_that_tarfile_would_take_apart(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(tarfile, "open", lambda *arguments, **options: opened.append(options))
    path = tmp_path / "m.tgz"
    path.write_bytes(gzip.compress(TARS[name] + bytes(1024), 1))
    with quickly(), pytest.raises((UnsafeArtifact, CorruptArtifact)), unpacked(path, LoadLimits()):
        pass
    with quickly():
        assert scan_artifact(path).state is not State.CLEAN
    assert not opened


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_ordinary_tar_files_are_read(layout: int, tmp_path: Path) -> None:
    name = "a" * 40 + "/" + ("b" * 90 if layout == tarfile.USTAR_FORMAT else "ü" * 100)
    path = tmp_path / "m.tar"
    with tarfile.open(path, "w", format=layout, pax_headers={"comment": "of all"}) as archive:
        folder = tarfile.TarInfo("a" * 40)
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.uname = 3, 1.5, "jürgen"
        archive.addfile(info, io.BytesIO(b"abc"))
    with unpacked(path, LoadLimits()) as folder_at:
        assert [file.read_bytes() for file in folder_at.rglob("*") if file.is_file()] == [b"abc"]


# -- zip -------------------------------------------------------------------------------


def many_entries(count: int, name_bytes: int = 4, said: int | None = None) -> bytes:
    """A zip file whose table has ``count`` entries, all of the one file in it, and says it has ``said``."""
    one = zipped({"n" * name_bytes: b""})
    at = one.index(b"PK\x01\x02")
    table = one[at : one.index(b"PK\x05\x06")] * count
    told = min(count if said is None else said, 0xFFFE)
    return one[:at] + table + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, told, told, len(table), at, 0)


def with_end64(data: bytes) -> bytes:
    """The same with the second kind of end record, in front of a first that says nothing."""
    at = data.rindex(b"PK\x05\x06")
    *_, told, size, offset, _ = struct.unpack("<4s4H2IH", data[at:])
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, told, told, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    none = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return data[:at] + end64 + locator + none


ZIPS: dict[str, Callable[[], bytes]] = {
    "entries": lambda: many_entries(300_000),
    "entries that are not told": lambda: many_entries(300_000, said=1),
    "entries behind a second end record": lambda: with_end64(many_entries(300_000)),
    "entries before a comment": lambda: many_entries(300_000)[:-2] + struct.pack("<H", 7) + b"comment",
    "long entries": lambda: many_entries(1, MAX_ENTRY_BYTES + 1),
}


@pytest.mark.parametrize("name", ZIPS)
@pytest.mark.parametrize("ending", ["zip", "pt", "pt2"])
def test_zip_files_with_a_long_table(name: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    real = zipfile.ZipFile._RealGetContents  # type: ignore[attr-defined]
    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", lambda self: opened.append(self) or real(self))
    scan = scanned(tmp_path / f"m.{ending}", ZIPS[name]())
    assert "archive-unsafe" in rules(scan)
    with (
        pytest.raises(UnsafeArtifact, match="too many entries"),
        checked_zip(tmp_path / f"m.{ending}", LoadLimits(), stored_only=False),
    ):
        pass
    assert not opened


@pytest.mark.parametrize("name", ZIPS)
def test_a_clean_set_with_a_long_table(name: str, tmp_path: Path) -> None:
    path = tmp_path / "clean.npz"
    path.write_bytes(ZIPS[name]())
    with quickly(), pytest.raises(UnsafeArtifact, match="too many entries"):
        read_images(path, (1, 8, 8), DataLimits(), num_classes=10)


def test_as_many_entries_as_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "m.zip"
    for change in (lambda data: data, with_end64):
        path.write_bytes(change(zipped({f"f{number}": b"" for number in range(30)})))
        with checked_zip(path, LoadLimits(max_entries=30), stored_only=True) as archive:
            assert len(archive.namelist()) == 30
        with (
            pytest.raises(UnsafeArtifact, match="too many entries"),
            checked_zip(path, LoadLimits(max_entries=29), stored_only=True),
        ):
            pass


def packed_texts(count: int, size: int) -> bytes:
    """A zip of so many tar.gz archives with one text of ``size`` bytes each."""
    inner = tarred(size)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for number in range(count):
            archive.writestr(f"part{number}.tar.gz", inner)
    return whole.getvalue()


def tarred(size: int) -> bytes:
    text = (b"word " * size)[:size]
    member, whole = tarfile.TarInfo("notes.txt"), io.BytesIO()
    member.size = size
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        archive.addfile(member, io.BytesIO(text))
    return whole.getvalue()


def test_archives_in_an_archive_share_what_they_may_expand_to(tmp_path: Path) -> None:
    limits = LoadLimits(max_bytes=100_000)
    path = tmp_path / "parts.zip"
    path.write_bytes(packed_texts(2, 80_000))
    assert scan_artifact(path, limits).state is State.CLEAN
    path.write_bytes(packed_texts(12, 80_000))
    scan = scan_artifact(path, limits)
    assert (scan.state, {each.rule for each in scan.findings}) == (State.INCONCLUSIVE, {"too-large"})
    assert "together" in scan.findings[0].message


def test_what_the_time_of_a_scan_does_not_reach_is_inconclusive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.tar.gz").write_bytes(tarred(1000))
    ticks = itertools.count()
    monkeypatch.setattr(scan_module, "Budget", lambda limits: Budget(limits, clock=lambda: float(next(ticks))))
    scan = scan_artifact(folder, LoadLimits(timeout_s=1.0))
    assert scan.state is State.INCONCLUSIVE
    assert {each.rule for each in scan.findings} == {"too-slow"}
    assert scan.files[0].state is State.CLEAN
    assert [each.findings[0].rule for each in scan.files[-5:]] == ["too-slow"] * 5


def test_no_child_process_outlives_the_time_of_the_scan() -> None:
    now = [0.0]
    budget = Budget(LoadLimits(timeout_s=2.0), clock=lambda: now[0])
    assert budget.limits.timeout_s == 2.0
    now[0] = 19.5
    assert budget.limits.timeout_s == 0.5
    now[0] = 21.0
    assert 0 < budget.limits.timeout_s < 0.01
