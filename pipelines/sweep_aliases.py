"""Moving a drifted alias back, one request at a time, with a journal."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, BinaryIO, Literal

from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.registered_decisions import Coverage, coverage, read_version
from components._runtime.registry_listing import get_aliases
from defense_core.config import to_mapping
from defense_core.errors import StorageError
from defense_core.policy_time import time_text
from pipelines.sweep_findings import Finding, candidates
from pipelines.sweep_memory import SweepMemory
from pipelines.sweep_scope import Scope

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

    from components._runtime.signing_keys import TrustedSigner

State = Literal["intended", "moved", "removed", "overtaken", "undecided"]

log = logging.getLogger("quarantine.sweep")


@dataclass(frozen=True)
class AliasMove:
    """One alias and what was done about it.

    Attributes:
        origin: the version that it was on.
        target: the version that it belongs on; empty: none, it is removed.
        why: what was wrong with ``origin``.
        state: ``intended`` (only in the journal), ``moved``, ``removed``; ``overtaken``: somebody moved it
            meanwhile; ``undecided``: whether another version is covered could not be found out, so it stays.
    """

    model: str
    alias: str
    origin: str
    target: str
    why: str
    state: State


class Journal:
    """Moves as JSON lines, each on the disk before the next request is sent.

    An ``intended`` line without a line after it is a move that was cut off; the registry says whether it happened.
    """

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path = Path(path)
        self.now = now

    def write(self, move: AliasMove) -> None:
        """Append a line. Raises StorageError: it could not be kept, and the move must not be made."""
        line = json.dumps({"at": time_text(self.now()), **to_mapping(move)}, sort_keys=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                file.write(_break_after(file) + line.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(
                f"cannot write the journal {self.path}",
                expected="a writable file with free space",
                got=error,
                hint="No further alias is moved; free space, then sweep again",
            ) from error


def _break_after(file: BinaryIO) -> bytes:
    """A line break, where a full disk cut off the last line: it must not take this one with it."""
    if not file.seek(0, os.SEEK_END):
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def move_back(
    connection: MlflowConnection,
    memory: SweepMemory,
    scope: Scope,
    finding: Finding,
    journal: Journal,
    *,
    trusted: TrustedSigner | None = None,
    approvers: Mapping[str, SSlibKey] = MappingProxyType({}),
) -> AliasMove:
    """Put the alias of ``finding`` on the last version that an allow decision covers, or remove it.

    It is looked at again right before: an alias that somebody moved meanwhile stays where it is now.
    MLflow has no conditional write, so a move within that one request's time is lost; the next sweep sees it.

    Raises:
        RegistryUnavailable, AccessDenied: MLflow does not answer; the alias is where it was, or where it belongs.
        StorageError: the journal cannot be written; the alias is where it was.
    """
    model, alias = finding.model, finding.alias
    policies = scope.guarded(model)[alias]

    def judge(number: int) -> Coverage:
        version = read_version(connection, model, number)
        return coverage(connection, version, policies=policies, trusted=trusted, approvers=approvers)

    target = _target(memory, finding, judge)
    move = AliasMove(model, alias, finding.version, target or "", finding.why, "intended")
    if target is None:
        return _done(journal, replace(move, state="undecided"))
    if get_aliases(connection, model).get(alias) != finding.version:
        return _done(journal, replace(move, state="overtaken"))
    journal.write(move)
    with mlflow_errors(f"move the alias {alias} of {model}", connection.settings):
        if target:
            connection.client.set_registered_model_alias(model, alias, target)
            connection.client.set_model_version_tag(model, target, tag.ALIAS_PREFIX + alias, tag.ALIAS_SET)
        else:
            connection.client.delete_registered_model_alias(model, alias)
    return _done(journal, replace(move, state="moved" if target else "removed"))


def _target(memory: SweepMemory, finding: Finding, judge: Callable[[int], Coverage]) -> str | None:
    """The version that the alias belongs on; empty: none; ``None``: that could not be found out."""
    for number in candidates(memory, finding.model):
        if str(number) == finding.version:
            continue
        judged = judge(number)
        if judged.covered:
            return str(number)
        if judged.gap == "unknown":
            return None
    return ""


def _done(journal: Journal, move: AliasMove) -> AliasMove:
    journal.write(move)
    log.warning(
        "alias %s of %s was on version %s (%s): %s %s",
        *(move.alias, move.model, move.origin, move.why, move.state, move.target),
    )
    return move
