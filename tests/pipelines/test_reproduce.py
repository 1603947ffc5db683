"""The command that a report gives for doing a run again asks for the same run."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components._runtime.plan import Loading, Plan
from components.fetch_model.step import fetch_model
from defense_core.errors import Cancelled
from defense_core.limits import LoadLimits
from defense_core.report import build_report
from pipelines import local
from tests.pipelines.commands import Call
from tests.small_model import PLAN_OPTIONS, make_inputs


def test_the_same_run_is_asked_for(quarantine: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(
        make_inputs(tmp_path / "inputs"),
        spec={**PLAN_OPTIONS.spec, "class_names": ["a", "b", "c", "d"], "augment": "none"},
        probes=(),
        methods=("tsbd",),
        configs={"tsbd": {"epochs": 1, "unlearn_epochs": 1}},
        scan={**PLAN_OPTIONS.scan, "fpr": 0.01, "budget_s": 60.0},
        licence="MIT",
        seed=7,
        loading=Loading(limits=LoadLimits(max_bytes=1 << 20, timeout_s=50.0)),
    )
    fetched = fetch_model(plan, tmp_path / "bundle", tmp_path / "data")
    promoted = {"name": "doors", "alias": "challenger", "version": "1"}
    evidence = {"fetch": fetched, "promote": {"name": "promote", "inputs": {}, "outputs": {}, "results": promoted}}
    line = build_report(evidence).commands[0].line
    placed = {"CLEAN_SET": plan.clean, "TEST_SET": plan.test, "POLICY.yaml": "standard"}
    words = [placed.get(word, word) for word in shlex.split(line.replace("\\\n", ""))[1:]]
    seen: dict[str, Any] = {}

    def stopped(asked: Plan, out: Path, **options: Any) -> None:
        seen.update(options, plan=asked)
        raise Cancelled("that was what is wanted")

    monkeypatch.setattr(local, "run_local", stopped)
    assert "that was what is wanted" in quarantine(*words).err
    again = seen["plan"]
    for field in ("clean", "test", "methods", "configs", "scan", "licence", "seed", "device", "loading"):
        assert getattr(again, field) == getattr(plan, field), field
    assert {**again.spec, "num_classes": 4} == {**plan.spec}
    assert (seen["model_name"], seen["alias"]) == ("doors", "challenger")
