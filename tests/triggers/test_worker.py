"""The worker: the registry decides, one run for each key, nothing is lost to an outage, nothing loops."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components._runtime import registry_tags as tag
from defense_core.errors import EXIT_UNKNOWN, QuarantineError
from pipelines.triggers.orders import Unsubmittable, WorkerSettings
from pipelines.triggers.queue import Queue
from pipelines.triggers.records import Delivery
from tests.triggers.fakes import FakeRegistry, Ledger, drain, entry, key, make_worker, quiet_log, step, watch

OWN = {
    tag.DECISION: tag.ALLOW,
    tag.IDENTITY: "sha256:i",
    tag.SOURCE_DIGEST: "sha256:s",
    tag.FILES_DIGEST: "sha256:f",
}


class Down(QuarantineError):
    exit_code = EXIT_UNKNOWN


@pytest.fixture
def queue(tmp_path):
    opened = Queue.open(f"sqlite:///{tmp_path}/queue.db")
    yield opened
    opened.close()


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "runs.jsonl")


def deliver(queue, model="vision-a", version="1", delivery="d"):
    queue.record([Delivery(delivery, model, version)])


def test_new_version_becomes_one_run_of_its_rules_plan(queue, ledger):
    deliver(queue)
    drain(make_worker(queue, FakeRegistry(entry()), ledger), queue)
    assert dict(ledger.models()) == {"models:/vision-a/1": 1}
    assert queue.counts()["submitted"] == 1


def test_address_comes_from_name_and_number_and_never_from_a_source(queue, ledger):
    deliver(queue)
    drain(make_worker(queue, FakeRegistry(entry(source="http://169.254.169.254/latest")), ledger), queue)
    assert "169.254" not in ledger.path.read_text()


@pytest.mark.parametrize("order", [(1, 2, 3, 1, 2, 3), (3, 2, 1, 1, 2, 3, 3, 3)])
def test_duplicated_and_reordered_deliveries_give_one_run_each(queue, ledger, order):
    worker = make_worker(queue, FakeRegistry(*(entry(version=str(n)) for n in (1, 2, 3))), ledger)
    for index, number in enumerate(order):
        deliver(queue, version=str(number), delivery=f"d{index}")
        if index % 2:
            step(worker)
    drain(worker, queue)
    assert set(ledger.models().values()) == {1}
    assert len(ledger.names()) == 3


def test_absent_version_asks_for_nothing(queue, ledger):
    deliver(queue, version="99")
    drain(make_worker(queue, FakeRegistry(), ledger), queue)
    assert ledger.calls == 0


def test_own_versions_do_not_loop(queue, ledger):
    own = entry("quarantined", tags=OWN, aliases=("champion",))
    deliver(queue, "quarantined")
    deliver(queue, "quarantined", delivery="alias")
    drain(make_worker(queue, FakeRegistry(own), ledger), queue)
    assert ledger.calls == 0


@pytest.mark.parametrize(
    "version",
    [
        entry("vision-a", tags=OWN),
        entry("quarantined", tags={tag.DECISION: tag.ALLOW}),
        entry("quarantined", tags={**OWN, tag.FILES_DIGEST: ""}),
        entry("quarantined"),
    ],
)
def test_tags_alone_exempt_nobody(queue, ledger, version):
    deliver(queue, version.name)
    drain(make_worker(queue, FakeRegistry(version), ledger), queue)
    assert len(ledger.names()) == 1


def test_versions_of_unwatched_models_are_left_alone(queue, ledger):
    worker = make_worker(queue, FakeRegistry(entry("other")), ledger)
    worker.watch = replace(worker.watch, rules=worker.watch.rules[:1])
    deliver(queue, "other")
    drain(worker, queue)
    assert ledger.calls == 0


def test_version_that_is_still_registering_waits(queue, ledger):
    registry = FakeRegistry(entry(status="PENDING_REGISTRATION"))
    worker = make_worker(queue, registry, ledger)
    deliver(queue)
    step(worker)
    assert (queue.counts()["hints"], ledger.calls) == (1, 0)


def test_version_that_is_never_ready_is_asked_about_ever_more_seldom_and_for_a_day(queue, ledger):
    now = [1_000_000.0]
    queue.clock = lambda: now[0]
    registry = FakeRegistry(entry(status="PENDING_REGISTRATION"))
    worker = make_worker(queue, registry, ledger, delay_s=2.0, max_delay_s=60.0)
    deliver(queue)
    for _ in range(600):
        worker.ask()
        now[0] += 1.0
    assert len(registry.asked) < 40, "every five seconds would be 120 times"
    assert queue.counts()["hints"] == 1
    now[0] += 86400.0
    worker.ask()
    assert queue.counts()["hints"] == 0


def test_version_that_failed_to_be_registered_is_not_asked_about_for_ever(queue, ledger):
    worker = make_worker(queue, FakeRegistry(entry(status="FAILED_REGISTRATION")), ledger)
    deliver(queue)
    step(worker)
    assert (queue.counts()["hints"], ledger.calls) == (0, 0)


def test_model_made_anew_under_its_old_name_is_other_work(queue, ledger):
    registry = FakeRegistry(entry())
    worker = make_worker(queue, registry, ledger)
    deliver(queue)
    drain(worker, queue)
    registry.entries["vision-a", "1"] = entry(creation_timestamp=2000)
    deliver(queue, delivery="d2")
    drain(worker, queue)
    assert len(set(ledger.names())) == 2


def test_policy_that_changed_is_other_work(queue, ledger):
    worker = make_worker(queue, FakeRegistry(entry()), ledger)
    deliver(queue)
    drain(worker, queue)
    worker.watch = replace(worker.watch, rules=worker.watch.rules[1:])
    deliver(queue, delivery="d2")
    drain(worker, queue)
    assert len(set(ledger.names())) == 2


def test_registry_that_is_away_loses_nothing(queue, ledger):
    registry = FakeRegistry(entry())
    registry.down = True
    worker = make_worker(queue, registry, ledger)
    deliver(queue)
    for _ in range(5):
        step(worker)
        time.sleep(0.02)
    assert queue.counts()["hints"] == 1
    registry.down = False
    drain(worker, queue)
    assert len(ledger.names()) == 1


def test_orchestrator_that_is_away_loses_nothing(queue, ledger):
    ledger.errors = [Down("no answer from KFP")] * 7
    deliver(queue)
    drain(make_worker(queue, FakeRegistry(entry()), ledger), queue)
    assert (len(ledger.names()), ledger.calls) == (1, 8)


def test_passing_errors_are_tried_again_at_once(queue, ledger):
    ledger.errors = [Down("no answer from KFP")] * 2
    deliver(queue)
    worker = make_worker(queue, FakeRegistry(entry()), ledger, tries=3)
    step(worker)
    assert queue.counts()["submitted"] == 1


def test_refusal_for_good_is_failed_at_once_and_can_be_asked_again(queue, ledger):
    ledger.errors = [Unsubmittable("refused")]
    registry = FakeRegistry(entry())
    worker = make_worker(queue, registry, ledger)
    deliver(queue)
    drain(worker, queue)
    assert (queue.counts()["failed"], ledger.calls) == (1, 1)
    deliver(queue, delivery="d2")
    drain(worker, queue)
    assert queue.counts()["submitted"] == 1


def test_the_run_of_the_round_before_is_waited_for(queue, ledger):
    now = [1_000_000.0]
    queue.clock = lambda: now[0]
    worker = make_worker(queue, FakeRegistry(entry()), ledger)
    deliver(queue)
    drain(worker, queue)
    (first,) = ledger.names()
    ledger.unfinished = {first}
    assert queue.reopen([worker.watch.key(entry())]) == 1
    worker.submit()
    assert (ledger.names(), queue.counts()["pending"]) == ([first], 1)
    now[0] += 600.0
    ledger.unfinished = set()
    worker.submit()
    assert ledger.names() == [first, f"{first}.1"]


def test_attempts_end(queue, ledger):
    ledger.errors = [Down("no answer from KFP")] * 50
    deliver(queue)
    drain(make_worker(queue, FakeRegistry(entry()), ledger, max_attempts=4), queue)
    assert (queue.counts()["failed"], ledger.calls) == (1, 4)


def test_a_defect_met_by_one_version_does_not_stop_the_others(queue, ledger):
    class Picky(Ledger):
        def submit(self, order):
            if order.plan.model.endswith("/2"):
                raise ZeroDivisionError
            return super().submit(order)

    log = io.StringIO()
    picky = Picky(ledger.path)
    worker = make_worker(queue, FakeRegistry(*(entry(version=str(n)) for n in (1, 2, 3))), picky, log=quiet_log(log))
    for number in (1, 2, 3):
        deliver(queue, version=str(number), delivery=f"d{number}")
    step(worker)
    assert queue.counts()["submitted"] == 2
    assert queue.counts()["claimed"] == 1
    assert "ZeroDivisionError" in log.getvalue()


def test_work_that_waited_is_compared_with_the_registry_again(queue, ledger):
    rule = watch().rules[0]
    queue.enqueue([key(1, rule.policy_digest), key(2, rule.policy_digest), replace(key(3), policy_digest="sha256:old")])
    queue.clock = lambda: time.time() + 60
    registry = FakeRegistry(entry(version="2"), entry(version="3"))
    drain(make_worker(queue, registry, ledger), queue)
    assert set(ledger.models()) == {"models:/vision-a/2", "models:/vision-a/3"}
    assert queue.counts()["failed"] == 3


def test_lease_is_renewed_while_a_submission_takes_long(queue, ledger, monkeypatch):
    now, renewed, seen = [time.time()], threading.Semaphore(0), []
    queue.clock = lambda: now[0]
    renew = queue.renew

    def counted(*arguments, **options):
        renew(*arguments, **options)
        renewed.release()

    class Slow(Ledger):
        def submit(self, order):
            for _ in range(3):
                now[0] += 0.7
                while renewed.acquire(blocking=False):
                    pass
                # The first may have looked at the clock before it went on.
                assert renewed.acquire(timeout=60)
                assert renewed.acquire(timeout=60)
            seen.append((queue.counts()["claimed"], step(other)))
            return super().submit(order)

    monkeypatch.setattr(queue, "renew", counted)
    deliver(queue)
    slow = make_worker(queue, FakeRegistry(entry()), Slow(ledger.path), lease_s=1.0)
    slow._monotonic = lambda: 0.0
    other = make_worker(queue, FakeRegistry(entry()), ledger, lease_s=1.0)
    step(slow)
    assert seen == [(1, 0)]
    assert queue.counts()["submitted"] == 1


def test_nothing_is_submitted_after_the_lease_was_lost(queue, ledger):
    now = [0.0]
    worker = make_worker(queue, FakeRegistry(entry()), ledger, lease_s=5)
    worker._monotonic = lambda: now.__setitem__(0, now[0] + 4) or now[0]
    deliver(queue)
    step(worker)
    assert queue.counts()["submitted"] + ledger.calls == 2
    worker._monotonic = lambda: now.__setitem__(0, now[0] + 6) or now[0]
    deliver(queue, version="2", delivery="d2")
    worker.registry = FakeRegistry(entry(version="2"))
    step(worker)
    assert queue.counts()["claimed"] == 1
    assert ledger.calls == 1


def test_worker_stops_when_asked_and_says_so(queue, ledger):
    stop, log = threading.Event(), io.StringIO()
    worker = make_worker(queue, FakeRegistry(entry()), ledger, log=quiet_log(log))
    thread = threading.Thread(target=worker.run, args=(stop,))
    thread.start()
    deliver(queue)
    deadline = time.monotonic() + 10
    while not queue.counts()["submitted"] and time.monotonic() < deadline:
        time.sleep(0.01)
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    assert queue.counts()["submitted"] == 1
    assert "worker stopped" in log.getvalue()


def test_backoff_grows_to_its_bound():
    waits = WorkerSettings(delay_s=1, max_delay_s=60)
    assert 0.5 <= waits.backoff_s(1) <= 1
    assert 4 <= waits.backoff_s(4) <= 8
    assert 30 <= waits.backoff_s(10_000) <= 60


actions = st.lists(
    st.sampled_from(["deliver", "again", "step", "registry down", "registry up", "kfp down", "forget"]), max_size=25
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions)
def test_whatever_happens_every_version_ends_as_exactly_one_run(tmp_path, script):
    for each in tmp_path.iterdir():
        each.unlink()
    queue, ledger = Queue.open(f"sqlite:///{tmp_path}/queue.db"), Ledger(tmp_path / "runs.jsonl")
    registry = FakeRegistry(*(entry(version=str(number)) for number in range(1, 30)))
    worker, delivered = make_worker(queue, registry, ledger, lease_s=1), 0
    for index, action in enumerate(script):
        match action:
            case "deliver":
                delivered += 1
                deliver(queue, version=str(delivered), delivery=f"d{index}")
            case "again" if delivered:
                deliver(queue, version=str(1 + index % delivered), delivery=f"d{index}")
            case "registry down" | "registry up":
                registry.down = action.endswith("down")
            case "kfp down":
                ledger.errors = [Down("away")] * 2
            case "forget":
                worker = make_worker(queue, registry, ledger, lease_s=1)
            case "step":
                step(worker)
    registry.down = False
    drain(worker, queue)
    queue.close()
    assert dict(ledger.models()) == {f"models:/vision-a/{number}": 1 for number in range(1, delivered + 1)}
