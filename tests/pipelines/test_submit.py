"""Submission: one version per definition, one run per name, whatever gets lost; and following a run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import pipelines
from components._runtime.outcome import NO_DECISION
from components._runtime.store import open_store
from defense_core.errors import EXIT_FAIL, EXIT_PASS, EXIT_UNKNOWN, EXIT_USAGE, ConfigError
from pipelines.follow import StillRunning, follow, outcome
from pipelines.kfp_api import KfpClient, connect
from pipelines.kfp_errors import (
    AnswerLost,
    EndpointDenied,
    EndpointUnreachable,
    NotOnCluster,
    RequestRejected,
    RunConflict,
    ServerFailed,
)
from pipelines.kfp_records import PipelineVersion, Run
from pipelines.kfp_settings import KfpSettings
from pipelines.submit import (
    Package,
    RunRequest,
    ensure_experiment,
    ensure_version,
    require_same,
    same_parameters,
    submit_run,
)
from tests.pipelines.kfp_server.http_server import KfpServer

ROOT = Path(pipelines.__file__).parent.parent
CREATE = "run_service_create_run"
SPEC = b"""pipelineInfo: {name: model-quarantine}
root: {inputDefinitions: {parameters: {model: {parameterType: STRING}, seed: {parameterType: NUMBER_INTEGER}}}}
"""
PACKAGE = Package("model-quarantine", SPEC)


@pytest.fixture
def version(kfp_client: KfpClient) -> PipelineVersion:
    return ensure_version(kfp_client, PACKAGE)[0]


def request_of(version: PipelineVersion, name: str = "key-1", **given: Any) -> RunRequest:
    return RunRequest(**{"name": name, "version": version, "parameters": {"model": "s3://b/m", "seed": 0}, **given})


# -- versions ------------------------------------------------------------------------------


def test_the_same_definition_is_uploaded_once(kfp: KfpServer, kfp_client: KfpClient) -> None:
    first, uploaded = ensure_version(kfp_client, PACKAGE)
    again, uploaded_again = ensure_version(kfp_client, PACKAGE)
    other, _ = ensure_version(kfp_client, Package("model-quarantine", SPEC + b"---\nplatforms: {kubernetes: {}}\n"))
    assert (uploaded, uploaded_again) == (True, False)
    assert first == again
    assert first.name.startswith("sha256-")
    assert len(first.name) == len("sha256-") + 64
    assert other.version_id != first.version_id
    assert other.pipeline_id == first.pipeline_id
    held = kfp.cluster.records["pipeline_versions"]
    assert sorted(each["name"] for each in held.values()) == sorted([first.name, other.name])
    assert held[other.version_id]["pipeline_spec"]["platform_spec"] == {"platforms": {"kubernetes": {}}}


@pytest.mark.parametrize("lost", ["pipeline_service_create_pipeline", "upload_pipeline_version"])
def test_a_lost_answer_uploads_nothing_twice(kfp: KfpServer, kfp_client: KfpClient, lost: str) -> None:
    kfp.cluster.modes.lose = {lost: 1}
    ensure_version(kfp_client, PACKAGE)
    assert len(kfp.cluster.records["pipelines"]) == len(kfp.cluster.records["pipeline_versions"]) == 1


def test_several_upload_at_once(kfp: KfpServer, kfp_client: KfpClient) -> None:
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: ensure_version(kfp_client, PACKAGE)[0], range(6)))
    assert len(set(found)) == 1
    assert len(kfp.cluster.records["pipeline_versions"]) == 1


def test_a_file_that_is_no_pipeline_is_refused(kfp_client: KfpClient) -> None:
    with pytest.raises(RequestRejected, match="the file holds no pipeline"):
        ensure_version(kfp_client, Package("p", b"colour: red\n"))


# -- runs ----------------------------------------------------------------------------------


def test_a_run_is_created_with_its_settings(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    submitted = submit_run(kfp_client, request_of(version, service_account="gpu-runner", experiment="nightly"))
    assert submitted.created
    assert submitted.differences == ()
    (held,) = kfp.cluster.records["runs"].values()
    assert held["run_id"] == submitted.run_id
    assert held["runtime_config"] == {"parameters": {"model": "s3://b/m", "seed": 0}}
    assert held["pipeline_version_reference"]["pipeline_version_id"] == version.version_id
    assert held["service_account"] == "gpu-runner"
    assert held["experiment_id"] == kfp_client.find_experiment("nightly")


def test_the_same_name_is_the_same_run(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    first = submit_run(kfp_client, request_of(version))
    again = submit_run(kfp_client, request_of(version))
    other = submit_run(kfp_client, request_of(version, "key-2"))
    elsewhere = submit_run(kfp_client, request_of(version, experiment="other"))
    assert (again.run_id, again.created, again.differences) == (first.run_id, False, ())
    assert len({first.run_id, other.run_id, elsewhere.run_id}) == 3
    assert kfp.cluster.report()["created"] == 3


def test_other_settings_under_a_known_name_are_said(kfp_client: KfpClient, version: PipelineVersion) -> None:
    first = submit_run(kfp_client, request_of(version))
    newer, _ = ensure_version(kfp_client, Package("model-quarantine", SPEC + b"# newer\n"))
    again = submit_run(
        kfp_client, request_of(newer, parameters={"model": "s3://b/other", "seed": 0}, service_account="gpu")
    )
    assert again.run_id == first.run_id
    assert again.differences == ("pipeline version", "parameters", "service account")
    with pytest.raises(RunConflict, match="other pipeline version, parameters, service account") as error:
        require_same(again)
    assert error.value.exit_code == EXIT_FAIL


def test_a_lost_answer_does_not_create_a_second_run(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    kfp.cluster.modes.lose = {CREATE: 1}
    submitted = submit_run(kfp_client, request_of(version))
    assert submitted.created
    assert kfp.cluster.report()["created"] == 1
    assert submit_run(kfp_client, request_of(version)).run_id == submitted.run_id


def test_an_answer_that_comes_too_late_does_not_create_a_second_run(
    kfp: KfpServer, kfp_settings: Callable[..., KfpSettings], version: PipelineVersion
) -> None:
    client = connect(kfp_settings(read_timeout_s=0.3, attempts=8))
    ensure_experiment(client, "model-quarantine")
    slow = threading.Timer(0.5, lambda: setattr(kfp.cluster.modes, "delay_s", 0.0))
    original = kfp.cluster.on_run
    kfp.cluster.on_run = lambda run: setattr(kfp.cluster.modes, "delay_s", 0.6)
    slow.start()
    submitted = submit_run(client, request_of(version))
    slow.join()
    kfp.cluster.on_run = original
    assert kfp.cluster.report()["created"] == 1
    assert submitted.run_id in kfp.cluster.records["runs"]


def test_nothing_was_done_and_it_is_said(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    kfp.cluster.modes.fail = {CREATE: 1}
    with pytest.raises(ServerFailed):
        submit_run(kfp_client, request_of(version))
    assert kfp.cluster.report()["created"] == 0
    assert submit_run(kfp_client, request_of(version)).created


def test_an_endpoint_that_goes_away(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    kfp.stop()
    with pytest.raises(EndpointUnreachable):
        submit_run(kfp_client, request_of(version))
    kfp.start()
    assert submit_run(kfp_client, request_of(version)).created


def test_many_submit_the_same_at_once(
    kfp: KfpServer, kfp_settings: Callable[..., KfpSettings], version: PipelineVersion
) -> None:
    clients = [connect(kfp_settings()) for _ in range(8)]
    ensure_experiment(clients[0], "model-quarantine")
    together = threading.Barrier(len(clients))

    def submit(client: KfpClient) -> str:
        together.wait()
        return submit_run(client, request_of(version)).run_id

    with ThreadPoolExecutor(len(clients)) as pool:
        answers = set(pool.map(submit, clients))
    (left,) = kfp.cluster.records["runs"]
    # Who looks between two creations may be told a run that goes again; asked again, all agree.
    assert left in answers
    assert {submit_run(client, request_of(version)).run_id for client in clients} == {left}


def test_a_double_of_an_earlier_time_goes_and_nobody_elses(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    first = submit_run(kfp_client, request_of(version))
    held = kfp.cluster.records["runs"][first.run_id]
    held["created_at"] = "2026-01-01T00:00:00Z"
    double = kfp.cluster._add("runs", dict(held))
    finished = kfp.cluster._add("runs", {**held, "state": "SUCCEEDED"})
    foreign = kfp.cluster._add("runs", {**held, "description": "of a colleague"})
    assert submit_run(kfp_client, request_of(version)).run_id == first.run_id
    assert double["run_id"] not in kfp.cluster.records["runs"]
    assert {finished["run_id"], foreign["run_id"]} <= set(kfp.cluster.records["runs"])


def test_who_may_not_remove_a_double_is_told_the_run_that_counts(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(run_id: str) -> None:
        raise EndpointDenied("delete run: not allowed", expected="credentials that may do this", got="403")

    first = submit_run(kfp_client, request_of(version))
    held = kfp.cluster.records["runs"][first.run_id]
    held["created_at"] = "2026-01-01T00:00:00Z"
    kfp.cluster._add("runs", dict(held))
    monkeypatch.setattr(kfp_client, "delete_run", refused)
    assert submit_run(kfp_client, request_of(version)).run_id == first.run_id


@pytest.mark.parametrize("name", ["", " a", "a ", "a\nb", "a\x00", "x" * 129])
def test_names_that_no_filter_finds_again_are_refused(version: PipelineVersion, name: str) -> None:
    with pytest.raises(ConfigError, match="run name"):
        request_of(version, name)


@pytest.mark.parametrize("name", ["a", "é ü / : @", "x" * 128, '"quoted" {}', "100%&a=b"])
def test_unusual_names_are_found_again(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion, name: str
) -> None:
    assert submit_run(kfp_client, request_of(version, name)).created
    assert not submit_run(kfp_client, request_of(version, name)).created


@pytest.mark.parametrize("parameters", [{"model": "m"}, {"model": "m", "seed": 0, "colour": "red"}])
def test_parameters_that_the_pipeline_does_not_have(
    kfp_client: KfpClient, version: PipelineVersion, parameters: dict[str, object]
) -> None:
    with pytest.raises(RequestRejected, match="parameter"):
        submit_run(kfp_client, request_of(version, parameters=parameters))


def test_a_version_that_was_removed(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    kfp.cluster.records["pipeline_versions"].clear()
    with pytest.raises(NotOnCluster):
        submit_run(kfp_client, request_of(version))


def test_numbers_may_come_back_as_floats() -> None:
    assert same_parameters({"seed": 0, "list": [1, {"a": 2}]}, {"seed": 0.0, "list": [1.0, {"a": 2.0}]})
    assert not same_parameters({"seed": True}, {"seed": 1})
    assert not same_parameters({"seed": 0}, {"seed": 1})


def test_the_server_as_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "tests.pipelines.kfp_server", "--token", "t"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        try:
            client = connect(KfpSettings(endpoint=endpoint, token="t", retry_wait_s=0.02, attempts=30))
            version = ensure_version(client, PACKAGE)[0]
            for place in range(100):
                submit_run(client, request_of(version, f"key-{place}"))
            post(endpoint, "refuse", {"seconds": 0.3})
            time.sleep(0.1)
            with pytest.raises(EndpointUnreachable):
                urllib_connect(endpoint)
            assert not submit_run(client, request_of(version, "key-7")).created
            with urllib.request.urlopen(f"{endpoint}/admin/runs", timeout=10) as answer:
                report = json.load(answer)
        finally:
            process.terminate()
        assert process.wait(timeout=20) == 0
    assert (report["created"], report["present"], report["violations"]) == (100, 100, [])
    assert {run["display_name"] for run in report["runs"]} == {f"key-{place}" for place in range(100)}


def post(endpoint: str, action: str, body: object) -> None:
    request = urllib.request.Request(f"{endpoint}/admin/{action}", json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200


def urllib_connect(endpoint: str) -> None:
    connect(KfpSettings(endpoint=endpoint, token="t", attempts=1))


# -- following -----------------------------------------------------------------------------


def test_every_change_of_state_is_told_once(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    kfp.cluster.modes.states = ("PENDING", "PENDING", "RUNNING", "RUNNING", "SUCCEEDED")
    run_id = submit_run(kfp_client, request_of(version)).run_id
    told: list[str] = []
    ended = follow(kfp_client, run_id, on_change=lambda run, lines: told.extend(lines), poll_s=0.01)
    assert ended.state == "SUCCEEDED"
    assert told == [
        "fetch-model: PENDING",
        "gate-promotion: PENDING",
        "run key-1: PENDING",
        "fetch-model: RUNNING",
        "run key-1: RUNNING",
        "fetch-model: SUCCEEDED",
        "gate-promotion: SUCCEEDED",
        "run key-1: SUCCEEDED",
    ]


def test_a_failed_task_is_told_with_its_error(kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion) -> None:
    kfp.cluster.modes.states = ("PENDING", "FAILED")
    told: list[str] = []
    run_id = submit_run(kfp_client, request_of(version)).run_id
    ended = follow(kfp_client, run_id, on_change=lambda run, lines: told.extend(lines), poll_s=0.01)
    assert ended.error == "a task failed"
    assert "gate-promotion: FAILED, exit code 1" in told


def test_a_run_that_takes_longer_than_one_waits(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    kfp.cluster.modes.states = ("RUNNING",)
    run_id = submit_run(kfp_client, request_of(version)).run_id
    with pytest.raises(StillRunning, match="It goes on") as error:
        follow(kfp_client, run_id, poll_s=0.02, timeout_s=0.1)
    began = time.monotonic()
    with pytest.raises(StillRunning):  # also where the next look would come later than that
        follow(kfp_client, run_id, poll_s=60, timeout_s=0.3)
    assert 0.3 <= time.monotonic() - began < 30
    assert error.value.exit_code == EXIT_UNKNOWN


def test_a_short_outage_does_not_end_the_following(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    run_id = submit_run(kfp_client, request_of(version)).run_id
    kfp.cluster.modes.fail = {"run_service_get_run": 2}
    kfp.cluster.modes.lose = {"run_service_get_run": 1}
    assert follow(kfp_client, run_id, poll_s=0.01).state == "SUCCEEDED"
    kfp.cluster.modes.fail = {"run_service_get_run": 10_000}
    with pytest.raises(AnswerLost):
        follow(kfp_client, run_id, poll_s=0.01, outage_s=0.05)


def test_an_outage_of_some_minutes_does_not_end_the_following(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    run_id = submit_run(kfp_client, request_of(version)).run_id
    failed = 10 * kfp_client.settings.attempts  # as many as ten looks make
    kfp.cluster.modes.fail = {"run_service_get_run": failed}
    assert follow(kfp_client, run_id, poll_s=0.01).state == "SUCCEEDED"
    kfp.cluster.modes.fail = {"run_service_get_run": 10_000}
    with pytest.raises(AnswerLost):  # no longer than one wants to wait
        follow(kfp_client, run_id, poll_s=0.01, timeout_s=0.2)


def test_a_run_that_is_removed_while_it_is_followed(
    kfp: KfpServer, kfp_client: KfpClient, version: PipelineVersion
) -> None:
    kfp.cluster.modes.states = ("RUNNING",)
    run_id = submit_run(kfp_client, request_of(version)).run_id
    with pytest.raises(NotOnCluster, match=r"was removed while it was followed.*the same --name"):
        follow(kfp_client, run_id, on_change=lambda run, lines: kfp_client.delete_run(run_id), poll_s=0.01)


# -- what it came to -----------------------------------------------------------------------


def evidence(name: str, **results: object) -> dict[str, Any]:
    step = name.partition(".")[0]
    return {
        "schema": 1,
        "step": step,
        "name": name,
        "inputs": {"source": "sha256:" + "0" * 64},
        "outputs": {},
        "results": results,
        "verdict": "PASS",
        "findings": [],
        "environment": {"version": "0", "torch": "0", "device": "cpu", "seed": 0, "started": "", "seconds": 0.0},
    }


def write_records(root: Path, run_id: str, decision: str) -> None:
    store = open_store(str(root), run_id)
    store.put(evidence("fetch", methods=[]))
    for name in ("evaluate.before", "scan", "select", "rescan", "export", "sign", "promote"):
        store.put(evidence(name))
    store.put(evidence("gate", outcome=decision))


def ended_run(state: str = "SUCCEEDED") -> Run:
    from datetime import UTC, datetime

    return Run("id-1", "r", state, datetime.now(UTC), "e", PipelineVersion("p", "v", ""))


@pytest.mark.parametrize(
    ("decision", "code"),
    [("allow", EXIT_PASS), ("observe", EXIT_PASS), ("deny", EXIT_FAIL), ("unknown", EXIT_UNKNOWN)],
)
def test_the_decision_counts_and_not_that_the_steps_ran(tmp_path: Path, decision: str, code: int) -> None:
    write_records(tmp_path, "id-1", decision)
    found = outcome(ended_run(), str(tmp_path))
    assert (found.decision, found.exit_code) == (decision, code)


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_a_run_that_failed_is_no_pass_whatever_is_recorded(tmp_path: Path, state: str) -> None:
    write_records(tmp_path, "id-1", "allow")
    found = outcome(ended_run(state), str(tmp_path))
    assert found.exit_code == EXIT_UNKNOWN
    assert state in found.why


def test_a_failed_step_says_its_own_exit_code(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "id-1")
    store.put_failure("fetch", {"message": "no such key.", "exit_code": EXIT_USAGE})
    found = outcome(ended_run("FAILED"), str(tmp_path))
    assert (found.failed_step, found.why, found.exit_code) == ("fetch", "no such key.", EXIT_USAGE)


def test_without_records_nothing_is_known(tmp_path: Path) -> None:
    found = outcome(ended_run(), str(tmp_path))
    assert (found.decision, found.exit_code) == (NO_DECISION, EXIT_UNKNOWN)


def test_a_store_that_cannot_be_read_from_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    found = outcome(ended_run(), "s3://bucket/evidence")
    assert found.exit_code == EXIT_UNKNOWN
    assert "the decision cannot be read from here" in found.why
