"""A stranger's weight file to named tensors, without running anything that is in it.

The format is read from the content; a file name that claims another format is an error.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path

import torch

from defense_core.archives import checked_zip, common_root
from defense_core.errors import (
    AccessDenied,
    ArtifactTooLarge,
    CorruptArtifact,
    SourceNotFound,
    StorageError,
    UnsafeArtifact,
)
from defense_core.files import reading, sha256_bytes, sha256_file
from defense_core.isolation import read_isolated
from defense_core.limits import LoadLimits
from defense_core.pickles import check_torch_legacy, check_torch_zip, refuse_if_pickle
from defense_core.plain_members import TORCH_PLAIN, check_plain_members
from defense_core.pt2_file import read_pt2
from defense_core.safetensors_file import parse_safetensors

SAFETENSORS = "safetensors"
TORCH_ZIP = "torch.save file"
TORCH_LEGACY = "torch.save file (before 1.6)"
PT2 = "torch.export archive"
ARCHIVE = "archive of a bundle"

_EXTENSIONS = {
    ".safetensors": (SAFETENSORS,),
    ".pt": (TORCH_ZIP, TORCH_LEGACY),
    ".pth": (TORCH_ZIP, TORCH_LEGACY),
    ".bin": (TORCH_ZIP, TORCH_LEGACY),
    ".ckpt": (TORCH_ZIP, TORCH_LEGACY),
    ".pt2": (PT2,),
    ".zip": (ARCHIVE,),
    ".tar": (ARCHIVE,),
    ".gz": (ARCHIVE,),
    ".tgz": (ARCHIVE,),
    ".bz2": (ARCHIVE,),
    ".xz": (ARCHIVE,),
}
_PICKLE_PROTOCOLS = (b"\x02", b"\x03", b"\x04", b"\x05")


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds: tensors on the CPU as stored, the format, and the file's digest."""

    tensors: dict[str, torch.Tensor]
    format: str
    sha256: str


