"""Schedules: one by name, whatever interrupts; never two that start runs; each can be undone."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defense_core.errors import ConfigError
from pipelines.cron import parse_cron
from pipelines.kfp_api import KfpClient
from pipelines.kfp_errors import KfpError, NotOnCluster, RequestRejected
from pipelines.kfp_records import PipelineVersion
from pipelines.schedule import ScheduleRequest, apply_schedule, delete, enable
from pipelines.submit import Package, ensure_version
from tests.pipelines.kfp_server.http_server import KfpServer

SPEC = b"""pipelineInfo: {name: model-quarantine}
root: {inputDefinitions: {parameters: {model: {parameterType: STRING}, seed: {parameterType: NUMBER_INTEGER}}}}
"""
SERVICE = "recurring_run_service_"
CHANGES = ("create_recurring_run", "disable_recurring_run", "enable_recurring_run", "delete_recurring_run")


@pytest.fixture
def version(kfp_client: KfpClient) -> PipelineVersion:
    return ensure_version(kfp_client, Package("model-quarantine", SPEC))[0]


def request_of(version: PipelineVersion, **given: Any) -> ScheduleRequest:
    settings = {"name": "nightly", "cron": "0 2 * * *", "parameters": {"model": "models:/m@champion", "seed": 0}}
    return ScheduleRequest(**{"version": version, **settings, **given})


def changes(kfp: KfpServer) -> list[str]:
    """What was changed about schedules, in order."""
    asked = [name.removeprefix(SERVICE) for name in kfp.cluster.requests if name.startswith(SERVICE)]
    return [name for name in asked if name in CHANGES]


def held(kfp: KfpServer) -> list[dict[str, Any]]:
    return list(kfp.cluster.records["recurring_runs"].values())


def test_a_schedule_is_created_without_catch_up_and_one_at_a_time(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    applied = apply_schedule(kfp_client, request_of(version, service_account="gpu-runner"))
    (found,) = held(kfp)
    assert applied.action == "created"
    assert applied.schedule.enabled
    assert found["no_catchup"] is True
    assert found["max_concurrency"] == "1"
    assert found["trigger"] == {"cron_schedule": {"cron": "0 0 2 * * *"}}
    assert found["status"] == "ENABLED"
    assert found["service_account"] == "gpu-runner"
    assert found["pipeline_version_reference"]["pipeline_version_id"] == version.version_id
    assert found["runtime_config"] == {"parameters": {"model": "models:/m@champion", "seed": 0}}


def test_the_same_again_changes_nothing(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    first = apply_schedule(kfp_client, request_of(version))
    before = changes(kfp)
    again = apply_schedule(kfp_client, request_of(version, cron="0 0 2 * * *"))
    assert again.action == "unchanged"
    assert again.schedule == first.schedule
    assert changes(kfp) == before


@pytest.mark.parametrize(
    "other",
    [
        {"cron": "30 3 * * 1-5"},
        {"parameters": {"model": "models:/m@champion", "seed": 1}},
        {"service_account": "other"},
        {"experiment": "other"},
    ],
)
def test_other_settings_replace_it_and_two_are_never_enabled(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion, other: dict[str, Any]
) -> None:
    first = apply_schedule(kfp_client, request_of(version)).schedule
    applied = apply_schedule(kfp_client, request_of(version, **other))
    assert applied.action == "replaced"
    assert applied.removed == (first.schedule_id,)
    assert [each["recurring_run_id"] for each in held(kfp)] == [applied.schedule.schedule_id]
    assert applied.schedule.enabled
    assert kfp.cluster.most_enabled == {"nightly": 1}
    # What the old one has started goes on.
    assert kfp.cluster.deletions == [{"propagation_policy": "ORPHAN"}]


def test_another_definition_replaces_it(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    apply_schedule(kfp_client, request_of(version))
    newer, _ = ensure_version(kfp_client, Package("model-quarantine", SPEC + b"# newer\n"))
    assert apply_schedule(kfp_client, request_of(newer)).action == "replaced"
    assert [each["pipeline_version_reference"]["pipeline_version_id"] for each in held(kfp)] == [newer.version_id]


@pytest.mark.parametrize(
    "changed",
    [
        {"trigger": {"cron_schedule": {"cron": "0 0 3 * * *"}}},
        {"max_concurrency": "5"},
        {"no_catchup": False},
        {"runtime_config": {"parameters": {"model": "models:/other/1", "seed": 0}}},
        {"description": "mine"},
    ],
)
def test_what_somebody_changed_by_hand_is_put_right(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion, changed: dict[str, Any]
) -> None:
    apply_schedule(kfp_client, request_of(version))
    held(kfp)[0].update(changed)
    assert apply_schedule(kfp_client, request_of(version)).action == "replaced"
    assert apply_schedule(kfp_client, request_of(version)).action == "unchanged"
    assert kfp.cluster.most_enabled == {"nightly": 1}


def test_a_refused_replacement_leaves_the_old_one_at_work(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    first = apply_schedule(kfp_client, request_of(version)).schedule
    with pytest.raises(RequestRejected):
        apply_schedule(kfp_client, request_of(version, parameters={"colour": "red"}))
    (present,) = kfp_client.schedules("nightly")
    assert present == first
    assert present.enabled


@pytest.mark.parametrize("way", ["fail", "lose"])
@pytest.mark.parametrize("step", CHANGES)
def test_whatever_interrupts_a_replacement_the_next_call_finishes_it(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion, step: str, way: str
) -> None:
    apply_schedule(kfp_client, request_of(version))
    wanted = request_of(version, cron="0 4 * * *")
    # More often than a change is repeated. A creation or a removal whose answer is lost is found out about.
    setattr(kfp.cluster.modes, way, {SERVICE + step: 100})
    if way == "lose" and step in (CHANGES[0], CHANGES[-1]):
        assert apply_schedule(kfp_client, wanted).action == "replaced"
    else:
        with pytest.raises(KfpError):
            apply_schedule(kfp_client, wanted)
    setattr(kfp.cluster.modes, way, {})
    applied = apply_schedule(kfp_client, wanted)
    (present,) = kfp_client.schedules("nightly")
    assert present == applied.schedule
    assert (present.cron, present.enabled) == ("0 0 4 * * *", True)
    assert kfp.cluster.most_enabled == {"nightly": 1}


def test_disable_enable_and_delete(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    apply_schedule(kfp_client, request_of(version))
    apply_schedule(kfp_client, request_of(version, name="other"))
    assert [each.enabled for each in enable(kfp_client, "nightly", enabled=False)] == [False]
    assert [each.enabled for each in kfp_client.schedules("other")] == [True]
    before = changes(kfp)
    enable(kfp_client, "nightly", enabled=False)
    assert changes(kfp) == before
    assert [each.enabled for each in enable(kfp_client, "nightly", enabled=True)] == [True]
    assert len(delete(kfp_client, "nightly")) == 1
    assert delete(kfp_client, "nightly") == []
    assert [each.name for each in kfp_client.schedules()] == ["other"]
    with pytest.raises(NotOnCluster, match="no schedule is called nightly"):
        enable(kfp_client, "nightly", enabled=True)


def test_applying_says_whether_it_is_to_start_runs(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    assert apply_schedule(kfp_client, request_of(version, enabled=False)).schedule.enabled is False
    assert kfp.cluster.most_enabled == {"nightly": 0}
    assert apply_schedule(kfp_client, request_of(version)).action == "enabled"
    assert apply_schedule(kfp_client, request_of(version, enabled=False)).action == "disabled"
    assert len(held(kfp)) == 1


def test_enabling_with_a_replacement_half_done_enables_one(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    apply_schedule(kfp_client, request_of(version))
    kfp.cluster._add("recurring_runs", {**held(kfp)[0], "mode": "DISABLE", "status": "DISABLED"})
    found = enable(kfp_client, "nightly", enabled=True)
    assert [each.enabled for each in found].count(True) == 1
    assert kfp.cluster.most_enabled == {"nightly": 1}


# -- cron ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "six"),
    [
        ("0 2 * * *", "0 0 2 * * *"),
        ("*/15 * * * *", "0 */15 * * * *"),
        ("0 0 2 * * *", "0 0 2 * * *"),
        ("30 3 1,15 * ?", "0 30 3 1,15 * ?"),
        ("0 9 ? JAN-MAR mon-fri", "0 0 9 ? JAN-MAR mon-fri"),
        ("  5   4 * *  0 ", "0 5 4 * * 0"),
        ("0 8-18/2 * * *", "0 0 8-18/2 * * *"),
    ],
)
def test_five_fields_get_a_second(text: str, six: str) -> None:
    assert parse_cron(text) == six


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0 2 * *",
        "0 0 0 2 * * *",
        "@daily",
        "60 2 * * *",
        "0 24 * * *",
        "0 2 0 * *",
        "0 2 32 * *",
        "0 2 * 13 *",
        "0 2 * * 7",
        "0 2 * * MONDAY",
        "*/0 * * * *",
        "5-1 * * * *",
        "? 2 * * *",
        "1,,2 * * * *",
        "-1 * * * *",
        "a * * * *",
        "1/ * * * *",
        "0 2 * * *; rm",
    ],
)
def test_what_is_no_cron_expression(text: str) -> None:
    with pytest.raises(ConfigError, match="cron"):
        parse_cron(text)


@given(st.text(alphabet="0123456789*/,-? JANSUMO", max_size=30))
def test_every_text_is_six_fields_or_an_error(text: str) -> None:
    try:
        parsed = parse_cron(text)
    except ConfigError:
        return
    assert len(parsed.split(" ")) == 6
    assert parse_cron(parsed) == parsed
    assert not re.search(r"[^0-9A-Za-z*/,\-? ]", parsed)
