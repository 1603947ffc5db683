"""Fixtures for the command line, and for what talks to a cluster: a KFP API on loopback, and clients of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import pytest

from pipelines import cli
from pipelines.kfp_api import KfpClient, connect
from pipelines.kfp_settings import VARIABLES, KfpSettings
from tests.pipelines.commands import Answer, Call
from tests.pipelines.kfp_server.http_server import KfpServer


@pytest.fixture(autouse=True)
def _own_kfp_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the cluster that this machine has chosen."""
    for name in (*VARIABLES.values(), "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def quarantine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the entry point in this process."""
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")

    def call(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["quarantine", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        assert "Traceback" not in said.err
        return Answer(ended.value.code, said.out, said.err)

    return call


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
