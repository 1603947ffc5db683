"""The files behind a model version: listed, limited, downloaded and hashed by ourselves.

A registry entry is a hint, not a promise: any writer of the registry can set any source and any
tag. So the source's scheme is checked, the size is checked before the download, and every byte is
hashed after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors, without_credentials
from components._runtime.registered_sources import (
    require_allowed_source,
    require_mounted,
    require_stated_source,
    require_store,
)
from defense_core.config import digest
from defense_core.errors import (
    AccessDenied,
    ArtifactTooLarge,
    ConfigError,
    RegistryConflict,
    RegistryUnavailable,
    SourceNotFound,
    UnsafeArtifact,
)
from defense_core.files import atomic_directory, reading, sha256_file

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MAX_FILES = 10_000
MAX_DEPTH = 16

Manifest = Mapping[str, str]
"""Path below a folder, with ``/``, to ``"sha256:<hex>"``."""

_MODEL_URI = re.compile(r"models:/(?P<name>[^/@:]{1,250})(?:/(?P<version>[0-9]{1,9})|@(?P<alias>[\w-]{1,255}))")


@dataclass(frozen=True)
class RegisteredModel:
    """A model version that was downloaded.

    Attributes:
        name: the registered model.
        version: its number.
        source: what the registry names as its source, without credentials.
        address: where its files lay when they were read, run and logged model looked up; without credentials.
        run_id: the run that made it; may be empty.
        tags: as the registry says now; a hint only.
        path: the local folder.
        manifest: every file's digest, computed from the downloaded bytes.
    """

    name: str
    version: str
    source: str
    address: str
    run_id: str
    tags: Mapping[str, str]
    path: Path
    manifest: Manifest

    @property
    def uri(self) -> str:
        """``models:/name/version``, which never means another version later."""
        return f"models:/{self.name}/{self.version}"

    @property
    def digest(self) -> str:
        """One digest over all names and contents."""
        return digest(dict(self.manifest))


def resolve_model_uri(connection: MlflowConnection, uri: str, destination: Path, *, max_bytes: int) -> RegisteredModel:
    """Download the version that ``uri`` names into the new folder ``destination``.

    Args:
        uri: ``models:/name/3`` or ``models:/name@alias``.
        max_bytes: limit for all files together, checked on the listing and on what arrived.

    Raises:
        ConfigError: ``uri`` has another form.
        SourceNotFound: no such model, version or alias, or it holds no files.
        ArtifactTooLarge: more than ``max_bytes``.
        UnsafeArtifact: its source is a place that must not be read for a stranger.
        RegistryUnavailable: MLflow does not answer.
        OutputExists: ``destination`` is in use.
        StorageError: the disk is full.
    """
    match = _MODEL_URI.fullmatch(uri)
    if match is None:
        raise ConfigError(
            f"model address {uri} is not usable",
            expected="models:/name/3 or models:/name@alias",
            got=uri,
            hint="Name a version or an alias; stages and 'latest' are not supported",
        )
    with mlflow_errors(f"look up {uri}", connection.settings):
        number = match["version"] or _aliased(connection, match["name"], match["alias"])
        version = connection.client.get_model_version(match["name"], number)
    with atomic_directory(destination) as folder:
        address, manifest = _downloaded(connection, version, folder, max_bytes=max_bytes)
    return RegisteredModel(
        name=version.name,
        version=str(version.version),
        source=without_credentials(version.source),
        address=without_credentials(address),
        run_id=version.run_id or "",
        tags=dict(version.tags),
        path=destination,
        manifest=manifest,
    )


def _aliased(connection: MlflowConnection, name: str, alias: str) -> str:
    aliases = connection.client.get_registered_model(name).aliases
    if alias not in aliases:
        raise SourceNotFound(
            f"models:/{name}@{alias} does not exist",
            expected=", ".join(sorted(aliases)) or "a model with an alias",
            got=alias,
            hint="Check the alias, or name a version",
        )
    return str(aliases[alias])


def download_version(
    connection: MlflowConnection, version: ModelVersion, folder: Path, *, max_bytes: int, part: str = ""
) -> Manifest:
    """Download a version's files into ``folder``, which exists and is empty; their digests.

    Args:
        part: only this folder of the version (``evidence``); by default all of it.

    Raises:
        as :func:`resolve_model_uri`.
    """
    return _downloaded(connection, version, folder, max_bytes=max_bytes, part=part)[1]


def _downloaded(
    connection: MlflowConnection, version: ModelVersion, folder: Path, *, max_bytes: int, part: str = ""
) -> tuple[str, Manifest]:
    """Where a version's files lay, and their digests in ``folder``; see :func:`download_version`."""
    what = f"models:/{version.name}/{version.version}"
    with mlflow_errors(f"download {what}", connection.settings):
        address = _files_address(connection, version, what)
        return address, download_files(connection, address, folder, what, max_bytes=max_bytes, part=part)


