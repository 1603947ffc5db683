"""Runs on a Kubeflow cluster, one for each name."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defense_core.errors import ConfigError
from pipelines.kfp_api import KfpClient, connect
from pipelines.kfp_errors import NotOnCluster, RequestRejected
from pipelines.kfp_records import PipelineVersion
from pipelines.kfp_settings import KfpSettings
from pipelines.node_pools import read_node_pools
from pipelines.submit import DEFAULT_EXPERIMENT, Package, RunRequest, ensure_version, submit_run
from pipelines.triggers.orders import Order, Unsubmittable


@dataclass(frozen=True)
class Target:
    """Where runs go.

    Attributes:
        settings: the endpoint and who asks.
        package: gives the compiled pipeline, and the account that its pods run as, empty for the installation's
            own; called once, because compiling takes seconds.
        experiment: the experiment; a run's name is unique within it.
    """

    settings: KfpSettings
    package: Callable[[], tuple[Package, str]]
    experiment: str = DEFAULT_EXPERIMENT


def compiled_package(node_pools: str, namespace: str) -> Callable[[], tuple[Package, str]]:
    """The pipeline as this release defines it, for a file of node pools; empty: none."""

    def package() -> tuple[Package, str]:
        # kfp takes seconds to import, and only this needs it.
        from pipelines.cluster_options import compiled

        name, data, account = compiled(node_pools, namespace)
        return Package(name, data), account

    return package


def written_package(path: Path, node_pools: str) -> Callable[[], tuple[Package, str]]:
    """The pipeline that ``quarantine compile`` wrote to ``path``, with the account of the same node pools.

    Raises:
        ConfigError: it cannot be read, or is no compiled pipeline.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read", expected="a compiled pipeline", got=error.strerror) from error
    named = re.search(rb"^pipelineInfo:\n(?:  .*\n)*?  name: ([a-z0-9-]+)$", data, re.MULTILINE)
    if named is None:
        raise ConfigError(f"{path} is no compiled pipeline", expected="pipelineInfo with a name", got="none")
    account = read_node_pools(node_pools).run_service_account if node_pools else ""
    return lambda: (Package(named[1].decode("ascii"), data), account)


class KfpSubmitter:
    """Submits by name; connects and uploads the pipeline when first asked. Safe to share between threads."""

    def __init__(self, target: Target, *, log: Any) -> None:
        self._target = target
        self._log = log
        self._lock = threading.Lock()
        self._package: tuple[Package, str] | None = None
        self._ready: tuple[KfpClient, PipelineVersion, str] | None = None

    def submit(self, order: Order) -> str:
        """As :class:`pipelines.triggers.orders.Submitter` says."""
        client, version, account = self._connected()
        request = RunRequest(
            name=order.name,
            version=version,
            parameters={**order.plan.arguments(), "run": order.run.to_json()},
            experiment=self._target.experiment,
            service_account=account,
        )
        try:
            submitted = submit_run(client, request)
        except NotOnCluster:
            with self._lock:
                self._ready = None  # the pipeline was removed; it is uploaded again next time
            raise
        except RequestRejected as error:
            raise Unsubmittable(error.what, expected=error.expected, got=error.got, hint=error.hint) from error
        if submitted.differences:
            # Submitted before the watch file or the pipeline changed. The key says that it is the same work.
            self._log.warning("run was there", run=submitted.run_id, differences=submitted.differences)
        return submitted.run_id

    def at_work(self, name: str) -> bool:
        """As :class:`pipelines.triggers.orders.Submitter` says."""
        client, _, _ = self._connected()
        experiment_id = client.find_experiment(self._target.experiment)
        return bool(experiment_id) and any(not run.finished for run in client.find_runs(name, experiment_id))

    def _connected(self) -> tuple[KfpClient, PipelineVersion, str]:
        with self._lock:
            if self._ready is None:
                if self._package is None:
                    self._package = self._target.package()
                client = connect(self._target.settings)
                package, account = self._package
                self._ready = client, ensure_version(client, package)[0], account
            return self._ready
