"""What is wrong in the registry, as queries over the sweep's memory."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pipelines.sweep_memory import SweepMemory
from pipelines.sweep_scope import Scope
from pipelines.triggers.keys import WorkKey

Kind = Literal["undecided", "aged", "fruitless", "drift", "unknown"]
KINDS: tuple[Kind, ...] = ("undecided", "aged", "fruitless", "drift", "unknown")


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: ``undecided``: no decision under the current policy; ``aged``: the decision is older than the
            policy permits; ``fruitless``: one of these, whose runs left no decision so often that no further one is
            submitted; ``drift``: an alias that no allow decision covers; ``unknown``: an alias of which
            that could not be found out, or, without an alias and a version, a model that could not be looked at.
        alias: of drift and unknown.
        why: a sentence.
        work: what would settle it; ``None``: no run can.
        old_since_s: of aged: since when, unix seconds.
    """

    kind: Kind
    model: str
    version: str
    why: str
    alias: str = ""
    work: WorkKey | None = None
    old_since_s: float | None = None


_TABLES = {
    "demands": "(model TEXT PRIMARY KEY, policy TEXT NOT NULL, cutoff_s REAL NOT NULL) WITHOUT ROWID",
    "outputs": "(model TEXT PRIMARY KEY) WITHOUT ROWID",
    "output_demands": "(model TEXT NOT NULL, policy TEXT NOT NULL, cutoff_s REAL NOT NULL,"
    " PRIMARY KEY (model, policy)) WITHOUT ROWID",
}

# A version under a name that was deleted and used again is younger than its namesake's decisions.
_OF = (
    "o.origin_model = v.model AND o.origin_version = v.version AND o.since_ms >= v.created_ms"
    " AND d.model = o.model AND d.version = o.version"
)
# Versions that were abandoned have no decision; what was found damaged had one, and needs a person.
_DECIDED = "(d.decision = 'allow' OR (d.decision = 'quarantined' AND d.reason != 'abandoned'))"
_OUTPUT = "d.model IN (SELECT model FROM outputs)"
_INCOMING = "NOT (v.decision != '' AND v.model IN (SELECT model FROM outputs))"

_UNDECIDED = f"""
SELECT v.model, v.version, v.source_digest, n.policy,
    EXISTS (SELECT 1 FROM origins o, versions d WHERE {_OF} AND {_OUTPUT} AND d.decision = 'pending'),
    EXISTS (SELECT 1 FROM origins o, versions d WHERE {_OF} AND {_OUTPUT} AND {_DECIDED})
FROM demands n JOIN versions v ON v.model = n.model
WHERE {_INCOMING}
    AND NOT EXISTS (SELECT 1 FROM origins o, versions d
        WHERE {_OF} AND {_OUTPUT} AND d.policy = n.policy AND {_DECIDED})
ORDER BY v.model, v.version
"""  # noqa: S608 - parts of our own
_AGED = f"""
SELECT v.model, v.version, v.source_digest, n.policy, MAX(d.decided_s) AS decided_s, n.cutoff_s
FROM demands n JOIN versions v ON v.model = n.model JOIN origins o JOIN versions d ON {_OF}
WHERE {_INCOMING} AND {_OUTPUT} AND d.policy = n.policy AND {_DECIDED}
GROUP BY v.model, v.version HAVING MAX(d.decided_s) < n.cutoff_s
ORDER BY v.model, v.version
"""  # noqa: S608
_OUTSIDE = f"""
SELECT d.model, d.version, EXISTS (SELECT 1 FROM output_demands n WHERE n.model = d.model AND n.policy = d.policy),
    d.decided_s
FROM versions d
WHERE {_OUTPUT} AND d.decision = 'allow' AND NOT d.superseded
    AND NOT EXISTS (SELECT 1 FROM origins o, versions v WHERE {_OF} AND {_INCOMING})
    AND NOT EXISTS (SELECT 1 FROM versions later WHERE later.artifact = d.artifact AND later.model = d.model
        AND later.decision = 'allow' AND later.version > d.version)
    AND NOT EXISTS (SELECT 1 FROM output_demands n WHERE n.model = d.model AND n.policy = d.policy
        AND d.decided_s >= n.cutoff_s)
    AND EXISTS (SELECT 1 FROM output_demands n WHERE n.model = d.model)
ORDER BY d.model, d.version
"""  # noqa: S608
_CANDIDATES = """
SELECT version FROM versions WHERE model = ? AND decision = 'allow' AND NOT superseded ORDER BY version DESC
"""
_UNSTATED = f"""
SELECT d.model, d.version FROM versions d
WHERE {_OUTPUT} AND d.decision NOT IN ('', 'pending') AND d.policy = '' ORDER BY d.model, d.version
"""  # noqa: S608

