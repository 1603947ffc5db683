"""The steps that talk to MLflow: promote and report, on an SQLite store."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from components._runtime import journal
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.plan import RunSettings, identity_of
from components._runtime.statements import Destination
from components._runtime.step import failure_record
from components._runtime.store import open_store
from components.attest_promotion.step import attest_promotion
from components.gate_promotion.step import gate_promotion
from components.promote_model.step import promote_model
from components.report.step import report_run
from defense_core import errors
from defense_core.policy import parse_policy
from tests.finished_chain import Chain, make_release
from tests.integration.mlflow_stores import alias_of
from tests.small_model import DENYING, POLICY


def moved(chain: Chain, decision: Path) -> Path:
    """The chain's folder with another decision in it."""
    shutil.rmtree(chain["decision"])
    decision.rename(chain["decision"])
    return chain.root


def promoted(chain: Chain, connection: MlflowConnection, name: str) -> dict[str, Any]:
    signed(chain, name)
    return promote_model(chain["release"], name=name, alias="champion", connection=connection)


def signed(chain: Chain, name: str) -> dict[str, Any]:
    if chain["release"].exists():
        shutil.rmtree(chain["release"])
    return make_release(chain, chain["release"], None, destination=Destination(name, "champion"))


def decided(chain: Chain, tmp_path: Path, policy: dict[str, Any]) -> Chain:
    """The chain under another policy."""
    evidence = json.loads(json.dumps(chain.evidence))
    evidence["fetch"]["inputs"]["policy"] = parse_policy(policy).digest
    gate_promotion(evidence, policy, tmp_path / "judged")
    (chain["decision"]).rename(tmp_path / "old")
    (tmp_path / "judged").rename(chain["decision"])
    return replace(chain, evidence=evidence)


def test_allow_moves_the_alias_once(chain: Chain, connection: MlflowConnection) -> None:
    first = promoted(chain, connection, "allowed")
    again = promoted(chain, connection, "allowed")
    assert first["results"]["alias_moved"]
    assert alias_of(connection, "allowed") == first["results"]["version"] == again["results"]["version"]
    assert again["results"]["reused"]
    assert first["inputs"]["model"] == chain.evidence["select"]["outputs"]["model"]


@pytest.mark.parametrize("days", [1e6, 1e300])
def test_a_policy_may_permit_evidence_of_any_age(
    chain: Chain, connection: MlflowConnection, tmp_path: Path, days: float
) -> None:
    patient = {**POLICY, "require": {**POLICY.get("require", {}), "max_evidence_age_days": days}}
    evidence = promoted(decided(chain, tmp_path, patient), connection, f"patient-{days:.0e}".replace("+", ""))
    assert evidence["results"]["outcome"] == "allow"


def test_deny_quarantines_and_moves_nothing(chain: Chain, connection: MlflowConnection, tmp_path: Path) -> None:
    evidence = promoted(decided(chain, tmp_path, DENYING), connection, "denied")
    assert evidence["results"]["outcome"] == "deny"
    assert evidence["results"]["decision"] == "quarantined"
    assert alias_of(connection, "denied") is None


def test_a_policy_that_observes_registers_nothing(chain: Chain, connection: MlflowConnection, tmp_path: Path) -> None:
    evidence = promoted(decided(chain, tmp_path, {**POLICY, "promote": False}), connection, "observed")
    assert evidence["results"]["registered"] is False
    assert not connection.client.search_registered_models("name = 'observed'")


@pytest.mark.parametrize(
    ("damaged", "error"),
    [
        ("onnx/model.onnx", errors.DigestMismatch),
        ("selected/model.safetensors", errors.DigestMismatch),
        ("selected/bundle.json", errors.CorruptArtifact),
    ],
)
def test_other_files_than_decided_become_no_release(damaged: str, error: type[Exception], chain: Chain) -> None:
    path = chain[damaged]
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    with pytest.raises(error):
        signed(chain, "tampered")
    assert not chain["release"].exists()


