"""Tables of the queue, and engines for SQLite and PostgreSQL."""

from __future__ import annotations

import sqlite3
from contextlib import closing, suppress
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    inspect,
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError

from defense_core.errors import ConfigError

MAX_NAME_CHARS = 256
"""Longest name of a registered model that MLflow's own database holds."""

BUSY_TIMEOUT_S = 10.0
POSTGRESQL_WAITS: dict[str, Any] = {
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 20000,
    "options": "-c statement_timeout=10000 -c lock_timeout=10000",
}
"""libpq's: a database that hangs, or a network that swallows packets, must not hold a caller."""
WAL_PAGES = 250
"""SQLite folds its log into the file at this size, 1 MB: a log that fills a small disk could no longer be folded."""

metadata = MetaData()

_number = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only an INTEGER key by itself

deliveries = Table(
    "deliveries",
    metadata,
    Column("delivery_id", String(64), primary_key=True),
    Column("received_at", Float, nullable=False),
    Index("deliveries_by_time", "received_at"),
)
"""Ids that were accepted, kept for as long as a replay could pass the timestamp window."""

hints = Table(
    "hints",
    metadata,
    Column("model", String(MAX_NAME_CHARS), primary_key=True),
    Column("version", String(16), primary_key=True),
    Column("seen", Integer, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Float, nullable=False),
    Index("hints_by_due", "due_at"),
)
"""Versions that the registry is to be asked about. ``seen`` grows with every delivery."""

work = Table(
    "work",
    metadata,
    Column("id", _number, primary_key=True, autoincrement=True),
    Column("key", String(71), nullable=False),
    Column("model", String(MAX_NAME_CHARS), nullable=False),
    Column("version", String(16), nullable=False),
    Column("source_digest", String(71), nullable=False),
    Column("policy_digest", String(71), nullable=False),
    Column("origin", String(16), nullable=False),
    Column("round", Integer, nullable=False),
    Column("since_round", Integer, nullable=False, server_default="0"),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("due_at", Float, nullable=False),
    Column("claim", String(32), nullable=False),
    Column("run_id", String(256), nullable=False),
    Column("error", Text, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("changed_at", Float, nullable=False),
    UniqueConstraint("key", name="one_row_per_key"),
    Index("work_by_state", "state", "due_at"),
)
"""One row for each key, for ever: it is what makes a later request for the same work a repetition. ``since_round`` is
the round that the present need began with: what was submitted before it led to a decision."""


def open_engine(url: str, *, durable: bool = True) -> Engine:
    """An engine for ``url``, with the tables created.

    Args:
        url: ``sqlite:////path/queue.db`` or ``postgresql+psycopg://…``.
        durable: on SQLite, wait for the disk at each commit (``synchronous=FULL``).

    Raises:
        ConfigError: no such dialect or driver, or SQLite without a file.
        sqlalchemy.exc.OperationalError: the database does not answer.
    """
    try:
        parsed = make_url(url)
        backend = parsed.get_backend_name()
        if backend not in ("sqlite", "postgresql") or (
            backend == "sqlite" and parsed.database in (None, "", ":memory:")
        ):
            raise ConfigError(
                "queue's address is not usable",
                expected="sqlite:////path/queue.db or postgresql+psycopg://user@host/database",
                got=parsed.render_as_string(hide_password=True),
            )
        given = {} if backend == "sqlite" else parsed.query  # what the address itself says stays
        waits = {"timeout": BUSY_TIMEOUT_S} if backend == "sqlite" else POSTGRESQL_WAITS
        options = {"connect_args": {name: value for name, value in waits.items() if name not in given}}
        engine = create_engine(parsed, pool_pre_ping=backend == "postgresql", **options)
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError) as error:  # ValueError: the port
        raise ConfigError(
            "queue's address is not usable",
            expected="sqlite:////path/queue.db or postgresql+psycopg://user@host/database",
            got=type(error).__name__,
            hint="For PostgreSQL install the extra model-quarantine[hooks]; write @ in a password as %40",
        ) from None  # an error of the port may hold the rest of a password
    if backend == "sqlite":
        _prepare_sqlite(engine, durable=durable)
    _create_tables(engine)
    return engine


def _create_tables(engine: Engine) -> None:
    try:
        metadata.create_all(engine)
    except DBAPIError as error:
        if "already exists" not in str(error.orig):
            raise
        metadata.create_all(engine)  # another process made one between the look and the creation
    with engine.begin() as connection:
        if "since_round" not in {column["name"] for column in inspect(connection).get_columns(work.name)}:
            # A queue of an earlier release. SQLite's transactions exclude each other and know no IF NOT EXISTS here.
            unless = "" if engine.dialect.name == "sqlite" else "IF NOT EXISTS "
            connection.execute(text(f"ALTER TABLE work ADD COLUMN {unless}since_round INTEGER NOT NULL DEFAULT 0"))


def password_of(url: str) -> str:
    """The password in a database's address; empty where there is none, or no address."""
    try:
        return str(make_url(url).password or "")
    except (ArgumentError, ValueError):
        return ""


def _prepare_sqlite(engine: Engine, *, durable: bool) -> None:
    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # BEGIN is ours, see below
        for pragma in (
            "journal_mode=WAL",
            f"synchronous={'FULL' if durable else 'NORMAL'}",
            f"wal_autocheckpoint={WAL_PAGES}",
            "journal_size_limit=8388608",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        # A transaction that reads first and writes later would fail, not wait, where another one wrote between.
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def fold_log(engine: Engine) -> None:
    """Fold SQLite's write-ahead log into the file and cut it, as far as others that read it allow."""
    if engine.dialect.name == "sqlite":
        with suppress(SQLAlchemyError, sqlite3.Error), closing(engine.raw_connection()) as connection:
            # Past SQLAlchemy, which would begin a transaction; inside one there is no folding.
            connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").close()
