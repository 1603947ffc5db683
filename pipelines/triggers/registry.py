"""What the registry itself says of a version, now. The source is read as text; nothing of it is fetched."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect, mlflow_errors
from defense_core.errors import SourceNotFound

READY, FAILED = "READY", "FAILED_REGISTRATION"


@dataclass(frozen=True)
class Entry:
    """One model version as the registry describes it.

    Attributes:
        status: ``READY``, or what MLflow says of one that is still being registered or failed to be.
        aliases: that point at it now.
    """

    name: str
    version: str
    source: str
    run_id: str
    creation_timestamp: int
    status: str = READY
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


class MlflowRegistry:
    """Asks MLflow; connects when first asked, so that a worker starts while the registry is away."""

    def __init__(self, settings: MlflowSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._connection: MlflowConnection | None = None

    def look_up(self, model: str, version: str) -> Entry | None:
        """The version, or ``None`` where the registry has none of this name and number.

        Raises:
            RegistryUnavailable, AccessDenied: it did not answer, or not to these credentials.
        """
        connection = self._connected()
        try:
            with mlflow_errors(f"look up models:/{model}/{version}", self._settings):
                return entry_of(connection.client.get_model_version(model, version))
        except SourceNotFound:
            return None

    def _connected(self) -> MlflowConnection:
        with self._lock:
            if self._connection is None:
                self._connection = connect(self._settings)
            return self._connection


def entry_of(version: Any) -> Entry:
    """An entry from MLflow's ``ModelVersion``."""
    return Entry(
        name=version.name,
        version=str(version.version),
        source=version.source or "",
        run_id=version.run_id or "",
        creation_timestamp=int(version.creation_timestamp or 0),
        status=str(version.status or READY),
        tags=dict(version.tags or {}),
        aliases=tuple(version.aliases or ()),
    )