def download_files(
    connection: MlflowConnection, uri: str, folder: Path, what: str, *, max_bytes: int, part: str = ""
) -> Manifest:
    """Download what lies below ``uri`` of an artifact store into the empty ``folder``; digests by name.

    Args:
        what: names it in messages.
        part: only this folder below ``uri``; by default all of it.

    Raises:
        SourceNotFound, ArtifactTooLarge, UnsafeArtifact, RegistryConflict: as :func:`resolve_model_uri`.
        RegistryUnavailable: the store is not there, or cannot be read.
        AccessDenied: this account may not read it.
    """
    require_allowed_source(uri, connection.settings, what)
    require_mounted(uri, what)
    repository = _repository(connection, uri)
    with reading(without_credentials(uri), RegistryUnavailable, "a readable folder", denied=AccessDenied):
        sizes = _listing(repository, what, part)
    if not sizes:
        require_store(uri, what, lambda address: _repository(connection, address).list_artifacts())
        raise SourceNotFound(
            f"{what} holds no files",
            expected="a folder with a model",
            got="nothing",
            hint="Its artifacts were deleted, or never uploaded",
        )
    _require_size(what, sum(sizes.values()), max_bytes)
    arrived = 0
    for path in sorted(sizes):
        _download(repository, path, folder, what)
        # What the store said of their sizes is its own claim.
        arrived += (folder / path).stat().st_size
        _require_size(what, arrived, max_bytes)
    return folder_manifest(folder)


def folder_manifest(folder: Path) -> dict[str, str]:
    """The digest of every file below ``folder``.

    Raises:
        UnsafeArtifact: it holds a symbolic link or something that is no plain file.
    """
    manifest = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_dir() or path.is_file()):
            raise UnsafeArtifact(
                f"{path} is not a plain file", expected="files and folders", got="a link or device", hint="Remove it"
            )
        if path.is_file():
            manifest[path.relative_to(folder).as_posix()] = sha256_file(path)
    return manifest


def manifest_differences(expected: Manifest, got: Manifest) -> list[str]:
    """What differs, one clause a file: changed, missing or unexpected."""
    names = sorted({*expected, *got})
    kinds = {name: _difference(expected.get(name), got.get(name)) for name in names}
    return [f"{name} {kind}" for name, kind in kinds.items() if kind]


def _difference(expected: str | None, got: str | None) -> str:
    if expected == got:
        return ""
    if got is None:
        return "missing"
    return "unexpected" if expected is None else "changed"


def _files_address(connection: MlflowConnection, version: ModelVersion, what: str) -> str:
    """Where a version's files are in their artifact store.

    ``models:/`` and ``runs:/`` are resolved with this client: MLflow's own resolution of them asks
    whatever registry is globally configured.

    Raises:
        UnsafeArtifact: the registry names a place that must not be read, or a path out of a run's files.
    """
    client = connection.client
    uri = str(client.get_model_version_download_uri(version.name, version.version))
    if uri.startswith("models:/m-"):
        uri = str(client.get_logged_model(uri.removeprefix("models:/")).artifact_location)
    elif uri.startswith("runs:/"):
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        _require_safe_path(path, what)
        if any(character in path for character in "%?#"):
            # MLflow reads what stands behind an artifact store as an address: "%2e%2e" would be "..".
            raise _outside(path, what)
        uri = f"{client.get_run(run_id).info.artifact_uri}/{path}"
    else:
        require_stated_source(uri, connection.settings, what)
    return uri


def _listing(repository: Any, what: str, part: str = "") -> dict[str, int]:
    """Every file's size in bytes, 0 where the store does not say; empty where there are none."""
    sizes: dict[str, int] = {}
    folders: list[str | None] = [part or None]
    while folders:
        for item in repository.list_artifacts(folders.pop()):
            _require_safe_path(item.path, what)
            if item.is_dir:
                folders.append(item.path)
            else:
                sizes[item.path] = item.file_size or 0
        if len(sizes) + len(folders) > MAX_FILES:
            raise ArtifactTooLarge(
                f"{what} holds too many files", expected=f"at most {MAX_FILES}", got="more", hint="Pack it differently"
            )
    return sizes


def _repository(connection: MlflowConnection, uri: str) -> Any:
    """MLflow's access to the artifact store at ``uri``. Raises RegistryUnavailable: its client is not installed."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        return get_artifact_repository(uri, tracking_uri=connection.settings.tracking_uri)
    except ImportError as error:
        raise RegistryUnavailable(
            f"the artifact store at {without_credentials(uri)} cannot be read from here",
            expected="the packages that MLflow reads such a store with",
            got=error,
            hint="Install them in the image, see docs/registry.md, or let MLflow's server proxy its artifacts",
        ) from error


def _require_safe_path(path: str, what: str) -> None:
    pure = PurePosixPath(path)
    hidden = any(ord(character) < 32 or character == "\\" for character in path)
    if pure.is_absolute() or ".." in pure.parts or hidden or len(pure.parts) > MAX_DEPTH:
        raise _outside(path, what)


def _outside(path: str, what: str) -> UnsafeArtifact:
    return UnsafeArtifact(
        f"{what} names a file outside its folder",
        expected="plain relative paths",
        got=repr(path),
        hint="Do not use this version; tell the owner of the registry",
    )


def _download(repository: Any, path: str, folder: Path, what: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        repository.download_artifacts(path, dst_path=str(folder))
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        raise UnsafeArtifact(
            f"{path} of {what} leads out of its folder",
            expected="a plain file",
            got="a link, which the artifact store refuses to follow",
            hint="Do not use this version; tell the owner of the registry",
        ) from error
    arrived = folder / path
    if arrived.is_symlink() or not arrived.is_file():
        raise RegistryConflict(
            f"{path} of {what} did not arrive as a file",
            expected="a plain file, as listed",
            got="a link or folder" if arrived.exists() or arrived.is_symlink() else "nothing",
            hint="The version changed during the download; run again",
        )


def _require_size(what: str, size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ArtifactTooLarge(
            f"{what} is too large",
            expected=f"at most {max_bytes} bytes",
            got=f"{size_bytes} bytes",
            hint="Raise max_bytes if you trust it",
        )
