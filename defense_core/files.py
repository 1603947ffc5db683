"""Files that are either whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from defense_core.errors import OutputExists, QuarantineError, StorageError

CHUNK_BYTES = 1 << 20

_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


def sha256_bytes(data: bytes) -> str:
    """``"sha256:<hex>"`` of ``data``."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """``"sha256:<hex>"`` of the file at ``path``, read in 1 MiB pieces."""
    with open(path, "rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, which passes over what cannot be listed; here that is an OSError."""

    def refuse(error: OSError) -> None:
        raise error

    return os.walk(folder, onerror=refuse)


@contextmanager
def reading(
    path: object, kind: type[QuarantineError], expected: str, *, denied: type[QuarantineError] | None = None
) -> Iterator[None]:
    """OSError of looking at, opening or reading ``path`` as the typed error ``kind``; for want of a right, ``denied``.

    ``exists`` and ``is_dir`` raise too: where a folder on the way may not be entered, or a name is too long.
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else None
        where = "" if named is None or named == str(path) else f" ({named})"
        fitting = denied if denied is not None and isinstance(error, PermissionError) else kind
        raise fitting(
            f"{path} cannot be read",
            expected=expected,
            got=f"{error.strerror or error}{where}",
            hint="Check the path, and what this account may read",
        ) from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old file or the new one, whole.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    with atomic_file(path) as stream:
        stream.write(data)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream whose content becomes the file ``path`` when the block ends without an exception.

    On any exception, Ctrl-C included, what was at ``path`` before stays as it is.

    Raises:
        StorageError: the block raised an OSError with a number (disk full), or the folder cannot be written.
    """
    path = Path(path)
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _fsync_directory(path.parent)


def require_writable(path: Path) -> None:
    """Refuse a place that :func:`write_atomic` could not write to, before the work whose result is to lie there.

    Raises:
        OutputExists: a folder is there.
        StorageError: the folder that it is to lie in cannot be made or written.
    """
    path = Path(path)
    with _storage_errors(path):
        in_use = path.is_dir()
        if not in_use:
            # Nothing is made, for the work may fail: it is asked of what is there of the way.
            there = next(folder for folder in path.absolute().parents if folder.exists())
            tempfile.TemporaryFile(dir=there).close()
    if in_use:
        raise OutputExists(
            f"{path} is a folder", expected="a file to write", got="a folder", hint="Choose another --out"
        )


@contextmanager
def atomic_directory(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an exception.

    On any exception, Ctrl-C included, nothing new is left at ``path``, and with ``replace`` the
    old folder stays. A process that is killed outright leaves only hidden sibling folders,
    never a half-written ``path``. An OSError of the block that is not about writing (an input
    that is not there, a lost connection) passes through as it is.

    Args:
        path: the folder to create.
        replace: put the new folder in the place of one that is already there.

    Raises:
        OutputExists: ``path`` exists and ``replace`` is false.
        StorageError: the disk is full, or the parent folder cannot be written.
    """
    path = Path(path)
    with _storage_errors(path):
        in_use = not replace and path.exists() and (not path.is_dir() or any(path.iterdir()))
    if in_use:
        raise OutputExists(
            f"output folder {path} is in use",
            expected="a new or empty folder",
            got="a file or a folder with content",
            hint="Choose another --out, or remove it first",
        )
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with _storage_errors(path, within=temporary):
            temporary.chmod(0o755)  # mkdtemp's 0700 would keep the next step's user out
            yield temporary
        with _storage_errors(path):
            _fsync_tree(temporary)
            _publish(temporary, path, replace=replace)
            _fsync_directory(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish(folder: Path, path: Path, *, replace: bool) -> None:
    if not (replace and path.exists()):
        folder.rename(path)  # takes the place of an empty folder; refuses one that was filled meanwhile
        return
    old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    try:
        path.rename(old / path.name)
        try:
            folder.rename(path)
        except BaseException:
            (old / path.name).rename(path)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _storage_errors(path: Path, *, within: Path | None = None) -> Iterator[None]:
    """OSError as StorageError; with ``within``, only errors of the disk or of files in that folder."""
    try:
        yield
    except OSError as error:
        if error.errno is None or not (within is None or _concerns(error, within)):
            raise
        raise StorageError(
            f"cannot write {path}",
            expected="a writable folder with free space",
            got=os.strerror(error.errno),
            hint="Free space or choose another output folder; nothing was left behind",
        ) from error


def _concerns(error: OSError, folder: Path) -> bool:
    named = (error.filename, error.filename2)
    paths = [Path(os.fsdecode(name)) for name in named if isinstance(name, (str, bytes, os.PathLike))]
    return error.errno in _DISK_ERRNOS or any(path.is_relative_to(folder) for path in paths)


def _fsync_tree(folder: Path) -> None:
    for parent, _, names in os.walk(folder):
        for member in (Path(parent) / name for name in names):
            if member.is_file() and not member.is_symlink():
                _fsync_file(member)
        _fsync_directory(Path(parent))


def _fsync_file(path: Path) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
