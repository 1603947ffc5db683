"""Promotion statements in MLflow: beside the files of the version, in the run that keeps them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.registered_files import RegisteredModel, download_files
from components._runtime.registered_names import require_usable
from components._runtime.run_election import TrackedRun
from components._runtime.tracking import log_files
from defense_core.errors import EvidenceMismatch, SourceNotFound
from defense_core.files import write_atomic

FOLDER = "promotions"
MAX_BYTES = 16 << 20


def keep_promotion(connection: MlflowConnection, run: TrackedRun, promoted: Mapping[str, Any], envelope: bytes) -> None:
    """Put the statement of a promotion into ``run``; one that is there stays: later runs repeat the work, not the move.

    Args:
        promoted: ``results`` of promote.

    Raises:
        ConfigError: its name or alias is none that the registry takes; they become names of files.
        EvidenceMismatch: it lacks one of them, or its version is no number.
    """
    missing = [key for key in ("name", "alias", "version") if key not in promoted]
    if missing:
        raise EvidenceMismatch("evidence promote is damaged", expected=", ".join(missing), got="nothing")
    require_usable(str(promoted["name"]), str(promoted["alias"]), {})
    if not re.fullmatch(r"[0-9]{1,18}", str(promoted["version"])):
        raise EvidenceMismatch(
            "evidence promote names no version", expected="a version's number", got=repr(promoted["version"])[:80]
        )
    folder, file = _folder(str(promoted["name"]), str(promoted["version"])), f"{promoted['alias']}.json"
    with mlflow_errors(f"list {folder} of the run {run.run_id}", connection.settings):
        present = {item.path for item in connection.client.list_artifacts(run.run_id, folder)}
    if f"{folder}/{file}" in present:
        return
    with tempfile.TemporaryDirectory(prefix="quarantine-promotion-") as scratch:
        write_atomic(Path(scratch) / file, envelope)
        log_files(connection, run, Path(scratch) / file, folder)


def kept_promotions(connection: MlflowConnection, registered: RegisteredModel) -> dict[str, bytes]:
    """The statements of the promotions of a version, by the name of their file; none where none was kept.

    Raises:
        ArtifactTooLarge, UnsafeArtifact, RegistryConflict, RegistryUnavailable: they cannot be downloaded.
    """
    if not registered.run_id:
        return {}
    folder = _folder(registered.name, registered.version)
    what = f"{folder} of the run {registered.run_id}"
    try:
        with (
            mlflow_errors(f"download {what}", connection.settings),
            tempfile.TemporaryDirectory(prefix="quarantine-promotion-") as scratch,
        ):
            uri = str(connection.client.get_run(registered.run_id).info.artifact_uri)
            names = download_files(connection, uri, Path(scratch), what, max_bytes=MAX_BYTES, part=folder)
            return {name: (Path(scratch) / name).read_bytes() for name in names}
    except SourceNotFound:
        # Nothing was kept, or the run is gone.
        return {}


def _folder(name: str, version: str) -> str:
    return f"{FOLDER}/{name}/{version}"
