"""The whole pipeline by kfp.local on a tiny model: allowed, denied, failed, stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect
from components._runtime.plan import Loading, Plan
from components._runtime.signing_keys import (
    CERTIFICATE_VARIABLE,
    CHAIN_VARIABLE,
    KEY_VARIABLE,
    PUBLIC_KEY_VARIABLE,
    TrustedSigner,
    generate_key_pair,
)
from components._runtime.verification import verify_release
from components._runtime.verification_registry import verify_registered
from defense_core.errors import EXIT_FAIL, EXIT_PASS, EXIT_UNKNOWN, ConfigError, OutputExists
from defense_core.verdict import Verdict
from pipelines.local import LocalRun, run_local
from tests.certificates import make_certificates
from tests.small_model import DENYING, PLAN_OPTIONS, make_inputs
from tests.small_pool import RATE, make_pool

STEPS = {"fetch", "scan", "select", "rescan", "export", "gate", "sign", "promote", "attest"} | {
    f"{step}.{method}" for step in ("purify", "evaluate") for method in ("tsbd", "fine_tuning")
}
MIXED = {"purify.nft", "evaluate.nft", "purify.soup", "evaluate.soup"}
WITH_SOUP: dict[str, Any] = {
    "methods": ("tsbd", "nft", "soup", "fine_tuning"),
    "configs": {**PLAN_OPTIONS.configs, "nft": {"epochs": 1}},
}


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(tmp_path: Path, **changes: Any) -> LocalRun:
    plan = make_inputs(tmp_path / "inputs", **changes)
    return run_local(plan, tmp_path / "work", model_name="digits", name="first")


def read(ended: LocalRun, name: str) -> dict[str, Any]:
    evidence: dict[str, Any] = json.loads((ended.evidence / f"{name}.json").read_text())
    return evidence


def found_nothing(folder: Path) -> dict[str, Any]:
    """Changes to a plan by which the scan passes the small model."""
    make_pool(folder / "pool.json", shift=100.0)
    return {"pool": str(folder / "pool.json"), "scan": {**PLAN_OPTIONS.scan, "fpr": RATE}}


def registry(ended: LocalRun) -> Any:
    return connect(MlflowSettings(ended.tracking_uri)).client


def test_a_run_that_is_allowed(tmp_path: Path) -> None:
    said: list[str] = []
    plan = make_inputs(tmp_path / "inputs", **WITH_SOUP)
    keys = generate_key_pair(tmp_path / "keys")
    ended = run_local(
        plan, tmp_path / "work", model_name="digits", name="first", signing_key=keys.private, on_line=said.append
    )
    assert (ended.outcome.decision, ended.outcome.failed_step, ended.exit_code) == ("allow", "", EXIT_PASS), (
        ended.log.read_text()[-3000:]
    )
    assert {path.stem for path in ended.evidence.glob("*.json")} == STEPS | MIXED | {
        "evaluate.before",
        "report",
        "promotion",
    }
    members = {name: read(ended, f"purify.{name}")["outputs"]["model"] for name in ("nft", "tsbd")}
    assert read(ended, "purify.soup")["inputs"]["members"] == members
    assert {row["method"] for row in read(ended, "select")["results"]["candidates"]} == set(plan.methods)
    assert ended.report is not None
    assert "allow" in json.loads((ended.evidence / "report.json").read_text())["outcome"]
    assert ended.promotion is not None
    assert ended.promotion["alias_moved"]
    assert ended.promotion["signed"] is True, "by the public half of the key that signs"
    settings = MlflowSettings(ended.tracking_uri)
    client = connect(settings).client
    assert str(client.get_registered_model("digits").aliases["champion"]) == ended.promotion["version"]
    (parent,) = [
        each
        for each in client.search_runs([client.get_experiment_by_name("model-quarantine").experiment_id])
        if "mlflow.parentRunId" not in each.data.tags
    ]
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["quarantine.execution"] == "first"
    assert ended.signed == {"signed": True, "key_id": keys.key_id, "statements": 16}
    trusted = TrustedSigner(public_key=keys.public)
    assert ended.release is not None
    assert verify_release(ended.release, trusted).verdict is Verdict.PASS
    registered = verify_registered(MlflowConnection(settings, client), "models:/digits@champion", trusted)
    assert registered.verdict is Verdict.PASS, registered.differences
    assert "verify.promotion" in {finding.rule for finding in registered.findings}
    assert ended.statement == ended.evidence / "promotion.json"
    secret = keys.private.read_text().splitlines()[1]
    assert not any(
        secret in path.read_text(errors="replace") for path in (tmp_path / "work").rglob("*") if path.is_file()
    )
    assert "promote: PASS" in said
    assert not any("KFP" in line for line in said)
    sources = {json.loads(path.read_text())["inputs"]["source"] for path in ended.evidence.glob("[efgs]*.json")}
    assert len(sources) == 1
    with pytest.raises(OutputExists, match="first"):
        run_local(plan, tmp_path / "work", model_name="digits", name="first")


def test_a_key_that_cannot_sign_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    plan = make_inputs(tmp_path / "inputs")
    with pytest.raises(ConfigError, match="signing key"):
        run_local(plan, tmp_path / "work", model_name="digits", signing_key=tmp_path / "gone.key")
    assert not (tmp_path / "work" / "artifacts").exists()


def test_a_key_that_promotion_does_not_trust_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_inputs(tmp_path / "inputs")
    keys, other = generate_key_pair(tmp_path / "keys"), generate_key_pair(tmp_path / "other")
    monkeypatch.setenv(PUBLIC_KEY_VARIABLE, str(other.public))
    with pytest.raises(ConfigError, match="of another key"):
        run_local(plan, tmp_path / "work", model_name="digits", signing_key=keys.private)
    assert not (tmp_path / "work" / "artifacts").exists()


def test_a_run_without_key_ends_before_it_begins_where_promotion_trusts_somebody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_inputs(tmp_path / "inputs")
    monkeypatch.setenv(PUBLIC_KEY_VARIABLE, str(generate_key_pair(tmp_path / "keys").public))
    with pytest.raises(ConfigError, match="no key to sign with"):
        run_local(plan, tmp_path / "work", model_name="digits")
    assert not (tmp_path / "work" / "artifacts").exists()


def test_a_certificate_that_nobody_could_check_ends_the_run_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_inputs(tmp_path / "inputs")
    made = make_certificates(tmp_path / "keys")
    monkeypatch.setenv(KEY_VARIABLE, str(made.key))
    monkeypatch.setenv(CERTIFICATE_VARIABLE, str(made.certificate))
    strict = replace(plan, policy={**plan.policy, "require": {"signatures": ["model"]}})
    with pytest.raises(ConfigError, match=CHAIN_VARIABLE):
        run_local(strict, tmp_path / "work", model_name="digits")
    assert not (tmp_path / "work" / "artifacts").exists()


def test_a_run_that_is_denied(tmp_path: Path) -> None:
    # The scan finds nothing, and the policy has the model purified all the same.
    ended = run(
        tmp_path,
        policy={**DENYING, "require": {"purification": True}},
        methods=("tsbd",),
        configs={"tsbd": {"epochs": 1, "unlearn_epochs": 1}},
        **found_nothing(tmp_path),
    )
    assert (ended.outcome.decision, ended.outcome.failed_step, ended.exit_code) == ("deny", "", EXIT_FAIL), (
        ended.log.read_text()[-3000:]
    )
    assert read(ended, "scan")["verdict"] == "PASS"
    assert read(ended, "select")["results"]["method"] == "tsbd"
    findings = {each["rule"]: each["verdict"] for each in read(ended, "gate")["results"]["findings"]}
    assert findings["require.purification"] == "PASS"
    assert ended.report is not None
    assert "severe" in ended.report.read_text()
    assert ended.promotion is not None
    assert (ended.promotion["decision"], ended.promotion["signed"]) == ("quarantined", False)
    assert ended.signed == {"signed": False, "key_id": None, "statements": 0}
    assert not registry(ended).get_registered_model("digits").aliases


def test_a_model_without_findings_goes_on_as_it_is(tmp_path: Path) -> None:
    keys = generate_key_pair(tmp_path / "keys")
    plan = make_inputs(tmp_path / "inputs", **WITH_SOUP, **found_nothing(tmp_path))
    ended = run_local(plan, tmp_path / "work", model_name="digits", name="first", signing_key=keys.private)
    assert (ended.outcome.decision, ended.outcome.failed_step, ended.exit_code) == ("allow", "", EXIT_PASS), (
        ended.log.read_text()[-3000:]
    )
    branches = {"purify.untouched", "evaluate.untouched"}
    assert {path.stem for path in ended.evidence.glob("*.json")} == branches | {
        each for each in STEPS if "." not in each
    } | {"evaluate.before", "report", "promotion"}
    fetched = read(ended, "fetch")["outputs"]["model"]
    assert read(ended, "select")["outputs"]["model"] == read(ended, "rescan")["inputs"]["model"] == fetched
    assert read(ended, "scan")["inputs"]["pool"] == read(ended, "fetch")["inputs"]["pool"]
    assert read(ended, "rescan")["results"]["repeats"] == f"same bytes as scanned: {fetched}"
    assert ended.report is not None
    assert "the model as it came in, not purified," in ended.report.read_text()
    assert ended.release is not None
    verified = verify_release(ended.release, TrustedSigner(public_key=keys.public))
    assert (verified.verdict, verified.decision) == (Verdict.PASS, "allow")
    client = registry(ended)
    version = client.get_model_version_by_alias("digits", "champion")
    assert version.tags["quarantine.scan"] == "pass"


# It breaks after more training steps than the scan takes.
UNTRAINABLE = """
import torch
from defense_core.networks.small_cnn import SmallCNN

