"""The queue on SQLite and, where it is installed, on PostgreSQL."""

from __future__ import annotations

import resource
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event as sa_event
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from defense_core.errors import ConfigError, StorageError
from pipelines.triggers import tables
from pipelines.triggers.queue import Queue
from pipelines.triggers.records import Delivery, Known
from pipelines.triggers.serve import open_queue
from pipelines.triggers.tables import fold_log, metadata, open_engine
from tests.triggers.fakes import key


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/queue.db"
        return
    address = request.getfixturevalue("postgresql")
    if address is None:
        pytest.skip("PostgreSQL is not installed")
    yield address
    engine = open_engine(address)
    metadata.drop_all(engine)
    engine.dispose()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def queue(url, clock):
    opened = Queue.open(url, clock=clock)
    yield opened
    opened.close()


def deliveries(*ids: str, model: str = "m", version: str = "1") -> list[Delivery]:
    return [Delivery(each, model, version) for each in ids]


def test_a_delivery_counts_once(queue):
    assert queue.record(deliveries("a", "b", "a")) == [True, True, False]
    assert queue.record(deliveries("b", "c")) == [False, True]
    (hint,) = queue.claim_hints(10, lease_s=1)
    assert (hint.model, hint.version, hint.seen) == ("m", "1", 2)


def test_replayed_delivery_asks_for_nothing(queue):
    queue.record(deliveries("a"))
    queue.settle(queue.claim_hints(1, lease_s=1)[0], [])
    assert queue.record(deliveries("a")) == [False]
    assert queue.counts()["hints"] == 0


def test_work_is_there_once_whoever_asks(queue, clock):
    assert queue.enqueue([key(1), key(1), key(2)]) == 2
    assert queue.enqueue([key(1), key(2), key(3)]) == 1
    assert queue.enqueue(key(number) for number in range(1, 1001)) == 997
    assert queue.counts()["pending"] == 1000
    assert queue.known([key(1), key(2000)]) == {key(1): Known("pending", clock.now)}


@pytest.mark.parametrize("part", ["model", "version", "source_digest", "policy_digest"])
def test_each_part_of_the_key_makes_other_work(queue, part):
    from dataclasses import replace

    queue.enqueue([key()])
    assert queue.enqueue([replace(key(), **{part: "7"})]) == 1


def test_claimed_work_comes_back_when_its_lease_lapses(queue, clock):
    queue.enqueue([key()])
    (first,) = queue.claim(5, lease_s=10)
    assert queue.claim(5, lease_s=10) == []
    clock.now += 9
    assert queue.renew(first.claim, lease_s=10) == 1
    clock.now += 9
    assert queue.claim(5, lease_s=10) == []
    clock.now += 2
    (second,) = queue.claim(5, lease_s=10)
    assert (second.attempts, second.key, second.run_key) == (2, first.key, first.run_key)
    assert not queue.submitted(first, "late")
    assert queue.renew(first.claim, lease_s=10) == 0
    assert queue.submitted(second, "run")
    assert queue.counts()["submitted"] == 1


def test_retried_work_waits_and_failed_work_waits_for_a_new_request(queue, clock):
    queue.enqueue([key()])
    assert queue.retry(queue.claim(1, lease_s=10)[0], "x" * 10_000, 30)
    assert queue.claim(1, lease_s=10) == []
    clock.now += 30
    assert queue.fail(queue.claim(1, lease_s=10)[0], "no")
    clock.now += 1e6
    assert queue.claim(1, lease_s=10) == []
    assert queue.enqueue([key()]) == 1
    (again,) = queue.claim(1, lease_s=10)
    assert (again.attempts, again.run_key) == (1, key().digest)


def test_submitted_work_is_only_reopened_on_purpose(queue):
    queue.enqueue([key()])
    queue.submitted(queue.claim(1, lease_s=10)[0], "run-1")
    assert queue.enqueue([key()]) == 0
    assert queue.reopen([key(), key(2)]) == 1
    (again,) = queue.claim(1, lease_s=10)
    assert again.run_key == f"{key().digest}.1"


def test_repetitions_count_from_the_last_decision(queue):
    queue.enqueue([key()])
    repeated = []
    for renewed in (False, False, True, False):
        queue.submitted(queue.claim(1, lease_s=10)[0], "run")
        queue.reopen([key()], renewed=renewed)
        repeated.append(queue.known([key()])[key()].repeated)
    assert repeated == [1, 2, 0, 1]
    assert queue.claim(1, lease_s=10)[0].round == 4


