"""A private copy of an operator's file or folder: bounded, of regular files only."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from defense_core.errors import AccessDenied, ArtifactTooLarge, SourceError, StorageError, UnsafeArtifact
from defense_core.files import CHUNK_BYTES, reading, walk


def copy_of(path: Path, folder: Path, max_bytes: int) -> Path:
    """Copy the file or folder at ``path`` into ``folder``, under its own name; the copy's path.

    A link that is named itself is followed; links inside a folder are refused.

    Raises:
        UnsafeArtifact: a link in the folder, or something that is neither a file nor a folder.
        ArtifactTooLarge: more than ``max_bytes`` in all, before or while it is copied.
        StorageError: the copy cannot be written.
        AccessDenied, SourceError: something of it cannot be read.
    """
    with reading(path, SourceError, "readable files", denied=AccessDenied):
        size = sum(_size(member, path) for member in _members(path)) if path.is_dir() else _size(path, path)
        # The last part of `.`, `..` and `/` is no name.
        name = path.name if path.name not in ("", "..") else path.resolve().name or "content"
    if size > max_bytes:
        raise _too_large(path, max_bytes, f"{size} bytes")
    target, copying = folder / name, _Copying(path, max_bytes)
    try:
        if path.is_dir():
            shutil.copytree(path, target, copy_function=copying.one)
        else:
            copying.one(path, target)
    except (OSError, shutil.Error) as error:
        raise StorageError(f"cannot copy {path}", expected="a readable file and free space", got=error) from error
    return target


def _members(folder: Path) -> Iterator[Path]:
    """Everything below ``folder``; unlike ``rglob``, not without what may not be read."""
    for parent, folders, names in walk(folder):
        for name in (*folders, *names):
            member = Path(parent) / name
            if member.is_symlink():
                raise UnsafeArtifact(
                    f"{folder} holds a symbolic link", expected="files and folders", hint="Copy the files it points to"
                )
            yield member


def _size(member: Path, path: Path) -> int:
    status = member.stat()
    if stat.S_ISDIR(status.st_mode):
        return 0
    if not stat.S_ISREG(status.st_mode):
        raise _special(path)
    return status.st_size


@dataclass
class _Copying:
    """Copies files one by one, and stops where they come to more than ``max_bytes``: they may grow meanwhile."""

    path: Path
    max_bytes: int
    copied: int = 0

    def one(self, source: str | Path, target: str | Path) -> None:
        with reading(source, SourceError, "a readable file", denied=AccessDenied):
            # Without waiting for a writer, where a pipe took the file's place.
            handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK)
        with open(handle, "rb") as stream, open(target, "xb") as sink:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise _special(self.path)
            while data := stream.read(CHUNK_BYTES):
                self.copied += len(data)
                if self.copied > self.max_bytes:
                    raise _too_large(self.path, self.max_bytes, "more, while it was copied")
                sink.write(data)


def _special(path: Path) -> UnsafeArtifact:
    return UnsafeArtifact(
        f"{path} is, or holds, something else than files and folders",
        expected="regular files",
        got="a device, pipe or socket",
        hint="Copy its content into a file",
    )


def _too_large(path: Path, limit: int, got: str) -> ArtifactTooLarge:
    return ArtifactTooLarge(f"{path} is too large", expected=f"at most {limit} bytes", got=got)
