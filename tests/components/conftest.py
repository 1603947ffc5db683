"""A tiny model with its images, and what each step makes of them, once a session."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from components._runtime.plan import Plan
from components.evaluate_model.step import evaluate_candidate
from components.export_onnx.step import export_onnx
from components.fetch_model.step import fetch_model
from components.gate_promotion.step import gate_promotion
from components.purify_model.step import purify_candidate
from components.select_model.step import select_model
from tests.finished_chain import Chain
from tests.small_model import PLAN_OPTIONS, make_inputs


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(plan, tmp_path_factory.mktemp("chain"), {})
    made = [fetch_model(plan, chain["bundle"], chain["data"])]
    measured: dict[str, Any] = {**chain.images, "probes": plan.probes}
    made.append(evaluate_candidate(chain["bundle"], name="before", **measured))
    for method in plan.methods:
        made.append(
            purify_candidate(
                chain["bundle"],
                chain["data"] / "clean.npz",
                chain[method],
                method=method,
                config=plan.configs[method],
                report=0.0,
            )
        )
        made.append(evaluate_candidate(chain[method], name=method, reference=chain["bundle"], **measured))
    made.append(select_model([chain[method] for method in plan.methods], chain["selected"], order=plan.methods))
    made.append(export_onnx(chain["selected"], chain["onnx"], **{k: v for k, v in measured.items() if k != "device"}))
    chain.evidence.update({each["name"]: each for each in made})
    gate_promotion(chain.evidence, plan.policy, chain["decision"])
    return chain


@pytest.fixture
def chain(finished: Chain, tmp_path: Path) -> Chain:
    """A copy that a test may damage."""
    shutil.copytree(finished.root, tmp_path / "chain")
    return Chain(finished.plan, tmp_path / "chain", dict(finished.evidence))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A state dict of the small network."""
    return safetensors.torch.load(safetensors.torch.save(PLAN_OPTIONS.network().state_dict()))