def test_queue_of_an_earlier_release_goes_on(url, clock):
    former = Queue.open(url, clock=clock)
    former.enqueue([key()])
    with former.engine.begin() as connection:
        connection.execute(text("ALTER TABLE work DROP COLUMN since_round"))
    former.close()
    for _ in range(2):
        opened = Queue.open(url, clock=clock)
        assert opened.known([key()])[key()] == Known("pending", clock.now)
        opened.close()


def test_hint_that_was_touched_meanwhile_stays(queue, clock):
    queue.record(deliveries("a"))
    (hint,) = queue.claim_hints(10, lease_s=60)
    assert queue.claim_hints(10, lease_s=60) == []
    queue.record(deliveries("b"))
    queue.settle(hint, [key()])
    (again,) = queue.claim_hints(10, lease_s=60)
    assert again.seen == 2
    assert queue.settle(again, [key()]) == 0
    assert queue.counts() == {"pending": 1, "claimed": 0, "submitted": 0, "failed": 0, "hints": 0}


def test_postponed_hint_waits(queue, clock):
    queue.record(deliveries("a"))
    queue.postpone(queue.claim_hints(1, lease_s=60)[0], 30)
    clock.now += 29
    assert queue.claim_hints(1, lease_s=60) == []
    clock.now += 2
    assert queue.claim_hints(1, lease_s=60)[0].attempts == 2


def test_age_counts_from_the_oldest_that_waits(queue, clock):
    assert queue.oldest_waiting_s() == 0
    queue.record(deliveries("a"))
    clock.now += 5
    queue.enqueue([key()])
    clock.now += 1
    assert queue.oldest_waiting_s() == 6


@pytest.mark.parametrize("ended", ["submitted", "failed"])
def test_age_of_work_that_is_asked_for_again_counts_from_then(queue, clock, ended):
    queue.enqueue([key()])
    (item,) = queue.claim(1, lease_s=60)
    assert queue.submitted(item, "run") if ended == "submitted" else queue.fail(item, "no")
    clock.now += 90 * 86400
    assert (queue.reopen([key()]) if ended == "submitted" else queue.enqueue([key()])) == 1
    clock.now += 1
    assert queue.oldest_waiting_s() == 1


def test_only_old_ids_are_forgotten(queue, clock):
    queue.record(deliveries("a", "b"))
    clock.now += 100
    queue.record(deliveries("c"))
    assert queue.purge(50, limit=1) == 1
    assert queue.purge(50) == 1
    assert queue.purge(50) == 0
    assert queue.record(deliveries("c")) == [False]


def test_two_workers_never_hold_the_same_work(queue):
    queue.enqueue(key(number) for number in range(1, 121))
    with ThreadPoolExecutor(4) as pool:
        claims = list(pool.map(lambda _: queue.claim(7, lease_s=60), range(40)))
    held = [item.id for claim in claims for item in claim]
    assert len(held) == len(set(held)) == 120


def test_deliveries_at_once_are_kept_once(queue):
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda n: queue.record(deliveries(f"a{n % 10}", f"b{n}", version=str(1 + n))), range(40))
        )
    assert sum(first for first, _ in answers) == 10
    assert all(second for _, second in answers)
    assert queue.counts()["hints"] == 40


def test_second_process_sees_what_the_first_wrote(queue, url):
    queue.record(deliveries("a"))
    other = Queue.open(url)
    assert other.record(deliveries("a")) == [False]
    other.close()


def test_names_of_any_script_and_length_are_kept(queue):
    queue.record([Delivery("a", "модель" * 40 + "🦠", "999999999")])
    (hint,) = queue.claim_hints(1, lease_s=1)
    assert (hint.model, hint.version) == ("модель" * 40 + "🦠", "999999999")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), min_size=1, max_size=6), max_size=8))
def test_any_batching_of_deliveries_keeps_each_once(tmp_path, batches):
    path = tmp_path / "any.db"
    for each in tmp_path.glob("any.db*"):
        each.unlink()
    queue, seen = Queue.open(f"sqlite:///{path}"), set()
    for batch in batches:
        answers = queue.record([Delivery(f"d{number}", "m", str(version)) for number, version in batch])
        for (number, _), answer in zip(batch, answers, strict=True):
            assert answer == (number not in seen)
            seen.add(number)
    queue.close()


# -- SQLite alone ----------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path):
    opened = Queue.open(f"sqlite:///{tmp_path}/queue.db")
    yield opened
    opened.close()


def test_file_is_in_wal_mode_and_commits_wait_for_the_disk(sqlite):
    with sqlite.engine.connect() as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2


