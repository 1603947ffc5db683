"""A tiny model with its images, and what each step makes of them, once a session."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.plan import Plan
from components._runtime.signing_keys import KeyPair, generate_key_pair
from tests.finished_chain import Chain, make_chain, make_release
from tests.integration.mlflow_stores import copied_store
from tests.small_model import PLAN_OPTIONS, make_inputs


@pytest.fixture(scope="module")
def connection(mlflow_template: Path, tmp_path_factory: pytest.TempPathFactory) -> MlflowConnection:
    """An MLflow store that the tests of a module share."""
    return copied_store(mlflow_template, tmp_path_factory.mktemp("mlflow"))


@pytest.fixture(scope="session")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(plan, tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return generate_key_pair(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="session")
def signed(finished: Chain, keys: KeyPair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "release"
    make_release(finished, folder, keys.private)
    return folder


@pytest.fixture
def release(signed: Path, tmp_path: Path) -> Path:
    """A copy of the signed release that a test may damage."""
    shutil.copytree(signed, tmp_path / "release")
    return tmp_path / "release"


@pytest.fixture
def chain(finished: Chain, tmp_path: Path) -> Chain:
    """A copy that a test may damage."""
    shutil.copytree(finished.root, tmp_path / "chain")
    return Chain(finished.plan, tmp_path / "chain", dict(finished.evidence))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A state dict of the small network."""
    return safetensors.torch.load(safetensors.torch.save(PLAN_OPTIONS.network().state_dict()))
