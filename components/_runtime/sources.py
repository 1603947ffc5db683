"""Bytes from wherever the operator says they are, pinned, limited and hashed, into a local folder."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from components._runtime.addresses import local_path, split_address
from components._runtime.copies import copy_of
from defense_core.errors import (
    AccessDenied,
    ConfigError,
    DigestMismatch,
    SourceError,
    SourceNotFound,
)
from defense_core.files import reading, sha256_file
from defense_core.progress import Progress

MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".pt2")
DESCRIPTION = "bundle.json"
COMPANIONS = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "README.md")


@dataclass(frozen=True)
class Acquired:
    """What was fetched.

    Attributes:
        path: the local copy: a file, or a folder that holds a bundle.
        uri: where it came from, without credentials.
        version_id: the S3 version or registry version that was read; empty where there is none.
        sha256: digest of the file; of ``bundle.json`` for a folder, which lists all others.
        bytes: size.
        registered_source: where the files of a registered version lay, without credentials; empty for the others. Any
            writer of the registry can have named it.
        companions: files beside the original that may state its licence; empty for S3, where nothing is listed.
    """

    path: Path
    uri: str
    version_id: str
    sha256: str
    bytes: int
    registered_source: str = ""
    companions: tuple[Path, ...] = ()


def acquire(uri: str, folder: Path, *, max_bytes: int, sha256: str = "", progress: Progress) -> Acquired:
    """Copy what ``uri`` names into the existing, empty ``folder``.

    Args:
        uri: ``s3://bucket/key[?versionId=…]``, ``models:/name/3``, ``models:/name@alias``,
            ``file:///path`` or a path.
        max_bytes: refused before the transfer if it is larger, and during it if it grows.
        sha256: the digest that it must have; empty: whatever it has.

    Raises:
        SourceNotFound, AccessDenied, ArtifactTooLarge, DigestMismatch, TransferFailed: see each.
        SourceError: a path that no file can have.
        UnsafeArtifact: a path that is neither a file nor a folder, or a folder that holds a link or such a thing.
        RegistryUnavailable: MLflow does not answer.
        ConfigError: an address of another kind, or a malformed one.
    """
    scheme = split_address(uri).scheme
    if scheme == "s3":
        found = _from_s3(uri, folder, max_bytes, sha256, progress)
    elif scheme == "models":
        found = _from_registry(uri, folder, max_bytes)
    elif scheme == "file" or "://" not in uri:
        found = _from_path(local_path(uri), folder, max_bytes)
    else:
        raise ConfigError("address is not usable", expected="s3://, models:/, file:// or a path", got=_plain(uri))
    if sha256 and found.sha256 != sha256:
        raise DigestMismatch(
            f"{found.uri} is not what was promised",
            expected=sha256,
            got=found.sha256,
            hint="Find out who changed it; nothing was loaded",
        )
    return found


def _from_s3(uri: str, folder: Path, max_bytes: int, sha256: str, progress: Progress) -> Acquired:
    # boto3 is imported only where something comes from S3.
    from components._runtime.s3 import fetch_object, parse_s3_uri

    location = parse_s3_uri(uri)
    # Only the ending of a stranger's name is kept: it tells the readers of images the format.
    ending = PurePosixPath(location.key).suffix
    name = "artifact" + (ending if re.fullmatch(r"\.[A-Za-z0-9]{1,12}", ending) else "")
    fetched = fetch_object(
        location, folder / name, max_bytes=max_bytes, expected_sha256=sha256 or None, progress=progress
    )
    return Acquired(fetched.path, fetched.uri, fetched.version_id, fetched.sha256, fetched.size_bytes)


def _from_registry(uri: str, folder: Path, max_bytes: int) -> Acquired:
    from components._runtime.mlflow_connection import MlflowSettings, connect
    from components._runtime.registered_files import resolve_model_uri

    version = resolve_model_uri(
        connect(MlflowSettings.from_environment(), create=False), uri, folder / "version", max_bytes=max_bytes
    )
    found = _described(_model_within(version.path, uri), version.uri, version.version)
    return replace(found, companions=_companions(version.path), registered_source=version.address)


def _model_within(folder: Path, what: str) -> Path:
    """The one model in a registered version: a bundle, or a single model file."""
    bundles = [path.parent for path in (folder / DESCRIPTION, folder / "bundle" / DESCRIPTION) if path.is_file()]
    if bundles:
        return bundles[0]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in MODEL_SUFFIXES]
    if len(files) == 1:
        return files[0]
    raise SourceNotFound(
        f"{what} holds no single model",
        expected="a bundle, or one file of " + ", ".join(MODEL_SUFFIXES),
        got=", ".join(path.name for path in files) or "none",
        hint="Register a bundle or one state dict",
    )


def _from_path(path: Path, folder: Path, max_bytes: int) -> Acquired:
    with reading(path, SourceError, "a file or a bundle folder", denied=AccessDenied):
        if not path.exists():
            raise SourceNotFound(f"{path} is not there", expected="a file or a bundle folder", hint="Check the path")
        # A copy, because what is hashed must be what is loaded, whatever happens to the original.
        target = copy_of(path, folder, max_bytes)
        found = _described(target, path.absolute().as_uri(), "")
        return replace(found, companions=_companions(path.parent)) if path.is_file() else found


def _companions(folder: Path) -> tuple[Path, ...]:
    found = (folder / name for name in COMPANIONS)
    return tuple(path for path in found if path.is_file() and not path.is_symlink())


def _described(path: Path, uri: str, version_id: str) -> Acquired:
    if path.is_dir():
        if not (path / DESCRIPTION).is_file():
            # An image folder; its content is hashed when it is read.
            return Acquired(path, uri, version_id, "", 0)
        size = sum(member.stat().st_size for member in path.rglob("*") if member.is_file())
        return Acquired(path, uri, version_id, sha256_file(path / DESCRIPTION), size)
    return Acquired(path, uri, version_id, sha256_file(path), path.stat().st_size)


def _plain(uri: str) -> str:
    return uri.split("?", maxsplit=1)[0][:120]
