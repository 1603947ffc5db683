"""Fixtures and small functions of the tests of the sweep."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components._runtime.mlflow_connection import MlflowConnection
from defense_core.policy import Policy
from pipelines.sweep import SweepReport, open_memory, sweep
from pipelines.sweep_memory import SweepMemory
from pipelines.sweep_scope import Scope
from pipelines.triggers.keys import WorkKey
from pipelines.triggers.queue import Queue
from tests.integration.releases import interposed
from tests.pipelines.sweep.registry import NOW_S, decided, incoming, policy, policy_mapping

RULE = {"models": ["vis*"], "register": "clean", "plan": {"clean": "c.npz", "policy": policy_mapping()}}


@pytest.fixture
def connection(mlflow_sqlite: MlflowConnection) -> MlflowConnection:
    return mlflow_sqlite


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[Queue]:
    opened = Queue.open(f"sqlite:///{tmp_path / 'queue.db'}", clock=lambda: NOW_S)
    yield opened
    opened.close()


@pytest.fixture
def memory(connection: MlflowConnection, tmp_path: Path) -> Iterator[SweepMemory]:
    opened = open_memory(connection, tmp_path / "memory.db")
    yield opened
    opened.close()


def one_policy(by: Policy | None = None, **changes: Any) -> Scope:
    return Scope(policy=by or policy(), aliases=("champion",), **changes)


def swept(
    connection: MlflowConnection, memory: SweepMemory, scope: Scope | None = None, *, now_s: float = NOW_S, **how: Any
) -> SweepReport:
    return sweep(connection, memory, scope or one_policy(), clock=lambda: now_s, **how)


def named(report: SweepReport, kind: str) -> list[tuple[str, str]]:
    return [(each.model, each.version) for each in report.findings if each.kind == kind]


def keys(queue: Queue) -> list[WorkKey]:
    return [item.key for item in queue.claim(1000, lease_s=60)]


@pytest.fixture
def drifted(connection: MlflowConnection, tmp_path: Path) -> dict[str, str]:
    """Two allowed versions and a stranger's; the alias was moved to the stranger's by hand."""
    numbers = {
        "first": decided(connection, tmp_path, "clean", origin="s3://in/a.pt"),
        "second": decided(connection, tmp_path, "clean", origin="s3://in/b.pt"),
        "stranger": incoming(connection, "clean")[0],
    }
    connection.client.set_registered_model_alias("clean", "champion", numbers["stranger"])
    connection.client.set_registered_model_alias("clean", "canary", numbers["stranger"])
    return numbers


def aliases(connection: MlflowConnection, name: str = "clean") -> dict[str, str]:
    return {alias: str(number) for alias, number in connection.client.get_registered_model(name).aliases.items()}


def counted(connection: MlflowConnection) -> tuple[MlflowConnection, list[str]]:
    calls: list[str] = []

    def count(number: int, name: str, when: str) -> None:
        if when == "before":
            calls.append(name)

    return interposed(connection, count), calls