def test_full_disk_keeps_nothing_of_the_batch_and_everything_before(sqlite):
    sqlite.record(deliveries("a"))

    def limit(connection, _):
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages + 1}").close()

    sqlite.engine.dispose()
    sa_event.listen(sqlite.engine, "connect", limit)
    batches = [[Delivery(f"b{n}-{each}", "m" * 200, str(each + 1)) for each in range(50)] for n in range(200)]
    with pytest.raises(OperationalError, match="full"):
        list(map(sqlite.record, batches))
    refused = [Delivery(f"c{each}", "m" * 250, str(each + 1)) for each in range(50)]
    with pytest.raises(OperationalError, match="full"):
        sqlite.record(refused)
    sa_event.remove(sqlite.engine, "connect", limit)
    sqlite.engine.dispose()
    assert sqlite.record(deliveries("a")) == [False]
    assert all(sqlite.record(refused))


def test_readiness_is_a_write(sqlite):
    sqlite.record(deliveries("a"))
    sqlite.check()
    fold_log(sqlite.engine)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # as a disk without a byte to give
    try:
        with pytest.raises(OperationalError):
            sqlite.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    sqlite.check()
    with sqlite.engine.connect() as connection:
        assert connection.execute(text("SELECT delivery_id FROM deliveries")).scalars().all() == ["a"]


def test_a_disk_that_the_log_filled_recovers_by_itself(sqlite, tmp_path):
    with sqlite.engine.connect() as connection:
        connection.exec_driver_sql("ROLLBACK")
        connection.exec_driver_sql("PRAGMA wal_autocheckpoint=0")
    log = tmp_path / "queue.db-wal"
    for number in range(40):
        sqlite.record([Delivery(f"b{number}-{each}", "m", "1") for each in range(5)])
    before = log.stat().st_size
    with pytest.raises(OperationalError, match="full"), sqlite._transaction():
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))
    assert before > 100_000
    assert log.stat().st_size == 0
    assert sqlite.record(deliveries("b0-0", "new")) == [False, True]


def test_a_transaction_that_does_not_end_leaves_the_state_before(sqlite):
    with sqlite.engine.connect() as connection:
        connection.execute(text("INSERT INTO deliveries VALUES ('x', 1)"))  # and no commit
    assert sqlite.record(deliveries("x")) == [True]


def test_a_writer_waits_for_another(sqlite):
    held, done = threading.Event(), threading.Event()

    def hold():
        with sqlite.engine.begin():
            held.set()
            done.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(5)
    threading.Timer(0.3, done.set).start()
    assert sqlite.record(deliveries("a")) == [True]
    thread.join()


@pytest.mark.parametrize(
    "address",
    [
        "",
        "nonsense",
        "sqlite://",
        "sqlite:///:memory:",
        "mysql://u@h/d",
        "oracle://x",
        "postgresql+nodriver://u:hunter2@h/d",
    ],
)
def test_other_addresses_are_refused_without_their_password(address):
    with pytest.raises(ConfigError) as refused:
        open_engine(address)
    assert "hunter2" not in str(refused.value)


def test_a_database_that_hangs_holds_nobody_for_ever(monkeypatch):
    made = []

    def create(url, **options):
        made.append(options["connect_args"])
        raise ModuleNotFoundError("no driver")

    monkeypatch.setattr(tables, "create_engine", create)
    for query in ("", "?connect_timeout=2&options=-c%20statement_timeout%3D5000"):
        with pytest.raises(ConfigError):
            open_engine(f"postgresql+psycopg://u@h/d{query}")
    waits, own = made
    assert (waits["connect_timeout"], waits["keepalives"], waits["tcp_user_timeout"]) == (5, 1, 20000)
    assert "statement_timeout=10000" in waits["options"]
    assert "lock_timeout=10000" in waits["options"]
    assert own.keys() == waits.keys() - {"connect_timeout", "options"}


def test_tables_that_another_process_makes_meanwhile_are_taken(tmp_path, monkeypatch):
    url, create_all, calls = f"sqlite:///{tmp_path}/queue.db", metadata.create_all, []

    def overtaken(engine):
        calls.append(engine)
        create_all(engine)
        if len(calls) == 1:
            raise OperationalError("CREATE TABLE", {}, sqlite3.OperationalError("table deliveries already exists"))

    monkeypatch.setattr(metadata, "create_all", overtaken)
    opened = Queue.open(url)
    assert opened.record(deliveries("a")) == [True]
    opened.close()
    assert len(calls) == 2


def test_store_that_is_away_is_an_error_of_ours(tmp_path):
    for address in (f"sqlite:///{tmp_path}/no/such/folder/q.db", "postgresql+psycopg://u:hunter2@127.0.0.1:1/d"):
        with pytest.raises(StorageError) as failed, open_queue(address):
            pass
        assert "hunter2" not in str(failed.value)
