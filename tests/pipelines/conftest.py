"""Fixtures for what talks to a cluster: a KFP API on loopback, and clients of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from pipelines.kfp_api import KfpClient, connect
from pipelines.kfp_settings import VARIABLES, KfpSettings
from tests.pipelines.kfp_server.http_server import KfpServer


@pytest.fixture(autouse=True)
def _own_kfp_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the cluster that this machine has chosen."""
    for name in (*VARIABLES.values(), "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kfp() -> Iterator[KfpServer]:
    """The API; every request and answer of the test was one that the published API describes."""
    with KfpServer() as server:
        yield server
        assert server.cluster.violations == []


@pytest.fixture
def kfp_settings(kfp: KfpServer) -> Callable[..., KfpSettings]:
    """Settings for the API with short waits."""

    def settings(**given: object) -> KfpSettings:
        quick = {"connect_timeout_s": 2.0, "read_timeout_s": 10.0, "retry_wait_s": 0.01, "retry_wait_max_s": 0.05}
        where = {} if "kube_context" in given else {"endpoint": kfp.endpoint}
        return KfpSettings(**{**where, **quick, **given})  # type: ignore[arg-type]

    return settings


@pytest.fixture
def kfp_client(kfp_settings: Callable[..., KfpSettings]) -> KfpClient:
    """A client without authentication."""
    return connect(kfp_settings())
