"""Zip and tar archives from strangers: every entry is checked before a byte of it is unpacked."""

from __future__ import annotations

import dataclasses
import lzma
import shutil
import stat
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from defense_core.compressed import expand, free
from defense_core.errors import CorruptArtifact, StorageError, UnsafeArtifact
from defense_core.files import CHUNK_BYTES
from defense_core.limits import LoadLimits
from defense_core.tar_layout import check_tar_layout, unsafe_entry
from defense_core.zip_layout import check_layout, require_few_entries

_MAX_RATIO = 200  # deflate reaches 1000:1 on a bomb, about 1.1:1 on weights
_RATIO_FREE_BYTES = 1 << 20
_MAX_BUNDLE_ENTRIES = 16
# What the standard library raises on damaged archives, besides OSError without an error number.
_DAMAGE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    NotImplementedError,
    ValueError,
    struct.error,
    OSError,
)


@contextmanager
def checked_zip(path: Path, limits: LoadLimits, *, stored_only: bool) -> Iterator[zipfile.ZipFile]:
    """The zip file at ``path`` after its whole table of contents was checked.

    Args:
        stored_only: refuse compressed entries (``torch.save`` and ``torch.export`` never compress).

    Raises:
        UnsafeArtifact: names that escape or repeat, links, encryption, too many or too large entries.
        CorruptArtifact: not a complete zip file, or damage found while it is read.
    """
    with damage_as_errors(path):
        require_few_entries(path, limits.max_entries)
    with damage_as_errors(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if archive.comment or not entries or min(entry.header_offset for entry in entries) != 0:
            raise UnsafeArtifact(
                f"{path.name} is more than one zip archive",
                expected="entries from the first byte on, and no comment",
                got="other data around the archive, or no entry",
            )
        # The raw names: zipfile cuts its own at a NUL byte.
        _check_names(path, [entry.orig_filename for entry in entries], limits.max_entries)
        for entry in entries:
            _check_zip_entry(path, entry, stored_only=stored_only)
        _check_total(path, sum(entry.file_size for entry in entries), limits)
        with open(path, "rb") as stream:
            check_layout(stream, entries, archive.start_dir, where=path.name)
        yield archive


@contextmanager
def unpacked(path: Path, limits: LoadLimits, *, spend: Callable[[int], None] = free) -> Iterator[Path]:
    """A temporary folder with the files of the zip or tar archive at ``path``.

    Directories, and one folder around everything, are allowed; the yielded path is inside that folder.

    Args:
        spend: called with how many bytes are about to be written; may raise.

    Raises:
        UnsafeArtifact, CorruptArtifact: as :func:`checked_zip`; also devices and sparse files in a tar.
    """
    few = dataclasses.replace(limits, max_entries=min(limits.max_entries, _MAX_BUNDLE_ENTRIES))
    with tempfile.TemporaryDirectory(prefix="quarantine-") as folder:
        target = Path(folder) / "content"
        target.mkdir()
        with open(path, "rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        if is_zip:
            with checked_zip(path, few, stored_only=False) as archive:
                spend(sum(entry.file_size for entry in archive.infolist()))
                for entry in archive.infolist():
                    if not entry.is_dir():
                        with archive.open(entry) as source:
                            _copy(path, source, target / entry.filename, entry.file_size)  # type: ignore[arg-type]
        else:
            _unpack_tar(path, target, few, spend)
        inside = list(target.iterdir())
        yield inside[0] if len(inside) == 1 and inside[0].is_dir() else target


def _unpack_tar(path: Path, target: Path, limits: LoadLimits, spend: Callable[[int], None]) -> None:
    with damage_as_errors(path), tempfile.TemporaryFile() as plain:
        # Expanded first and under a limit: tarfile reads extended headers of any declared size into memory.
        expand(path, plain, limits.max_bytes + CHUNK_BYTES, bare_zlib=False, spend=spend)
        check_tar_layout(plain, limits.max_entries, where=path.name)
        plain.seek(0)
        with tarfile.open(fileobj=plain, mode="r:") as archive:
            members: list[tarfile.TarInfo] = []
            for member in archive:
                members.append(member)
                if len(members) > limits.max_entries:
                    break
            _check_names(path, [member.name for member in members], limits.max_entries)
            for member in members:
                if not (member.isdir() or (member.isreg() and not member.issparse())):
                    raise unsafe_entry(path.name, member.name, "a link, device or sparse file")
            _check_total(path, sum(member.size for member in members), limits)
            for member in members:
                source = archive.extractfile(member) if member.isreg() else None
                if source is not None:
                    _copy(path, source, target / member.name, member.size)  # type: ignore[arg-type]


def _check_names(path: Path, names: list[str], max_entries: int) -> None:
    if len(names) > max_entries:
        raise UnsafeArtifact(f"{path.name} has too many entries", expected=f"at most {max_entries}", got=len(names))
    seen: set[str] = set()
    for name in names:
        parts = PurePosixPath(name).parts
        if name in (".", "./"):
            continue
        odd = not parts or "\\" in name or "\x00" in name or ":" in name or not name.isprintable()
        if odd or name.startswith("/") or ".." in parts or len(parts) > 8:
            raise unsafe_entry(path.name, name, "a path that may leave the folder")
        # Folded, because two names that differ in case are one file on some systems.
        folded = "/".join(parts).casefold()
        if folded in seen:
            raise unsafe_entry(path.name, name, "a name that occurs twice")
        seen.add(folded)


def _check_zip_entry(path: Path, entry: zipfile.ZipInfo, *, stored_only: bool) -> None:
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise unsafe_entry(path.name, entry.filename, "a link or device")
    if entry.flag_bits & 0x1:
        raise unsafe_entry(path.name, entry.filename, "encrypted")
    if entry.compress_type not in (
        (zipfile.ZIP_STORED,) if stored_only else (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    ):
        why = "compressed in a way that such files never are (a zip bomb may be)"
        raise unsafe_entry(path.name, entry.filename, why)
    if entry.file_size > _RATIO_FREE_BYTES and entry.file_size > _MAX_RATIO * max(entry.compress_size, 1):
        ratio = entry.file_size // max(entry.compress_size, 1)
        raise unsafe_entry(path.name, entry.filename, f"compressed {ratio}:1, as a zip bomb is")


def _check_total(path: Path, total: int, limits: LoadLimits) -> None:
    if total > limits.max_bytes:
        raise UnsafeArtifact(
            f"{path.name} declares too much content",
            expected=f"at most {limits.max_bytes} bytes",
            got=f"{total} bytes",
            hint="Raise max_bytes if the archive is known to be good",
        )


def _copy(path: Path, source: BinaryIO, target: Path, size: int) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target, "xb") as sink:
        shutil.copyfileobj(source, sink, CHUNK_BYTES)
    if target.stat().st_size != size:
        raise CorruptArtifact(
            f"{path.name} is damaged", expected=f"{size} bytes of {target.name}", got=target.stat().st_size
        )


@contextmanager
def damage_as_errors(path: Path) -> Iterator[None]:
    """What the standard library raises on damaged archives, as CorruptArtifact or StorageError."""
    try:
        yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise StorageError(
                f"cannot unpack {path.name}", expected="a readable file and free temporary space", got=error.strerror
            ) from error
        raise CorruptArtifact(
            f"{path.name} is damaged",
            expected="a complete archive",
            got=str(error)[:200] or type(error).__name__,
            hint="Fetch the file again and compare its digest",
        ) from error


def common_root(names: Iterable[str]) -> str | None:
    """The single top folder of all names, with its slash; ``None`` if they share none."""
    roots = {name.split("/", 1)[0] for name in names if "/" in name}
    return f"{roots.pop()}/" if len(roots) == 1 and all("/" in name for name in names) else None
