"""What a sweep knows of the registry: one SQLite file, or a temporary one that is gone afterwards.

The file is a memory, never a truth: it is made again from the registry when it is lost, damaged, of
another registry or of another release. It holds one short row a version, so the process stays small
however large the registry is. One transaction spans the listing of the registry: a sweep that breaks off there
leaves the memory of the sweep before. That a promoted version was covered is kept as it is found out, because
verifying all of them may take longer than a sweep is given.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime import registry_tags as tag
from components._runtime.registry_listing import ListedModel, ListedVersion
from defense_core.errors import ConfigError, StorageError
from defense_core.policy_time import parse_time
from pipelines.triggers.keys import source_digest

SQLITE = b"SQLite format 3\0"
"""How every SQLite file begins."""
LAYOUT = "3"
"""Changes with the tables; a file of another layout is made anew."""

UNREADABLE = "unreadable"
"""In place of a policy's digest: evidence that does not say."""

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE models (name TEXT PRIMARY KEY, updated_ms INTEGER NOT NULL, settled INTEGER NOT NULL,
    sweep INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (model TEXT NOT NULL, version INTEGER NOT NULL, created_ms INTEGER NOT NULL,
    source_digest TEXT NOT NULL,
    decision TEXT NOT NULL, reason TEXT NOT NULL, policy TEXT NOT NULL, decided_s REAL NOT NULL,
    artifact TEXT NOT NULL,
    superseded INTEGER NOT NULL, sweep INTEGER NOT NULL, PRIMARY KEY (model, version)) WITHOUT ROWID;
CREATE TABLE origins (model TEXT NOT NULL, version INTEGER NOT NULL, origin_model TEXT NOT NULL,
    origin_version INTEGER NOT NULL, since_ms INTEGER NOT NULL, by_evidence INTEGER NOT NULL,
    PRIMARY KEY (model, version, origin_model, origin_version)) WITHOUT ROWID;
CREATE INDEX by_origin ON origins (origin_model, origin_version);
CREATE INDEX by_artifact ON versions (artifact);
CREATE TABLE proofs (model TEXT NOT NULL, version TEXT NOT NULL, mark TEXT NOT NULL, at_s REAL NOT NULL,
    PRIMARY KEY (model, version)) WITHOUT ROWID;
"""

_OWN = {"facts", "models", "versions", "origins", "proofs", "asked"}
"""Every table of a memory; ``asked`` had only layout 1."""
_UPSERT = """
INSERT INTO versions VALUES (:model, :version, :created_ms, :source_digest, :decision, :reason, :policy, :decided_s,
    :artifact, :superseded, :sweep)
ON CONFLICT (model, version) DO UPDATE SET created_ms = excluded.created_ms,
    source_digest = excluded.source_digest, decision = excluded.decision, reason = excluded.reason,
    artifact = excluded.artifact, superseded = excluded.superseded, sweep = excluded.sweep,
    -- What was once read from the evidence of a version without these tags is not forgotten.
    policy = CASE WHEN excluded.policy = '' THEN policy ELSE excluded.policy END,
    decided_s = CASE WHEN excluded.policy = '' THEN decided_s ELSE excluded.decided_s END
"""
# An address may stand in both of its tags; the later time counts.
_ORIGIN = """
INSERT INTO origins VALUES (?, ?, ?, ?, ?, ?)
ON CONFLICT (model, version, origin_model, origin_version) DO UPDATE SET since_ms = MAX(since_ms, excluded.since_ms)
"""

log = logging.getLogger("quarantine.sweep")


@dataclass(frozen=True)
class KnownModel:
    """What is remembered of a model; ``settled``: none of its versions was on its way."""

    updated_ms: int
    settled: bool


class SweepMemory:
    """See the module. Of one thread."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self.database = database
        self.sweep = int(self.fact("sweep") or 0)

    @classmethod
    def open(cls, path: Path | None, registry: str) -> SweepMemory:
        """The memory at ``path``, made anew where it is none of ``registry``; ``None``: a temporary one.

        Raises:
            StorageError: the file cannot be made or written.
            ConfigError: it is the database of something else.
        """
        if path is None:
            return cls(_fresh("", registry))
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            found = _existing(Path(path), registry)
            return cls(found if found is not None else _fresh(str(path), registry))
        except (OSError, sqlite3.Error) as error:
            raise StorageError(
                f"cannot keep the sweep's memory at {path}", expected="a writable file", got=error, hint="Free space"
            ) from error

    def close(self) -> None:
        """Close the file; what was not committed is forgotten."""
        self.database.close()

    # -- transactions ------------------------------------------------------------------

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The next sweep reads the registry; an exception leaves what the last one knew.

        Raises:
            StorageError: another sweep is at work on this memory.
        """
        try:
            self.database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            raise StorageError(
                "cannot begin the sweep", expected="one sweep at a time", got=error, hint="Wait for the other one"
            ) from error
        try:
            self.sweep += 1
            self.set_fact("sweep", str(self.sweep))
            yield
            self.database.execute("COMMIT")
        except sqlite3.Error as error:
            raise _unkept(error) from error
        finally:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
                self.sweep -= 1

    # -- the registry as it was --------------------------------------------------------

    def known(self, name: str) -> KnownModel | None:
        """The model as the last sweep left it."""
        row = self.database.execute("SELECT updated_ms, settled FROM models WHERE name = ?", (name,)).fetchone()
        return None if row is None else KnownModel(row[0], bool(row[1]))

    def keep_model(self, model: ListedModel) -> None:
        """An unchanged model is still there."""
        self.database.execute("UPDATE models SET sweep = ? WHERE name = ?", (self.sweep, model.name))

    def store_model(self, model: ListedModel, versions: Iterable[ListedVersion], *, quiet_before_ms: float) -> None:
        """All versions of a model, in the place of what was known of it.

        Args:
            quiet_before_ms: a model that changed later is looked at again next time: a second change in the
                same millisecond would not show.
        """
        moving = 0

        def rows() -> Iterator[dict[str, Any]]:
            nonlocal moving
            for version in versions:
                moving += not version.ready or version.decision == tag.PENDING
                if version.ready:
                    for each in version.origins:
                        row = (version.model, version.version, each.model, each.version, each.since_ms, False)
                        self.database.execute(_ORIGIN, row)
                    yield _row(version, self.sweep)

        self.database.execute("DELETE FROM origins WHERE model = ? AND NOT by_evidence", (model.name,))
        self.database.executemany(_UPSERT, rows())
        gone = "DELETE FROM versions WHERE model = ? AND sweep != ?"
        self.database.execute(gone, (model.name, self.sweep))
        settled = not moving and model.updated_ms < quiet_before_ms
        self.database.execute(
            "INSERT OR REPLACE INTO models VALUES (?, ?, ?, ?)", (model.name, model.updated_ms, settled, self.sweep)
        )

    def forget_missing(self) -> None:
        """Drop the models that this sweep did not see, and what is known of versions that are gone."""
        self.database.execute("DELETE FROM models WHERE sweep != ?", (self.sweep,))
        self.database.execute("DELETE FROM versions WHERE model NOT IN (SELECT name FROM models)")
        self.database.execute(
            "DELETE FROM origins WHERE NOT EXISTS (SELECT 1 FROM versions v"
            " WHERE v.model = origins.model AND v.version = origins.version)"
        )
        self.database.execute(
            "DELETE FROM proofs WHERE NOT EXISTS (SELECT 1 FROM versions v"
            " WHERE v.model = proofs.model AND v.version = CAST(proofs.version AS INTEGER))"
        )

    def store_decision(
        self, model: str, version: int, *, policy: str, decided_at: str = "", origin: tuple[str, int] = ("", 0)
    ) -> None:
        """What the evidence of a version without these tags says."""
        self.database.execute(
            "UPDATE versions SET policy = ?, decided_s = MAX(decided_s, ?) WHERE model = ? AND version = ?",
            (policy, _seconds(decided_at, 0.0), model, version),
        )
        if origin[0]:
            created = "SELECT created_ms FROM versions WHERE model = ? AND version = ?"
            for (created_ms,) in self.database.execute(created, (model, version)).fetchall():
                self.database.execute(_ORIGIN, (model, version, *origin, created_ms, True))

    def counts(self) -> tuple[int, int]:
        """How many models and versions there are."""
        models, versions = (
            self.database.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]  # noqa: S608 - names of our own
            for table in ("models", "versions")
        )
        return int(models), int(versions)

    def rows(self, query: str, values: Mapping[str, Any] | tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        """Rows of a query, as they come."""
        yield from self.database.execute(query, values)

    # -- small facts -------------------------------------------------------------------

    def fact(self, name: str) -> str:
        """A remembered fact, or an empty string."""
        row = self.database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return "" if row is None else str(row[0])

    def set_fact(self, name: str, value: str) -> None:
        """Remember a fact."""
        self.database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def proven(self, model: str, version: str, mark: str, *, after_s: float) -> bool:
        """Whether the version was covered under the same circumstances, and later than ``after_s``, unix seconds."""
        query = "SELECT 1 FROM proofs WHERE model = ? AND version = ? AND mark = ? AND at_s > ?"
        return self.database.execute(query, (model, version, mark, after_s)).fetchone() is not None

    def prove(self, proofs: Iterable[tuple[str, str, str]], at_s: float) -> None:
        """Remember that versions were: model, version and mark of each. Kept at once, whatever becomes of the sweep.

        Raises:
            StorageError: they cannot be kept.
        """
        rows = [(*proof, at_s) for proof in proofs]
        try:
            self.database.execute("BEGIN IMMEDIATE")
            self.database.executemany("INSERT OR REPLACE INTO proofs VALUES (?, ?, ?, ?)", rows)
            self.database.execute("COMMIT")
        except sqlite3.Error as error:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise _unkept(error) from error


def _unkept(error: sqlite3.Error) -> StorageError:
    return StorageError(
        "cannot keep the sweep's memory", expected="free space", got=error, hint="Free space, then sweep again"
    )


def _existing(path: Path, registry: str) -> sqlite3.Connection | None:
    """The memory at ``path``; ``None``: there is none that is of use, and its file is gone."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        begins = file.read(len(SQLITE))
    if begins not in (b"", SQLITE):
        raise _something_else(path, "a file that is no database")
    database = sqlite3.connect(path, isolation_level=None, timeout=10)
    try:
        facts = dict(database.execute("SELECT name, value FROM facts WHERE name IN ('layout', 'registry')"))
        (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if facts == {"layout": LAYOUT, "registry": registry} and sound == "ok":
            return database
        why = "it is of another registry or release"
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            raise
        why = str(error)
    except sqlite3.DatabaseError as error:
        why = str(error)
    foreign = _tables(database) - _OWN
    database.close()
    if foreign:
        raise _something_else(path, "tables " + ", ".join(sorted(foreign)[:3]))
    log.warning("the memory at %s is made anew: %s", path, why)
    path.unlink()
    return None


def _something_else(path: Path, got: str) -> ConfigError:
    return ConfigError(
        f"{path} is no memory of a sweep",
        expected="a file of its own for the sweep's memory, which is made anew where it is of no use",
        got=got,
        hint="Name another file by --memory; remove this one if it is a memory that was damaged",
    )


def _tables(database: sqlite3.Connection) -> set[str]:
    """The tables that can be read of; none where the file is damaged."""
    try:
        return {str(name) for (name,) in database.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    except sqlite3.DatabaseError:
        return set()


def _fresh(path: str, registry: str) -> sqlite3.Connection:
    database = sqlite3.connect(path, isolation_level=None, timeout=10)
    database.executescript(_TABLES)
    facts = [("layout", LAYOUT), ("registry", registry)]
    database.executemany("INSERT INTO facts VALUES (?, ?)", facts)
    return database


def _row(version: ListedVersion, sweep: int) -> dict[str, Any]:
    decided = bool(version.decision) and version.decision != tag.PENDING
    return {
        "model": version.model,
        "version": version.version,
        "created_ms": version.creation_timestamp,
        "source_digest": source_digest(version),
        "decision": version.decision,
        "reason": version.reason,
        "policy": version.policy_digest,
        "decided_s": _seconds(version.decided_at, version.creation_timestamp / 1000) if decided else 0.0,
        "artifact": version.artifact,
        "superseded": bool(version.superseded_by),
        "sweep": sweep,
    }


def _seconds(text: str, default: float) -> float:
    """A time as unix seconds; a tag that is no time says nothing."""
    try:
        return parse_time(text, "time").timestamp() if text else default
    except ConfigError:
        return default
