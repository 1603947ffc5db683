"""Fixtures that several areas share: a real S3 server on loopback, a backdoored network."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from components._runtime.s3 import S3Settings
from tests.float32 import in_float32
from tests.integration.mlflow_stores import mlflow_server, mlflow_sqlite, mlflow_template
from tests.integration.swift_server import SwiftMissing, SwiftServer

if TYPE_CHECKING:
    from pipelines.demo import DemoInputs

__all__ = ["mlflow_server", "mlflow_sqlite", "mlflow_template"]


@pytest.fixture(scope="session")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    """OpenStack Swift with its S3 interface, one for the whole session."""
    server = SwiftServer(tmp_path_factory.mktemp("swift"))
    try:
        server.start()
    except SwiftMissing as error:
        pytest.fail(str(error), pytrace=False)
    yield server
    server.stop()


@pytest.fixture(scope="session")
def digits_victim() -> DemoInputs:
    """The demo's backdoored digits classifier, trained once a session. No test may change it."""
    from pipelines.demo import make_inputs

    with in_float32():
        return make_inputs(seed=0)


KEPT = ("QUARANTINE_TEST_", "QUARANTINE_DATA", "QUARANTINE_CACHE")
"""What whoever runs the tests may say to them."""


@pytest.fixture(autouse=True)
def _own_variables() -> Iterator[None]:
    """No test sees the MLflow, or the keys and stores, that this machine or a test before it has chosen: MLflow itself
    sets variables."""

    def present() -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "QUARANTINE_"))}
        return {name: value for name, value in ours.items() if not name.startswith(KEPT)}

    before = present()
    for name in before:
        del os.environ[name]
    yield
    for name in present():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def s3_credentials(swift: SwiftServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Swift's keys in the environment, and nothing of this machine's own AWS configuration."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", swift.region)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", swift.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", swift.secret_key)


@pytest.fixture
def s3_settings(swift: SwiftServer, s3_credentials: None) -> S3Settings:
    """Settings for Swift with short waits."""
    return S3Settings(
        endpoint_url=swift.endpoint_url,
        region=swift.region,
        request_attempts=2,
        stream_attempts=4,
        retry_wait_s=0.01,
        retry_wait_max_s=0.05,
        read_timeout_s=10.0,
    )


@pytest.fixture
def s3_client(s3_settings: S3Settings) -> Any:
    """A plain boto3 client for what a test prepares."""
    from components._runtime.s3_connection import connect

    return connect(s3_settings)


@pytest.fixture
def bucket(s3_client: Any) -> str:
    """A new bucket that keeps versions."""
    name = f"test-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=name)
    s3_client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    return name