class Untrainable(SmallCNN):
    steps = 0

    def forward(self, inputs):
        self.steps += self.training and torch.is_grad_enabled()
        if self.steps > 20:
            raise RuntimeError("this network cannot be trained")
        return super().forward(inputs)

def network():
    return Untrainable(width=4, num_classes=4, in_channels=1)
"""


def test_a_run_in_which_purification_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An operator's own network, installed and trusted, that breaks as soon as a method trains it.
    (tmp_path / "untrainable_network.py").write_text(UNTRAINABLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    spec = {**PLAN_OPTIONS.spec, "architecture": "untrainable_network:network", "architecture_args": {}}
    ended = run(tmp_path, spec=spec, loading=Loading(trusted_modules=("untrainable_network",)))
    assert ended.outcome.failed_step == "purify.tsbd", ended.log.read_text()[-3000:]
    assert ended.outcome.decision == "none"
    assert ended.exit_code == EXIT_UNKNOWN
    assert ended.report is not None
    page = ended.report.read_text()
    assert "purify.tsbd" in page
    assert "this network cannot be trained" in page
    assert (ended.evidence / "purify.tsbd.failed.json").is_file()
    assert ended.promotion is None
    client = registry(ended)
    assert not client.search_registered_models()
    (parent,) = [
        each
        for each in client.search_runs([client.get_experiment_by_name("model-quarantine").experiment_id])
        if "mlflow.parentRunId" not in each.data.tags
    ]
    assert parent.info.status == "FAILED"
    assert parent.data.tags["quarantine.failed_step"] == ended.outcome.failed_step


def test_a_run_that_is_stopped(tmp_path: Path) -> None:
    def stop(line: str) -> None:
        if line == "fetch begins":
            raise KeyboardInterrupt

    plan: Plan = make_inputs(tmp_path / "inputs")
    ended = run_local(plan, tmp_path / "work", model_name="digits", name="first", on_line=stop)
    assert (ended.outcome.decision, ended.outcome.failed_step, ended.exit_code) == ("none", "fetch", EXIT_UNKNOWN)
    assert "stopped by SIGINT" in ended.outcome.why
    assert ended.report is not None
    assert "SIGINT" in ended.report.read_text()
    assert ended.promotion is None
    assert not list((tmp_path / "work").rglob("model.safetensors"))
