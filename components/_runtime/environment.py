"""Environment variables for a run on this machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

SOURCES = Path(__file__).resolve().parent.parent.parent
"""The folder that holds ``components``, ``pipelines`` and ``defense_core``."""

DATABASE = "mlflow.db"


@dataclass(frozen=True)
class LocalEnvironment:
    """Variables for the processes of a run.

    Attributes:
        variables: the whole environment.
        tracking_uri: where MLflow's records go.
    """

    variables: Mapping[str, str]
    tracking_uri: str


def local_environment(work: Path, further: Mapping[str, str] = MappingProxyType({})) -> LocalEnvironment:
    """This process's environment and ``further``, in which the steps find this code and an MLflow.

    Without ``MLFLOW_TRACKING_URI`` that is an SQLite file in ``work``.
    """
    variables = {**os.environ, **further}
    tracking_uri = variables.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(work).absolute() / DATABASE}"
    paths = [str(SOURCES), variables.get("PYTHONPATH", "")]
    variables |= {
        "MLFLOW_TRACKING_URI": tracking_uri,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        # What the steps log is read line by line.
        "PYTHONUNBUFFERED": "1",
    }
    # Purifications run two at a time; with all cores each they slow one another many times over.
    variables.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    return LocalEnvironment(variables, tracking_uri)