_ADDRESSABLE = re.compile(r"[^/@:]{1,250}")


def set_scope(memory: SweepMemory, scope: Scope, now_s: float) -> None:
    """Work out for every model what its versions need at the time ``now_s``, unix seconds."""
    for table, columns in _TABLES.items():
        memory.database.execute(f"DROP TABLE IF EXISTS temp.{table}")
        memory.database.execute(f"CREATE TEMP TABLE {table} {columns}")
    names = [name for (name,) in memory.rows("SELECT name FROM models")]
    for name in names:
        demand = scope.demand(name)
        if demand is not None:
            cutoff = 0.0 if demand.max_age_s is None else now_s - demand.max_age_s
            memory.database.execute("INSERT INTO demands VALUES (?, ?, ?)", (name, demand.policy, cutoff))
        if scope.is_output(name):
            memory.database.execute("INSERT INTO outputs VALUES (?)", (name,))
            for each in scope.output_demands(name):
                cutoff = 0.0 if each.max_age_s is None else now_s - each.max_age_s
                row = (name, each.policy, cutoff)
                memory.database.execute("INSERT OR REPLACE INTO output_demands VALUES (?, ?, ?)", row)


def unstated(memory: SweepMemory) -> list[tuple[str, int]]:
    """Decided versions of earlier releases, whose tags do not name the policy."""
    return [(model, version) for model, version in memory.rows(_UNSTATED)]


def candidates(memory: SweepMemory, model: str) -> Iterator[int]:
    """Versions of ``model`` whose tags say allow, highest number first."""
    yield from (version for (version,) in memory.rows(_CANDIDATES, (model,)))


def version_findings(memory: SweepMemory, now_s: float) -> Iterator[Finding]:
    """Versions without a current decision, as they come; :func:`set_scope` was called before."""
    for model, version, source, policy, pending, other in memory.rows(_UNDECIDED):
        if pending:
            why = "Its promotion was begun and not finished."
        else:
            why = "It was decided by another policy." if other else "It was never decided."
        yield _finding("undecided", model, version, why, WorkKey(model, str(version), source, policy))
    for model, version, source, policy, decided_s, cutoff_s in memory.rows(_AGED):
        work = WorkKey(model, str(version), source, policy)
        found = _finding("aged", model, version, _age(now_s - decided_s), work)
        yield replace(found, old_since_s=now_s - cutoff_s + decided_s)
    for model, version, current, decided_s in memory.rows(_OUTSIDE):
        why = _age(now_s - decided_s) if current else "It was decided by another policy."
        why += " Its source is no version of this registry: submit it again."
        yield Finding("aged" if current else "undecided", model, str(version), why)


def _finding(kind: Kind, model: str, version: int, why: str, work: WorkKey) -> Finding:
    if not _ADDRESSABLE.fullmatch(model):
        return Finding(kind, model, str(version), why + " No models:/ address can name it: rename the model.")
    return Finding(kind, model, str(version), why, work=work)


def _age(seconds: float) -> str:
    return f"It was decided {seconds / 86400:.1f} days ago, longer than its policy permits."
