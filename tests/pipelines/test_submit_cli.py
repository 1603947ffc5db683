"""`quarantine submit` and `quarantine schedule`: options, output and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import pipelines
from components._runtime.embedded_s3 import embedded_s3
from components._runtime.plan import plan_from_arguments
from components._runtime.store import open_store
from pipelines import cli, cluster_options
from pipelines.follow import follow
from pipelines.kfp_settings import settings_from
from pipelines.submit import Package
from tests.pipelines.commands import Call
from tests.pipelines.kfp_server.http_server import KfpServer
from tests.pipelines.test_submit import evidence

ROOT = Path(pipelines.__file__).parent.parent
GOLDEN = (ROOT / "tests" / "pipelines" / "golden" / "quarantine.yaml").read_bytes()
JOB = (
    "--model",
    "models:/resnet/3",
    "--clean",
    "s3://data/clean.parquet",
    "--evidence",
    "s3://records/evidence",
    "--set",
    "tsbd.n=0.15",
)


@pytest.fixture
def quarantine(quarantine: Call, monkeypatch: pytest.MonkeyPatch, kfp: KfpServer) -> Call:
    """Run the entry point in this process, against the cluster, with the pipeline of the golden copy."""
    monkeypatch.setenv("KFP_ENDPOINT", kfp.endpoint)
    quick = {"retry_wait_s": 0.01, "retry_wait_max_s": 0.05}
    monkeypatch.setattr(cluster_options, "settings_from", lambda given: replace(settings_from(given), **quick))
    monkeypatch.setattr(cluster_options, "compiled", lambda pools, namespace: ("model-quarantine", GOLDEN, ""))
    return quarantine


@pytest.fixture
def no_s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The evidence store is not reachable from here."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")


def write_records(run: dict[str, Any], decision: str) -> None:
    parameters = run["runtime_config"]["parameters"]
    store = open_store(json.loads(parameters["run"])["evidence"], run["run_id"])
    store.put(evidence("fetch", methods=[]))
    for name in ("evaluate.before", "scan", "select", "rescan", "export", "sign", "promote"):
        store.put(evidence(name))
    store.put(evidence("gate", outcome=decision))


# -- submit --------------------------------------------------------------------------------


def test_submit_without_waiting(quarantine: Call, kfp: KfpServer) -> None:
    words = ("submit", *JOB, "--name", "first", "--service-account", "gpu", "--seed", 7, "--no-wait", "--json")
    code, out, _ = quarantine(*words)
    facts = json.loads(out)
    assert code == 0
    assert (facts["run"], facts["created"], facts["uploaded"], facts["exit_code"]) == ("first", True, True, 0)
    assert facts["pipeline_version"] == Package("", GOLDEN).version_name
    assert facts["evidence"] == f"s3://records/evidence/{facts['run_id']}"
    (run,) = kfp.cluster.records["runs"].values()
    assert run["service_account"] == "gpu"
    parameters = run["runtime_config"]["parameters"]
    plan = plan_from_arguments({name: value for name, value in parameters.items() if name != "run"})
    assert (plan.model, plan.seed, plan.configs) == ("models:/resnet/3", 7, {"tsbd": {"n": 0.15}})
    assert json.loads(parameters["run"])["name"] == "", "the run's id names its evidence"
    code, out, _ = quarantine(*words)
    again = json.loads(out)
    assert (code, again["created"], again["uploaded"], again["run_id"]) == (0, False, False, facts["run_id"])


CONTROLS = ("--controls", "s3://records/controls")
SCAN = ("--pool", "s3://data/pool.json", "--scan-set", "fpr=0.01", "--scan-set", "settings.patch.steps=40")


@pytest.mark.parametrize(
    ("words", "kind"),
    [(("submit", "--no-wait"), "runs"), (("schedule", "set", "n", "--cron", "0 2 * * *"), "recurring_runs")],
)
def test_settings_of_the_scan_reach_the_cluster(
    words: tuple[str, ...], kind: str, quarantine: Call, kfp: KfpServer
) -> None:
    answer = quarantine(*words, *JOB, *SCAN, *CONTROLS)
    assert answer.code == 0, answer.err
    (made,) = kfp.cluster.records[kind].values()
    parameters = made["runtime_config"]["parameters"]
    assert parameters["pool"] == "s3://data/pool.json"
    assert json.loads(parameters["run"])["controls"] == "s3://records/controls"
    assert json.loads(parameters["scan"]) == {"fpr": 0.01, "settings": {"patch": {"steps": 40}}}


def test_submit_ends_with_the_decision(quarantine: Call, kfp: KfpServer) -> None:
    with embedded_s3("records"):
        kfp.cluster.on_run = lambda run: write_records(run, "deny")
        code, out, err = quarantine("submit", *JOB, "--name", "n", "--poll-s", "0.01")
        kfp.cluster.on_run = lambda run: write_records(run, "allow")
        assert quarantine("submit", *JOB, "--name", "m", "--poll-s", "0.01")[0] == 0
    assert code == 1
    assert "decision: deny" in out
    assert "fetch-model: SUCCEEDED" in err
    assert "run n: SUCCEEDED" in err


def test_a_failed_run_ends_with_the_exit_code_of_its_step(quarantine: Call, kfp: KfpServer) -> None:
    kfp.cluster.modes.states = ("PENDING", "FAILED")

    def fail(run: dict[str, Any]) -> None:
        failure = {"message": "no such key.", "exit_code": 3}
        open_store("s3://records/evidence", run["run_id"]).put_failure("fetch", failure)

    with embedded_s3("records"):
        kfp.cluster.on_run = fail
        code, out, _ = quarantine("submit", *JOB, "--poll-s", "0.01", "--json")
    facts = json.loads(out)
    assert code == facts["exit_code"] == 3
    assert (facts["state"], facts["failed_step"], facts["why"]) == ("FAILED", "fetch", "no such key.")
    assert {"name": "gate-promotion", "state": "FAILED", "error": "exit code 1"} in facts["tasks"]


def test_a_decision_that_cannot_be_read_is_no_pass(quarantine: Call, no_s3: None) -> None:
    code, out, _ = quarantine("submit", *JOB, "--poll-s", "0.01", "--json")
    facts = json.loads(out)
    assert code == 2
    assert (facts["state"], facts["decision"]) == ("SUCCEEDED", "none")
    assert "cannot be read from here" in facts["why"]


def test_a_name_that_is_taken_by_other_settings(quarantine: Call) -> None:
    quarantine("submit", *JOB, "--name", "n", "--no-wait")
    code, _, err = quarantine("submit", *JOB, "--name", "n", "--seed", "1", "--no-wait")
    assert code == 1
    assert "with other settings" in err
    assert "Choose another --name" in err


def test_a_run_that_is_not_over_in_time(quarantine: Call, kfp: KfpServer) -> None:
    kfp.cluster.modes.states = ("RUNNING",)
    code, out, _ = quarantine("submit", *JOB, "--poll-s", "0.01", "--timeout-s", "0.05", "--json")
    assert code == 2
    assert json.loads(out)["error"] == "StillRunning"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model", "/home/me/model.pt"), "--model is not reachable from a cluster"),
        (("--clean", "clean.npz"), "--clean is not reachable from a cluster"),
        (("--test", "file:///t.npz"), "--test is not reachable from a cluster"),
        (("--seed", str(2**53 + 1)), "--seed is out of range"),
        (("--evidence", "evidence"), "--evidence is not reachable from a cluster"),
        (("--policy", "nowhere.yaml"), "nowhere.yaml"),
        (("--set", "distil.lr=1"), "configs"),
        (("--set", "tsbd.nn=1"), "tsbd.nn"),
        (("--pool", "pool.json"), "--pool is not reachable from a cluster"),
        (("--controls", "kept"), "--controls is not reachable from a cluster"),
        (("--scan-set", "fprr=0.01"), "scan.fprr"),
        (("--scan-set", "fpr=2"), "fpr"),
        (("--name", "a\nb"), "--name"),
        (("--alias", "latest"), "alias"),
        (("--token-file", "/nowhere"), "token_file"),
        (("--endpoint", "not an address"), "the endpoint is malformed"),
        (("--poll-s", "0"), "poll-s"),
        (("--colour", "red"), "colour"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    quarantine: Call, kfp: KfpServer, words: tuple[str, ...], said: str
) -> None:
    given = dict(zip(JOB[::2], JOB[1::2], strict=True)) | dict([words])
    code, _, err = quarantine("submit", *(word for pair in given.items() for word in pair))
    assert code == 3
    assert said in err.replace("\n", " ")
    assert kfp.cluster.requests == []


def test_a_cluster_that_is_not_there(quarantine: Call, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kfp.stop()
    code, out, _ = quarantine("submit", *JOB, "--json")
    assert (code, json.loads(out)["error"]) == (2, "EndpointUnreachable")
    monkeypatch.delenv("KFP_ENDPOINT")
    code, _, err = quarantine("submit", *JOB)
    assert code == 3
    assert "no Kubeflow Pipelines endpoint" in err


def test_credentials_come_from_the_environment_and_are_never_said(
    quarantine: Call, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kfp.cluster.modes.token = "right-token"
    monkeypatch.setenv("KFP_TOKEN", "wrong-token")
    code, out, err = quarantine("submit", *JOB, "--no-wait")
    assert code == 3
    assert "not logged in" in err
    assert "wrong-token" not in out + err
    monkeypatch.setenv("KFP_TOKEN", "right-token")
    code, out, err = quarantine("submit", *JOB, "--no-wait")
    assert code == 0
    assert "right-token" not in out + err + json.dumps(kfp.cluster.records)


def test_node_pools_are_compiled_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kfp: KfpServer
) -> None:
    from pipelines.node_pools import read_node_pools

    pools = read_node_pools("gke")
    words = ["submit", *JOB, "--node-pools", "gke", "--no-wait", "--json", "--endpoint", kfp.endpoint]
    monkeypatch.setattr(sys, "argv", ["quarantine", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    facts = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    golden = (ROOT / "tests" / "pipelines" / "golden" / "gke" / "quarantine.yaml").read_bytes()
    assert facts["pipeline_version"] == Package("", golden).version_name
    (version,) = kfp.cluster.records["pipeline_versions"].values()
    assert "kubernetes" in version["pipeline_spec"]["platform_spec"]["platforms"]
    (run,) = kfp.cluster.records["runs"].values()
    assert run["service_account"] == (pools.run_service_account or "pipeline-runner")
    monkeypatch.setattr(sys, "argv", ["quarantine", *words, "--namespace", "another-team"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (3 if pools.namespace else 0)


@pytest.mark.parametrize("command", ["submit", "submit-promotion"])
def test_node_pools_of_another_namespace_than_the_variable_names_are_refused(
    kfp: KfpServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("KFP_NAMESPACE", "another-team")
    job = {"submit": JOB, "submit-promotion": ("--release", "models:/resnet/3", "--evidence", "s3://records/evidence")}
    words = [command, *job[command], "--node-pools", "gke", "--no-wait", "--endpoint", kfp.endpoint]
    monkeypatch.setattr(sys, "argv", ["quarantine", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert "KFP_NAMESPACE" in capsys.readouterr().err
    assert kfp.cluster.requests == []


def test_a_learned_trigger_is_refused_before_anything_is_sent(quarantine: Call, kfp: KfpServer, tmp_path: Path) -> None:
    probe = tmp_path / "probe.yaml"
    probe.write_text("{name: a, kind: lira, target: 0, path: trigger.safetensors, sha256: 'sha256:0'}\n")
    code, _, err = quarantine("submit", *JOB, "--probe", probe)
    assert code == 3
    assert "learned trigger cannot be measured on a cluster" in " ".join(err.split())
    assert kfp.cluster.requests == []


def test_an_endpoint_that_goes_away_for_good_does_not_take_the_runs_name_with_it(
    quarantine: Call, kfp: KfpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "__kwdefaults__", {**(follow.__kwdefaults__ or {}), "outage_s": 0.0})
    kfp.cluster.modes.fail = {"run_service_get_run": 10_000}
    code, out, _ = quarantine("submit", *JOB, "--poll-s", "0.01", "--json")
    (run_id,) = kfp.cluster.records["runs"]
    name = kfp.cluster.records["runs"][run_id]["display_name"]
    told = json.loads(out)
    assert (code, told["error"]) == (2, "ServerFailed")
    assert run_id in told["hint"]
    assert f"--name {name}" in told["hint"]


def test_a_signal_while_following_leaves_the_run_alone(kfp: KfpServer) -> None:
    kfp.cluster.modes.states = ("RUNNING",)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KFP_ENDPOINT": kfp.endpoint, "COLUMNS": "200"}
    command = [sys.executable, "-m", "pipelines.cli", "submit", *JOB, "--name", "n", "--poll-s", "0.05"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "run n: RUNNING" in line:
                break
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(timeout=60) == 2
    assert "submit again with --name n to follow it again" in said
    assert "Traceback" not in said
    assert kfp.cluster.report()["present"] == 1


# -- schedule ------------------------------------------------------------------------------


def test_a_schedule_from_beginning_to_end(quarantine: Call, kfp: KfpServer) -> None:
    words = ("schedule", "set", "nightly", *JOB, "--cron", "0 2 * * *", "--json")
    facts = json.loads(quarantine(*words)[1])
    assert (facts["action"], facts["cron"], facts["enabled"], facts["max_concurrency"], facts["catch_up"]) == (
        "created",
        "0 0 2 * * *",
        True,
        1,
        False,
    )
    assert json.loads(quarantine(*words)[1])["action"] == "unchanged"
    replaced = json.loads(quarantine(*words, "--seed", "1")[1])
    assert (replaced["action"], replaced["removed"]) == ("replaced", [facts["schedule_id"]])
    assert "disabled: nightly" in quarantine("schedule", "disable", "nightly")[1]
    (listed,) = json.loads(quarantine("schedule", "list", "--json")[1])
    assert (listed["name"], listed["enabled"]) == ("nightly", False)
    assert "enabled: nightly" in quarantine("schedule", "enable", "nightly")[1]
    assert "nightly" in quarantine("schedule", "list")[1]
    code, out, _ = quarantine("schedule", "delete", "nightly", "--json")
    assert (code, json.loads(out)["removed"]) == (0, [replaced["schedule_id"]])
    code, out, _ = quarantine("schedule", "delete", "nightly")
    assert (code, out) == (0, "no schedule is called nightly\n")
    assert kfp.cluster.records["recurring_runs"] == {}
    assert kfp.cluster.records["runs"] == {}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("schedule", "set", "n", *JOB, "--cron", "at noon"), "the cron expression is malformed"),
        (("schedule", "set", "n", *JOB), "--cron"),
        (("schedule", "set", "n\n", *JOB, "--cron", "0 2 * * *"), "the schedule's name"),
        (("schedule", "enable", "nothing"), "no schedule is called nothing"),
        (("schedule", "disable", "nothing"), "no schedule is called nothing"),
    ],
)
def test_bad_schedules(quarantine: Call, kfp: KfpServer, words: tuple[str, ...], said: str) -> None:
    code, _, err = quarantine(*words)
    assert code == 3
    assert said in err.replace("\n", " ")
    assert kfp.cluster.records["pipeline_versions"] == {}
