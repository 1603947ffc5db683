"""Submission to a server that checks every request against the published KFP API; versions of a real MLflow store."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import yaml

from defense_core.errors import ConfigError, QuarantineError
from pipelines.kfp_settings import KfpSettings
from pipelines.triggers.kfp_submitter import KfpSubmitter, Target, written_package
from pipelines.triggers.orders import Order, Unsubmittable
from pipelines.triggers.queue import Queue
from pipelines.triggers.records import Delivery
from pipelines.triggers.registry import MlflowRegistry
from tests.pipelines.kfp_server.http_server import KfpServer
from tests.triggers.fakes import drain, make_worker, quiet_log, watch


@pytest.fixture
def server():
    with KfpServer() as running:
        yield running


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    from pipelines.compile import compile_to

    return compile_to(tmp_path_factory.mktemp("compiled")).written[0]


def submitter(server, package, log=None, **settings):
    fast = {"attempts": 2, "retry_wait_s": 0.01, "retry_wait_max_s": 0.02, "connect_timeout_s": 2.0, **settings}
    settings = KfpSettings(endpoint=server.endpoint, **fast)
    return KfpSubmitter(Target(settings, written_package(package, "")), log=log or quiet_log())


def order(name="vision-a-1-abc", clean=None):
    rules = watch()
    plan = replace(rules.rules[0].plan, model="models:/vision-a/1", **({"clean": clean} if clean else {}))
    return Order(name, plan, rules.settings_of(rules.rules[0]))


def test_one_name_is_one_run(server, package):
    one, other = submitter(server, package), submitter(server, package)
    assert one.submit(order()) == other.submit(order()) == one.submit(order())
    assert one.submit(order("vision-a-2-abc")) != one.submit(order())
    report = server.cluster.report()
    assert (report["created"], report["violations"]) == (2, [])


def test_a_run_is_at_work_until_it_has_ended(server, package):
    worker = submitter(server, package)
    assert not worker.at_work("vision-a-1-abc")
    worker.submit(order())
    assert worker.at_work("vision-a-1-abc")
    assert not worker.at_work("vision-a-1-ab")
    (run,) = server.cluster.records["runs"].values()
    run["state"] = "FAILED"
    assert not worker.at_work("vision-a-1-abc")


def test_settings_of_the_scan_reach_the_run(server, package):
    wanted = order()
    plan = replace(wanted.plan, pool="s3://data/pool.json", scan={"fpr": 0.01})
    submitter(server, package).submit(replace(wanted, plan=plan))
    (run,) = server.cluster.records["runs"].values()
    parameters = run["runtime_config"]["parameters"]
    assert (parameters["pool"], parameters["scan"]) == ("s3://data/pool.json", '{"fpr": 0.01}')


def test_run_that_was_there_with_other_settings_is_taken_and_said(server, package):
    log = io.StringIO()
    first = submitter(server, package).submit(order())
    assert submitter(server, package, quiet_log(log)).submit(order(clean="s3://data/new.npz")) == first
    assert "run was there" in log.getvalue()


def test_run_whose_answer_was_lost_is_found(server, package):
    worker = submitter(server, package)
    worker.submit(order("first"))
    server.cluster.modes.lose["run_service_create_run"] = 1
    assert worker.submit(order("second"))
    assert server.cluster.report()["created"] == 2


def test_pipeline_that_was_removed_is_uploaded_again(server, package):
    worker = submitter(server, package)
    worker.submit(order("first"))
    for kind in ("pipelines", "pipeline_versions"):
        for key in list(server.cluster.records[kind]):
            server.cluster._drop(kind, server.cluster.records[kind][key])
    with pytest.raises(QuarantineError):
        worker.submit(order("second"))
    assert worker.submit(order("second"))


def test_refused_parameters_are_refused_for_good(server, package, tmp_path):
    definition = yaml.safe_load(package.read_text())
    del definition["root"]["inputDefinitions"]["parameters"]["device"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(definition))
    with pytest.raises(Unsubmittable):
        submitter(server, tmp_path / "other.yaml").submit(order())


@pytest.mark.parametrize("content", [None, "", "pipelineInfo:\n", "name: model-quarantine\n"])
def test_file_that_is_no_pipeline_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "p.yaml").write_text(content)
    with pytest.raises(ConfigError):
        written_package(tmp_path / "p.yaml", "")


def test_compiled_pipeline_is_recognised(package):
    found, account = written_package(package, "")()
    assert (found.name, found.data, account) == ("model-quarantine", package.read_bytes(), "")


def test_from_a_registered_version_to_a_run_with_a_real_store(server, package, tmp_path, monkeypatch):
    from components._runtime.mlflow_connection import MlflowSettings, connect

    monkeypatch.delenv("MLFLOW_REGISTRY_URI", raising=False)
    settings = MlflowSettings(f"sqlite:///{tmp_path}/mlflow.db")
    client = connect(settings).client
    client.create_registered_model("vision-a")
    made = client.create_model_version("vision-a", "s3://models/a", tags={"team": "x"})
    client.set_registered_model_alias("vision-a", "candidate", made.version)
    registry = MlflowRegistry(settings)
    found = registry.look_up("vision-a", "1")
    assert (found.source, found.status, found.tags, found.aliases) == (
        "s3://models/a",
        "READY",
        {"team": "x"},
        ("candidate",),
    )
    listed = client.search_model_versions("name = 'vision-a'")[0]
    assert watch().key(listed) == watch().key(found), "the sweep, which lists, and the worker agree on the key"
    assert registry.look_up("vision-a", "2") is None
    assert registry.look_up("no such model", "1") is None

    queue = Queue.open(f"sqlite:///{tmp_path}/queue.db")
    queue.record([Delivery("d1", "vision-a", "1"), Delivery("d2", "vision-a", "9")])
    drain(make_worker(queue, registry, submitter(server, package)), queue)
    (run,) = server.cluster.report()["runs"]
    assert run["display_name"].startswith("vision-a-1-")
    queue.close()
