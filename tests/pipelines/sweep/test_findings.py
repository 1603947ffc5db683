"""The sweep: which versions it finds and what it enqueues."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection
from pipelines import sweep_queue
from pipelines.sweep import SweepSettings, open_memory
from pipelines.sweep_aliases import Journal
from pipelines.sweep_memory import SweepMemory
from pipelines.sweep_queue import Queued
from pipelines.sweep_scope import Scope
from pipelines.triggers.queue import Queue
from pipelines.triggers.watch import parse_watch
from tests.pipelines.sweep.fixtures import (
    RULE,
    aliases,
    keys,
    named,
    one_policy,
    swept,
)
from tests.pipelines.sweep.registry import DAY_S, NOW_S, decided, forget_new_tags, incoming, policy, policy_mapping


def test_a_clean_registry_gives_exit_code_zero(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue, tmp_path: Path
) -> None:
    incoming(connection, "vision")
    decided(connection, tmp_path, "clean", origin="models:/vision/1")
    report = swept(connection, memory, queue=queue)
    assert (report.exit_code, sum(report.found.values()), report.models, report.versions) == (0, 0, 2, 2)
    assert queue.counts()["pending"] == 0


def test_versions_without_a_decision_are_enqueued_once_with_the_hooks_own_key(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue
) -> None:
    incoming(connection, "vision", 3)
    watch = parse_watch(
        {
            "evidence": "s3://quarantine/evidence",
            "rules": [
                {"models": ["vis*"], "register": "clean", "plan": {"clean": "c.npz", "policy": policy_mapping()}}
            ],
        },
        beside=Path(),
    )
    hooks = [watch.key(connection.client.get_model_version("vision", str(n))) for n in (1, 2, 3)]
    report = swept(connection, memory, Scope(watch=watch), queue=queue)
    assert report.exit_code == 1
    assert named(report, "undecided") == [("vision", "1"), ("vision", "2"), ("vision", "3")]
    assert report.queued.enqueued == 3
    again = swept(connection, memory, Scope(watch=watch), queue=queue)
    assert (again.queued.enqueued, again.queued.waiting) == (0, 3)
    assert keys(queue) == hooks


def test_a_model_that_no_rule_names_is_left_alone(connection: MlflowConnection, memory: SweepMemory) -> None:
    incoming(connection, "speech")
    watch = parse_watch({"evidence": "e", "rules": [RULE]}, beside=Path())
    assert swept(connection, memory, Scope(watch=watch)).exit_code == 0


def test_a_decision_by_another_policy_is_none_by_this_one(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision")
    decided(connection, tmp_path, "clean", origin="models:/vision/1")
    report = swept(connection, memory, one_policy(policy(0.6)))
    assert named(report, "undecided") == [("vision", "1")]
    assert "another policy" in next(each.why for each in report.findings if each.kind == "undecided")
    assert swept(connection, memory).exit_code == 0  # and the memory holds for every policy


def test_a_refused_version_has_its_decision_and_a_pending_one_has_not(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision", 2)
    strict = policy_mapping(0.999)
    decided(connection, tmp_path, "clean", origin="models:/vision/1", by=strict)
    pending = decided(connection, tmp_path, "clean", origin="models:/vision/2", by=strict)
    connection.client.set_model_version_tag("clean", pending, tag.DECISION, tag.PENDING)
    report = swept(connection, memory, one_policy(policy(0.999)))
    assert named(report, "undecided") == [("vision", "2")]
    assert "not finished" in report.findings[0].why
    connection.client.set_model_version_tag("clean", pending, tag.DECISION, tag.QUARANTINED)
    # Tags do not change a model's time of change: what was on its way is looked at again all the same.
    assert swept(connection, memory, one_policy(policy(0.999)), now_s=NOW_S + 1).exit_code == 0


def test_forged_tags_outside_the_models_that_runs_write_to_decide_nothing(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision")
    for key in (tag.DECISION, tag.IDENTITY, tag.SOURCE_DIGEST, tag.FILES_DIGEST):
        connection.client.set_model_version_tag("vision", "1", key, tag.ALLOW)
    connection.client.set_model_version_tag("vision", "1", tag.ORIGIN, "models:/vision/1")
    connection.client.set_model_version_tag("vision", "1", tag.POLICY_DIGEST, policy().digest)
    watch = parse_watch({"evidence": "e", "rules": [RULE]}, beside=Path())
    assert named(swept(connection, memory, Scope(watch=watch)), "undecided") == [("vision", "1")]


def test_a_namesake_of_a_deleted_version_needs_a_decision_of_its_own(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision")
    decided(connection, tmp_path, "clean", origin="models:/vision/1")
    assert swept(connection, memory).exit_code == 0
    connection.client.delete_registered_model("vision")
    incoming(connection, "vision")
    assert named(swept(connection, memory), "undecided") == [("vision", "1")]


def test_versions_with_equal_bytes_have_one_decision(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision", 2)
    first = decided(connection, tmp_path, "clean", origin="models:/vision/1", content="equal")
    later = NOW_S + DAY_S  # when nothing of this is as young as to be looked at again anyway
    assert named(swept(connection, memory, now_s=later), "undecided") == [("vision", "2")]
    incoming(connection, "vision")
    for number in (2, 3):
        assert decided(connection, tmp_path, "clean", origin=f"models:/vision/{number}", content="equal") == first
    assert swept(connection, memory, now_s=later).exit_code == 0
    tags = connection.client.get_model_version("clean", first).tags
    (key,) = (key for key, value in tags.items() if value.startswith("models:/vision/3 "))
    assert key.startswith(tag.ORIGIN_PREFIX)
    # The decision is older than this version: it was about another of its name and number.
    connection.client.set_model_version_tag("clean", first, key, "models:/vision/3 2025-11-01T00:00:00+00:00")
    with closing(open_memory(connection, None)) as anew:
        assert named(swept(connection, anew, now_s=later), "undecided") == [("vision", "3")]


def test_an_old_decision_is_found_and_submitted_again_once(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue, tmp_path: Path
) -> None:
    aged, later = one_policy(policy(max_age_days=30)), NOW_S + 31 * DAY_S
    incoming(connection, "vision")
    decided(connection, tmp_path, "clean", origin="models:/vision/1", by=policy_mapping(max_age_days=30))
    assert swept(connection, memory, aged, queue=queue, now_s=NOW_S + 29 * DAY_S).exit_code == 0
    queue.enqueue(
        each.work for each in swept(connection, memory, aged, now_s=later).findings if each.work and each.kind == "aged"
    )
    (item,) = queue.claim(10, lease_s=60)
    queue.submitted(item, "run-1")
    report = swept(connection, memory, aged, queue=queue, now_s=later)
    assert named(report, "aged") == [("vision", "1")]
    assert report.found["drift"] == 0  # an old allow still covers its alias
    assert (report.queued.reopened, queue.counts()["pending"]) == (1, 1)
    assert swept(connection, memory, aged, queue=queue, now_s=later + 60).queued.reopened == 0


@pytest.mark.parametrize("kept", [True, False], ids=["with a memory", "without"])
def test_a_run_that_left_no_decision_is_submitted_again_after_a_day(
    connection: MlflowConnection, queue: Queue, tmp_path: Path, kept: bool
) -> None:
    def queued(now_s: float) -> Queued:
        with closing(open_memory(connection, tmp_path / "memory.db" if kept else None)) as memory:
            return swept(connection, memory, queue=queue, now_s=now_s).queued

    incoming(connection, "vision")
    assert queued(NOW_S).enqueued == 1
    (item,) = queue.claim(10, lease_s=60)
    queue.submitted(item, "run-1")
    assert queued(NOW_S + DAY_S / 2).waiting == 1
    assert queued(NOW_S + DAY_S + 1).reopened == 1
    (item,) = queue.claim(10, lease_s=60)
    queue.submitted(item, "run-2")
    assert queued(NOW_S + DAY_S / 2).waiting == 1, "the second attempt has its own day"


def test_work_that_failed_is_tried_again_and_no_more_than_asked_is_handed_over(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue
) -> None:
    incoming(connection, "vision", 5)
    few = SweepSettings(max_enqueued=2)
    first = swept(connection, memory, queue=queue, settings=few)
    assert (first.queued.enqueued, first.queued.later) == (2, 3)
    for item in queue.claim(10, lease_s=60):
        queue.fail(item, "no such model")
    second = swept(connection, memory, queue=queue)
    assert (second.queued.enqueued, second.queued.later, queue.counts()["pending"]) == (5, 0, 5)


def submit_all(queue: Queue) -> list[int]:
    """Submit all that waits; the rounds of it."""
    items = queue.claim(1000, lease_s=60)
    for item in items:
        assert queue.submitted(item, f"run-{item.run_key}")
    return [item.round for item in items]


def test_work_that_never_leaves_a_decision_is_tried_ever_more_seldom_and_then_reported(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue
) -> None:
    incoming(connection, "vision")
    swept(connection, memory, queue=queue)
    submit_all(queue)
    days = []
    for day in range(1, 60):
        queue.clock = lambda day=day: NOW_S + day * DAY_S
        report = swept(connection, memory, queue=queue, now_s=NOW_S + day * DAY_S)
        if report.queued.reopened:
            days.append(day)
        submit_all(queue)
    assert days == [1, 3, 7, 15, 31]
    assert (named(report, "fruitless"), report.found["undecided"]) == ([("vision", "1")], 0)
    assert (report.queued.impossible, report.exit_code) == (1, 1)
    assert "submitted 6 times" in report.findings[0].why


def test_a_decision_that_grows_old_year_by_year_is_renewed_each_time_and_a_fruitless_renewal_is_not_tried_for_ever(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue, tmp_path: Path
) -> None:
    scope = one_policy(policy(max_age_days=30))
    incoming(connection, "vision")
    decided(connection, tmp_path, "clean", origin="models:/vision/1", by=policy_mapping(max_age_days=30))
    (work,) = (each.work for each in swept(connection, memory, scope, now_s=NOW_S + 31 * DAY_S).findings)
    assert work is not None
    queue.enqueue([work])
    submit_all(queue)
    for _ in range(9):  # as after renewals of many years, each of which led to a decision
        queue.reopen([work])
        submit_all(queue)
    days = []
    for day in range(31, 120):
        queue.clock = lambda day=day: NOW_S + day * DAY_S
        report = swept(connection, memory, scope, queue=queue, now_s=NOW_S + day * DAY_S)
        if report.queued.reopened:
            days.append(day)
        submit_all(queue)
    assert days == [31, 32, 34, 38, 46, 62]
    assert (report.found["fruitless"], report.found["aged"]) == (1, 0)


def test_what_is_new_goes_before_what_is_submitted_again(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_queue, "BATCH", 2)
    incoming(connection, "speech", 4)
    swept(connection, memory, queue=queue)
    submit_all(queue)
    incoming(connection, "vision", 3)
    queue.clock = lambda: NOW_S + 2 * DAY_S
    few = swept(connection, memory, queue=queue, now_s=NOW_S + 2 * DAY_S, settings=SweepSettings(max_enqueued=4))
    assert (few.queued.enqueued, few.queued.reopened, few.queued.later) == (3, 1, 3)
    assert sorted(submit_all(queue)) == [0, 0, 0, 1]


def test_what_a_policy_only_observes_is_submitted_once(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue, tmp_path: Path
) -> None:
    observing = {**policy_mapping(), "promote": False}
    rule = {**RULE, "plan": {"clean": "c.npz", "policy": observing}}
    scope = Scope(watch=parse_watch({"evidence": "e", "rules": [rule]}, beside=Path()))
    incoming(connection, "vision", 2)
    stranger = incoming(connection, "clean")[0]
    connection.client.set_registered_model_alias("clean", "champion", stranger)
    journal = Journal(tmp_path / "journal.jsonl")
    first = swept(connection, memory, scope, queue=queue, journal=journal)
    assert (first.queued.enqueued, first.found["undecided"], first.moves) == (2, 2, ())
    submit_all(queue)
    later = swept(connection, memory, scope, queue=queue, journal=journal, now_s=NOW_S + 40 * DAY_S)
    assert (later.queued.reopened, later.queued.observed, later.exit_code) == (0, 2, 0)
    assert aliases(connection)["champion"] == stranger
    assert queue.counts()["pending"] == 0


def test_an_alias_is_guarded_by_the_rule_that_promotes(tmp_path: Path) -> None:
    observing = {"models": ["b"], "register": "clean", "plan": {"clean": "c.npz", "policy": "observe"}}
    watch = parse_watch({"evidence": "e", "rules": [RULE, observing]}, beside=Path())
    assert Scope(watch=watch).guarded("clean") == {"champion": frozenset({policy().digest})}


def test_a_version_of_an_earlier_release_is_read_from_its_evidence(
    connection: MlflowConnection, memory: SweepMemory, tmp_path: Path
) -> None:
    incoming(connection, "vision")
    forget_new_tags(connection, "clean", decided(connection, tmp_path, "clean", origin="models:/vision/1"))
    assert swept(connection, memory).exit_code == 0
    # Read once: the evidence is not needed again, also when the model changed.
    shutil.rmtree(tmp_path / "mlflow" / "mlartifacts")
    incoming(connection, "clean")
    assert named(swept(connection, memory, Scope(policy=policy())), "undecided") == [("clean", "2")]


def test_what_came_from_outside_the_registry_is_reported_and_cannot_be_enqueued(
    connection: MlflowConnection, memory: SweepMemory, queue: Queue, tmp_path: Path
) -> None:
    decided(connection, tmp_path, "clean", by=policy_mapping(0.4))
    report = swept(connection, memory, Scope(policy=policy()), queue=queue)
    assert named(report, "undecided") == [("clean", "1")]
    assert report.queued.impossible == 1
    assert "submit it again" in report.findings[0].why