def forge(path: Path) -> None:
    """Turn the denial at ``path`` into a permission."""
    said = path.read_text()
    assert '"outcome":"deny"' in said
    path.write_text(said.replace('"outcome":"deny"', '"outcome":"allow"'))


def test_an_edited_decision_becomes_no_release(chain: Chain, tmp_path: Path) -> None:
    denied = decided(chain, tmp_path, DENYING)
    forge(denied["decision"] / "decision.json")
    with pytest.raises(errors.EvidenceMismatch):
        signed(denied, "forged")
    assert not chain["release"].exists()


def test_a_decision_that_was_edited_in_an_unsigned_release_is_not_carried_out(
    chain: Chain, connection: MlflowConnection, tmp_path: Path
) -> None:
    denied = decided(chain, tmp_path, DENYING)
    signed(denied, "forged")
    forge(denied["release"] / "evidence" / "decision.json")
    with pytest.raises(errors.EvidenceMismatch):
        promote_model(denied["release"], name="forged", alias="champion", connection=connection)
    assert not connection.client.search_registered_models("name = 'forged'")


def test_another_policy_than_the_runs_becomes_no_release(chain: Chain, tmp_path: Path) -> None:
    # The decision replays, but fetch speaks of the strict policy.
    gate_promotion(chain.evidence, {**POLICY, "name": "swapped"}, tmp_path / "judged")
    with pytest.raises(errors.EvidenceMismatch, match="another policy"):
        signed(replace(chain, root=moved(chain, tmp_path / "judged")), "swapped")
    assert not chain["release"].exists()


def at_the_age(chain: Chain, tmp_path: Path, policy: dict[str, Any], *, days: float) -> Chain:
    """The chain as it was made and decided so many days ago."""
    at = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    evidence = json.loads(json.dumps(chain.evidence))
    for each in evidence.values():
        each["environment"]["started"] = at
    evidence["fetch"]["inputs"]["policy"] = parse_policy(policy).digest
    shutil.rmtree(chain["decision"])
    gate_promotion(evidence, policy, chain["decision"], at=at)
    return replace(chain, evidence=evidence)


def test_a_decision_that_is_older_than_the_policy_permits_is_followed_by_a_version_of_its_own(
    chain: Chain, connection: MlflowConnection, tmp_path: Path
) -> None:
    policy = {**POLICY, "require": {"max_evidence_age_days": 1}}
    made = [
        promoted(at_the_age(chain, tmp_path, policy, days=days), connection, "renewed")["results"]
        for days in (3, 2.5, 0)
    ]
    assert [each["version"] for each in made] == ["1", "1", "2"]
    assert [each["reused"] for each in made] == [False, True, False]
    assert alias_of(connection, "renewed") == "2"


def test_a_decision_from_the_future_is_refused(chain: Chain, connection: MlflowConnection, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    for name, ahead_s in (("early", 600), ("skewed", 200)):
        at = (now + timedelta(seconds=ahead_s)).isoformat(timespec="seconds")
        gate_promotion(chain.evidence, chain.plan.policy, tmp_path / name, at=at)
        moved(chain, tmp_path / name)
        if name == "skewed":
            assert promoted(chain, connection, name)["results"]["decision"] == "allow"
            continue
        with pytest.raises(errors.EvidenceMismatch, match="the decision is from the future"):
            promoted(chain, connection, name)
        assert not connection.client.search_registered_models(f"name = '{name}'")


@pytest.mark.parametrize(
    ("damaged", "error"),
    [
        ("model.onnx", errors.DigestMismatch),
        ("MLmodel", errors.DigestMismatch),
        ("bundle/model.safetensors", errors.DigestMismatch),
        ("evidence/fetch.json", errors.EvidenceMismatch),
        ("code/evil.py", errors.DigestMismatch),
    ],
)
def test_a_release_that_was_changed_after_signing_is_not_registered(
    damaged: str, error: type[Exception], chain: Chain, connection: MlflowConnection
) -> None:
    signed(chain, "altered")
    path = chain["release"] / damaged
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"altered")
    with pytest.raises(error):
        promote_model(chain["release"], name="altered", alias="champion", connection=connection)
    assert not connection.client.search_registered_models("name = 'altered'")