def require_plain_file(path: Path, limits: LoadLimits) -> None:
    """Refuse what is no regular file (a pipe would block for ever) or larger than ``max_bytes``.

    Raises:
        SourceNotFound, UnsafeArtifact, ArtifactTooLarge, CorruptArtifact (empty file).
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceNotFound(f"{path} does not exist", expected="a model file", hint="Check the path") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}", expected="a readable file", got=error.strerror) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnsafeArtifact(f"{path.name} is no regular file", expected="a file", got=stat.filemode(status.st_mode))
    if status.st_size > limits.max_bytes:
        raise ArtifactTooLarge(
            f"{path.name} is too large",
            expected=f"at most {limits.max_bytes} bytes",
            got=f"{status.st_size} bytes",
            hint="Raise max_bytes if a model of this size is expected",
        )
    if status.st_size == 0:
        raise CorruptArtifact(f"{path.name} is empty", expected="a model file", got="0 bytes")


def sniff(path: Path, limits: LoadLimits) -> str:
    """The format of the file at ``path``, from its content, after checking that its name does not lie.

    Raises:
        CorruptArtifact: an unknown format, or another than the extension says.
        UnsafeArtifact: bytes that would run code, or an unsafe archive.
        AccessDenied, StorageError: this account may not read it, or the disk fails.
    """
    require_plain_file(path, limits)
    with reading(path, StorageError, "a readable file", denied=AccessDenied):
        found = _content_format(path, limits)
    claimed = _EXTENSIONS.get(path.suffix.lower())
    if claimed is not None and found not in claimed:
        raise CorruptArtifact(
            f"{path.name} is not what its name says",
            expected=claimed[0],
            got=found,
            hint="Rename the file after finding out where it comes from",
        )
    return found


def check_static(path: Path, limits: LoadLimits) -> str:
    """The format of the file at ``path`` after every check that needs no loading.

    Raises:
        ArtifactTooLarge, UnsafeArtifact, CorruptArtifact, SourceNotFound.
    """
    found = sniff(path, limits)
    if found == TORCH_ZIP:
        with checked_zip(path, limits, stored_only=True) as archive:
            root = torch_root(path, archive.namelist())
            # torch itself does not compare the checksums that it wrote.
            damaged = archive.testzip()
            if damaged is not None:
                raise CorruptArtifact(
                    f"{path.name} is damaged",
                    expected="contents that match their checksums",
                    got=f"a wrong checksum of {damaged}",
                    hint="Fetch the file again and compare its digest",
                )
            check_plain_members(archive, root, TORCH_PLAIN, where=path.name)
            check_torch_zip(archive, root, where=path.name)
    elif found == TORCH_LEGACY:
        with open(path, "rb") as stream:
            check_torch_legacy(stream, where=path.name)
    return found


def read_weights(path: Path, limits: LoadLimits) -> WeightFile:
    """Tensors of a ``.safetensors``, ``torch.save`` or ``.pt2`` file.

    Raises:
        ArtifactTooLarge, UnsafeArtifact, CorruptArtifact, StateDictMismatch, LoadTimeout, SourceNotFound.
    """
    found = check_static(path, limits)
    if found == SAFETENSORS:
        # The bytes that are hashed are the bytes that are parsed.
        data = path.read_bytes()
        return WeightFile(parse_safetensors(data, limits, where=path.name), found, sha256_bytes(data))
    if found == ARCHIVE:
        raise CorruptArtifact(
            f"{path.name} is no weight file", expected="one file of tensors", got=found, hint="Load it as a bundle"
        )
    tensors = _read_pt2(path, limits) if found == PT2 else read_isolated(path, limits)
    return WeightFile(tensors, found, sha256_file(path))


def _read_pt2(path: Path, limits: LoadLimits) -> dict[str, torch.Tensor]:
    with checked_zip(path, limits, stored_only=True) as archive:
        return read_pt2(archive, common_root(archive.namelist()) or "", limits, path=path)


def _content_format(path: Path, limits: LoadLimits) -> str:
    with open(path, "rb") as stream:
        head = stream.read(512)
        if head[:4] == b"PK\x03\x04":
            return _zip_format(path, limits)
        if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
            return SAFETENSORS
        if head[:2] == b"\x1f\x8b" or head[:3] == b"BZh" or head[:6] == b"\xfd7zXZ\x00" or head[257:262] == b"ustar":
            return ARCHIVE
        if head[:1] == b"\x80" and head[1:2] in _PICKLE_PROTOCOLS:
            return TORCH_LEGACY
        stream.seek(0)
        refuse_if_pickle(stream, where=path.name)
    raise CorruptArtifact(
        f"{path.name} has an unknown format",
        expected="safetensors, a torch.save state dict, a torch.export archive, or an archive of a bundle",
        got="bytes that start with " + head[:8].hex(" "),
        hint="Save model.state_dict() with safetensors or torch.save",
    )


def _zip_format(path: Path, limits: LoadLimits) -> str:
    with checked_zip(path, limits, stored_only=False) as archive:
        names = archive.namelist()
        root = common_root(names) or ""
        if f"{root}archive_format" in names:
            return PT2
        if any(name.endswith((".pkl", "/version", "byteorder")) for name in names):
            return TORCH_ZIP
    return ARCHIVE


def torch_root(path: Path, names: list[str]) -> str:
    """The folder of all entries of a ``torch.save`` file. Raises CorruptArtifact or UnsafeArtifact on others."""
    root = common_root(names)
    if root is None or f"{root}data.pkl" not in names:
        raise CorruptArtifact(
            f"{path.name} is no torch.save file", expected="NAME/data.pkl", got=", ".join(sorted(names)[:3])
        )
    for name in names:
        inner = name.removeprefix(root)
        if inner not in ("data.pkl", *TORCH_PLAIN) and not (inner.startswith("data/") and inner[5:].isdecimal()):
            raise UnsafeArtifact(
                f"{path.name} holds {name!r}",
                expected="tensors and their table",
                got="TorchScript code" if inner.startswith(("code/", "constants")) else "an entry of unknown purpose",
                hint="Save model.state_dict(), not a scripted model",
            )
    return root
