"""Sweep: what webhooks lost, what was moved by hand, what grew old; found by reading the registry.

=====  =============================================  ===============================================
step   what is done                                   what a failure or a kill there leaves
=====  =============================================  ===============================================
1      list the models, and the versions of those     nothing: the memory is as the last sweep left it
       that changed, into the memory, and keep it
2      read the evidence of promoted versions         which of them were covered; they are read again when
                                                      that grows old, each at its own time
3      work out the findings                          nothing was changed
4      enqueue, in batches                            a part of the work is queued; the rest is next time
5      with ``enforce``: move one alias at a time     each alias is where it was, or where it belongs
=====  =============================================  ===============================================

The next sweep begins from the registry again, so each may be repeated.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components._runtime.mlflow_connection import MlflowConnection, without_credentials
from components._runtime.registered_decisions import (
    UNREADABLE,
    Coverage,
    coverage,
    read_version,
    registered_decision,
)
from components._runtime.registry_listing import ListedModel, list_models, list_versions, parse_origin
from components._runtime.registry_prompts import HIDDEN, taken_for_prompts
from defense_core.config import digest, to_mapping
from defense_core.errors import EXIT_FAIL, EXIT_PASS, EXIT_UNKNOWN, AccessDenied, QuarantineError, RegistryUnavailable
from defense_core.policy_time import time_text
from pipelines import sweep_memory
from pipelines.sweep_aliases import AliasMove, Journal, move_back
from pipelines.sweep_findings import KINDS, Finding, Kind, set_scope, unstated, version_findings
from pipelines.sweep_memory import SweepMemory
from pipelines.sweep_queue import Handover, Queued
from pipelines.sweep_scope import Scope

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

    from components._runtime.signing_keys import TrustedSigner
    from pipelines.triggers.queue import Queue

QUIET_MS = 5000
BATCH_MODELS = 200
BATCH_ALIASES = 64
READERS = 4
Guarded = tuple[str, str, str]
"""A model, an alias, and the version that it is on."""
LAST_FULL = "last_full_s"

log = logging.getLogger("quarantine.sweep")


@dataclass(frozen=True)
class SweepSettings:
    """How a sweep goes about it.

    Attributes:
        full_after_s: all models are listed, and a promoted version is read again, after so many seconds; 0: every
            time.
        reopen_after_s: work that was submitted so long ago and left no decision is submitted again, seconds; see
            :class:`pipelines.sweep_queue.Handover`.
        max_enqueued: most work that one sweep hands over; ``None``: all of it.
        max_listed: most findings that the report names; all are counted.
        trusted: whose signature promoted versions must have; ``None``: signatures are not checked.
        approvers: with ``trusted``, whose approvals count: public key by name.
    """

    full_after_s: float = 7 * 86400.0
    reopen_after_s: float = 86400.0
    max_enqueued: int | None = None
    max_listed: int = 1000
    trusted: TrustedSigner | None = None
    approvers: Mapping[str, SSlibKey] = field(default_factory=dict)


@dataclass(frozen=True)
class SweepReport:
    """What a sweep saw and did.

    Attributes:
        registry: its address, without credentials.
        at: when it began, ISO 8601.
        full: whether every model was listed; otherwise those that changed.
        models, versions: how many there are.
        listed: how many models were listed.
        found: findings by kind.
        findings: the first of them.
        queued: what became of the work.
        moves: aliases that were moved, or would have been but for a change meanwhile.
        seconds: how long it took.
    """

    registry: str
    at: str
    full: bool
    models: int
    versions: int
    listed: int
    found: dict[str, int]
    findings: tuple[Finding, ...]
    queued: Queued
    moves: tuple[AliasMove, ...]
    seconds: float

    @property
    def exit_code(self) -> int:
        """0: nothing found; 1: findings; 2: of some aliases or models it could not be found out."""
        if self.found["unknown"] or any(move.state == "undecided" for move in self.moves):
            return EXIT_UNKNOWN
        return EXIT_FAIL if any(self.found.values()) else EXIT_PASS

    def to_mapping(self) -> dict[str, Any]:
        """JSON types."""
        return {"schema": 1, **to_mapping(self), "exit_code": self.exit_code}


@dataclass
class _Read:
    """What steps 1 and 2 found."""

    full: bool
    listed: int = 0
    guarded: list[Guarded] = field(default_factory=list)
    drift: list[Finding] = field(default_factory=list)


def sweep(
    connection: MlflowConnection,
    memory: SweepMemory,
    scope: Scope,
    settings: SweepSettings | None = None,
    *,
    queue: Queue | None = None,
    journal: Journal | None = None,
    clock: Callable[[], float] = time.time,
) -> SweepReport:
    """Look through the registry once.

    Args:
        queue: where work goes; ``None``: nothing is enqueued.
        journal: with it, drifted aliases are moved back, and each move is written there; ``None``: none is moved.
        clock: unix seconds.

    Raises:
        RegistryUnavailable, AccessDenied: MLflow does not answer; see the module for what is left.
        StorageError: the memory or the journal cannot be written, or another sweep is at work on them.
    """
    settings = settings or SweepSettings()
    begun, now_s = time.monotonic(), clock()
    with memory.reading():
        read = _read_registry(connection, memory, scope, settings, now_s)
    read.drift += _alias_findings(connection, memory, scope, settings, read.guarded, now_s=now_s)
    read.drift += _hidden_findings(connection, scope)
    found: dict[str, int] = dict.fromkeys(KINDS, 0)
    listed: list[Finding] = []

    def count(finding: Finding) -> None:
        found[finding.kind] += 1
        if len(listed) < settings.max_listed:
            listed.append(finding)

    findings = chain(read.drift, version_findings(memory, now_s))
    handover = Handover(queue, settings.reopen_after_s, settings.max_enqueued, now_s, scope.observing)
    queued = handover.take(findings, count)
    moves = tuple(
        move_back(connection, memory, scope, each, journal, trusted=settings.trusted, approvers=settings.approvers)
        for each in read.drift
        if journal is not None and each.kind == "drift"
    )
    models, versions = memory.counts()
    report = SweepReport(
        registry=_registry(connection),
        at=_time(now_s),
        full=read.full,
        models=models,
        versions=versions,
        listed=read.listed,
        found=found,
        findings=tuple(listed),
        queued=queued,
        moves=moves,
        seconds=round(time.monotonic() - begun, 3),
    )
    log.info("%s models, %s versions, %s listed; found %s; %s", models, versions, read.listed, found, queued)
    return report


def open_memory(connection: MlflowConnection, path: Path | None) -> SweepMemory:
    """The memory of this registry at ``path``; ``None``: a temporary one. Raises StorageError."""
    return SweepMemory.open(path, _registry(connection))


# -- steps 1 and 2 ---------------------------------------------------------------------


def _read_registry(
    connection: MlflowConnection, memory: SweepMemory, scope: Scope, settings: SweepSettings, now_s: float
) -> _Read:
    read = _Read(full=now_s - float(memory.fact(LAST_FULL) or 0) >= settings.full_after_s)
    changed: list[ListedModel] = []
    for model in list_models(connection):
        for alias in sorted(scope.guarded(model.name).keys() & model.aliases.keys()):
            read.guarded.append((model.name, alias, model.aliases[alias]))
        known = memory.known(model.name)
        if not read.full and known is not None and known.settled and known.updated_ms == model.updated_ms:
            memory.keep_model(model)
        else:
            changed.append(model)
        if len(changed) == BATCH_MODELS:
            read.listed += _read_models(connection, memory, changed, now_s)
            changed = []
    read.listed += _read_models(connection, memory, changed, now_s)
    memory.forget_missing()
    if read.full:
        memory.set_fact(LAST_FULL, str(now_s))
    set_scope(memory, scope, now_s)
    for name, number in unstated(memory):
        _read_evidence(connection, memory, name, number)
    return read


def _read_models(connection: MlflowConnection, memory: SweepMemory, models: Sequence[ListedModel], now_s: float) -> int:
    """List the versions of ``models``; how many models that were."""
    by_name = {model.name: model for model in models}
    for name, versions in list_versions(connection, list(by_name)):
        memory.store_model(by_name[name], versions, quiet_before_ms=now_s * 1000 - QUIET_MS)
    return len(models)


def _read_evidence(connection: MlflowConnection, memory: SweepMemory, name: str, number: int) -> None:
    """What a version of an earlier release does not say by tags."""
    version = read_version(connection, name, number)
    if version is None:
        return
    try:
        found = registered_decision(connection, version)
    except (AccessDenied, RegistryUnavailable):
        read_version(connection, name, number)  # raises where it is MLflow that went away
        return  # asked again next time
    except UNREADABLE:
        memory.store_decision(name, number, policy=sweep_memory.UNREADABLE)
        return
    except QuarantineError:
        raise
    except Exception:
        log.exception("the evidence of models:/%s/%s cannot be read", name, number)
        return  # the same: one version must not hide all others
    decision = found.folder.decision
    memory.store_decision(
        name,
        number,
        policy=decision.policy_digest,
        decided_at=decision.decided_at or "",
        origin=parse_origin(found.origin),
    )


def _alias_findings(
    connection: MlflowConnection,
    memory: SweepMemory,
    scope: Scope,
    settings: SweepSettings,
    guarded: Sequence[Guarded],
    *,
    now_s: float,
) -> Iterator[Finding]:
    """Aliases that no allow decision covers; which ones one covers is kept as it is found out.

    Evidence is many small requests: a few versions are read at a time. To be verified a version is downloaded whole,
    with what it was made from: one at a time.
    """

    def judged(each: tuple[Guarded, Any]) -> Coverage:
        (name, alias, _), version = each
        policies = scope.guarded(name)[alias]
        return coverage(connection, version, policies=policies, trusted=settings.trusted, approvers=settings.approvers)

    trusted = settings.trusted.mark() if settings.trusted is not None else ""
    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(guarded), BATCH_ALIASES):
            batch = guarded[start : start + BATCH_ALIASES]
            versions = list(pool.map(lambda each: read_version(connection, each[0], each[2]), batch))
            pairs = zip(batch, versions, strict=True)
            marks = [_mark(scope, trusted, settings.approvers, each, version) for each, version in pairs]
            unproven = [
                (each, version, mark)
                for each, version, mark in zip(batch, versions, marks, strict=True)
                if version is None or not memory.proven(each[0], each[2], mark, after_s=now_s - settings.full_after_s)
            ]
            for group in [unproven] if settings.trusted is None else [[each] for each in unproven]:
                answers = list(pool.map(judged, [(each, version) for each, version, _ in group]))
                judgements = list(zip(group, answers, strict=True))
                memory.prove([(each[0], each[2], mark) for (each, _, mark), got in judgements if got.covered], now_s)
                for ((name, alias, number), _, _), answer in judgements:
                    if not answer.covered:
                        kind: Kind = "unknown" if answer.gap == "unknown" else "drift"
                        yield Finding(kind, name, number, answer.why, alias=alias)


def _hidden_findings(connection: MlflowConnection, scope: Scope) -> Iterator[Finding]:
    """Models that this sweep should look at and that MLflow does not show."""
    for name in taken_for_prompts(connection):
        if scope.demand(name) is not None or scope.is_output(name):
            yield Finding("unknown", name, "", HIDDEN)


def _mark(scope: Scope, trusted: str, approvers: Mapping[str, SSlibKey], guarded: Guarded, version: Any) -> str:
    """Changes with everything that a proof rests on but the files."""
    name, alias, _ = guarded
    tags = {key: value for key, value in (version.tags if version else {}).items() if key.startswith("quarantine.")}
    keys = {who: str(key.keyid) for who, key in approvers.items()}
    return digest([tags, sorted(scope.guarded(name)[alias]), trusted, keys])


def _registry(connection: MlflowConnection) -> str:
    return without_credentials(connection.settings.registry_uri or connection.settings.tracking_uri)


def _time(unix_s: float) -> str:
    return time_text(datetime.fromtimestamp(unix_s, UTC))
