"""What a step makes of its pod: an accelerator that it cannot use, an identity that is not its own."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from components._runtime.evidence import Clock, compose
from components._runtime.loading import resolve_device
from components._runtime.plan import RunSettings
from components._runtime.pod import check_identity
from components._runtime.step import step_scope
from defense_core.errors import EXIT_USAGE, ConfigError

ACCOUNT = {"QUARANTINE_SERVICE_ACCOUNT": "quarantine-promote", "QUARANTINE_SERVICE_ACCOUNT_ASKED": "quarantine-promote"}


@pytest.mark.parametrize("environment", [{}, ACCOUNT, {"QUARANTINE_SERVICE_ACCOUNT": "anybody"}])
def test_an_identity_that_is_as_asked(environment: dict[str, str]) -> None:
    check_identity(environment)


@pytest.mark.parametrize("found", ["default-editor", ""])
def test_another_identity_stops_the_step(found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**ACCOUNT, "QUARANTINE_SERVICE_ACCOUNT": found}
    with pytest.raises(ConfigError, match="another service account") as refused:
        check_identity(wrong)
    assert refused.value.expected == "quarantine-promote"
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    run = RunSettings(evidence=str(tmp_path), model_name="m", alias="champion", name="first").to_json()
    with pytest.raises(SystemExit) as ended, step_scope("promote", run):
        pytest.fail("the step must not begin")
    assert ended.value.code == EXIT_USAGE
    failure = json.loads((tmp_path / "first" / "promote.failed.json").read_text())
    assert failure["expected"] == "quarantine-promote"
    assert "admission.yaml" in failure["hint"]


def test_evidence_says_what_the_pod_was_given_and_what_the_step_ran_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("QUARANTINE_ACCELERATOR", raising=False)
    monkeypatch.setattr(logging.getLogger("quarantine"), "propagate", True)

    def environment() -> dict[str, object]:
        evidence = compose("purify.tsbd", Clock.start(), inputs={}, results={}, device=resolve_device("auto"))
        found: dict[str, object] = evidence["environment"]
        return found

    assert (environment()["device"], environment()["accelerator"]) == ("cpu", None)
    assert not caplog.records
    monkeypatch.setenv("QUARANTINE_ACCELERATOR", "nvidia.com/gpu=1")
    assert (environment()["device"], environment()["accelerator"]) == ("cpu", "nvidia.com/gpu=1")
    assert "nvidia.com/gpu=1, but PyTorch can use no GPU: this step runs on the CPU" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (environment()["device"], environment()["accelerator"]) == ("cuda", "nvidia.com/gpu=1")


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert resolve_device(name) == name
    for name in ("cuda:2", "cuda:-1", "cuda:x", "cudamax", "cuda:"):
        with pytest.raises(ConfigError, match="not usable") as refused:
            resolve_device(name)
        assert refused.value.expected == "auto, cpu, cuda, cuda:0, cuda:1"
    with pytest.raises(ConfigError, match="unknown"):
        resolve_device("gpu")
