"""Every component has a README that its signature and metadata give, and a short body."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml

from components.generate_readmes import HERE, component_names, outdated

STEPS = [
    "attest_promotion",
    "control_model",
    "evaluate_model",
    "export_onnx",
    "fetch_model",
    "gate_promotion",
    "promote_model",
    "purify_model",
    "reopen_release",
    "report",
    "scan_backdoor",
    "select_model",
    "sign_evidence",
]


def test_every_step_is_a_component() -> None:
    assert component_names() == STEPS


def test_readmes_are_up_to_date() -> None:
    assert outdated() == []


@pytest.mark.parametrize("name", STEPS)
def test_a_component_is_a_signature_and_a_call(name: str) -> None:
    tree = ast.parse((HERE / name / "component.py").read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    body = function.body[1:]
    assert body[-1].end_lineno is not None
    assert body[-1].end_lineno - body[0].lineno < 30
    imported = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imported}
    assert modules <= {"kfp", "typing", "components._runtime.image"}


@pytest.mark.parametrize("name", STEPS)
def test_metadata_is_complete(name: str) -> None:
    metadata = yaml.safe_load(Path(HERE / name / "metadata.yaml").read_text())
    assert set(metadata) == {"name", "step", "stability", "imports", "reaches", "resources"}
    assert metadata["name"] == name
    assert set(metadata["resources"]) == {"cpu_request", "memory_request", "memory_limit"}