# -- report ----------------------------------------------------------------------------


@pytest.fixture
def environment(connection: MlflowConnection) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": connection.settings.tracking_uri}


def test_the_report_logs_every_number(
    chain: Chain, connection: MlflowConnection, environment: dict[str, str], tmp_path: Path
) -> None:
    settings = RunSettings(evidence=str(tmp_path / "store"), model_name="m", name="whole")
    store = open_store(settings.evidence, settings.name)
    gate = gate_promotion(chain.evidence, POLICY)
    done = promoted(chain, connection, "reported")
    stated, _ = attest_promotion(done, None)
    for evidence in (*chain.evidence.values(), gate, signed(chain, "reported"), done, stated):
        store.put(evidence)
    journal.begin(connection, chain.plan, settings, chain.evidence["fetch"])
    outcome = report_run(settings, store, tmp_path / "page.html", environment=environment)
    assert (outcome.decision, outcome.failed_step, outcome.exit_code) == ("allow", "", 0)
    page = (tmp_path / "page.html").read_text()
    assert page == (tmp_path / "store" / "whole" / "report.html").read_text()
    assert chain.evidence["export"]["outputs"]["onnx"].removeprefix("sha256:") in page
    run = connection.client.get_run(journal.parent_run(connection, identity_of(chain.evidence["fetch"])).run_id)
    assert run.data.tags["quarantine.decision"] == "allow"
    assert run.data.metrics["before/acc"] == chain.evidence["evaluate.before"]["results"]["acc"]["value"]
    nested = connection.client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.info.run_id}'")
    assert {each.info.run_name for each in nested} == {"tsbd", "fine_tuning"}
    for each in nested:
        measured = chain.evidence[f"evaluate.{each.info.run_name}"]["results"]
        assert each.data.metrics["asr/badnets"] == measured["probes"][0]["asr"]["value"]
        assert each.data.params["config.epochs"] == "1"
    # Once more, as a retried exit handler would: nothing contradicts.
    assert report_run(settings, store, None, environment=environment) == outcome


@pytest.mark.parametrize("recorded", [True, False])
def test_the_report_of_a_run_that_failed_at_once(recorded: bool, environment: dict[str, str], tmp_path: Path) -> None:
    settings = RunSettings(evidence=str(tmp_path), model_name="m", name=f"failed-{recorded}")
    store = open_store(settings.evidence, settings.name)
    why = "bucket nowhere does not exist"
    if recorded:
        store.put_failure("fetch", failure_record("fetch", errors.SourceNotFound(why)))
    outcome = report_run(settings, store, None, environment=environment, orchestrator_message="" if recorded else why)
    assert outcome.failed_step == "fetch"
    assert outcome.exit_code == (errors.EXIT_USAGE if recorded else errors.EXIT_UNKNOWN)
    page = (tmp_path / settings.name / "report.html").read_text()
    assert "fetch" in page
    assert why in page


def test_the_report_is_written_though_mlflow_is_down(finished: Chain, tmp_path: Path) -> None:
    settings = RunSettings(evidence=str(tmp_path), model_name="m", name="down")
    store = open_store(settings.evidence, settings.name)
    store.put(finished.evidence["fetch"])
    # A folder is no database.
    (tmp_path / "mlflow.db").mkdir()
    with pytest.raises(errors.RegistryUnavailable):
        report_run(settings, store, None, environment={"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"})
    assert (tmp_path / "down" / "report.html").is_file()
