"""Which address of a registry entry is read, and with whose credentials."""

from __future__ import annotations

import pytest

from components._runtime.mlflow_connection import MlflowSettings
from components._runtime.registered_sources import require_allowed_source
from defense_core.errors import UnsafeArtifact

SERVER = "https://mlflow.example:5000"


@pytest.mark.parametrize(
    ("tracking", "source"),
    [
        (SERVER, "mlflow-artifacts:/1/models/m-1/artifacts"),
        (SERVER, "mlflow-artifacts:///1/models/m-1/artifacts"),
        (SERVER, "mlflow-artifacts://mlflow.example:5000/1"),
        ("https://user:secret@mlflow.example:5000/base", "mlflow-artifacts://mlflow.example:5000/1"),
        (SERVER, "s3://bucket/models"),
        (SERVER, "gs://bucket/models"),
        (SERVER, "wasbs://models@account.blob.core.windows.net/1"),
        (SERVER, "abfss://models@account.dfs.core.windows.net/1"),
        (SERVER, "abfss://models@account.dfs.core.usgovcloudapi.net/1"),
        (SERVER, "abfss://workspace@onelake.dfs.fabric.microsoft.com/lake/1"),
        ("sqlite:////tmp/mlflow.db", "/tmp/mlartifacts/1"),
    ],
)
def test_the_registrys_own_store_is_read(tracking: str, source: str) -> None:
    require_allowed_source(source, MlflowSettings(tracking_uri=tracking), "models:/x/1")


@pytest.mark.parametrize(
    "source",
    [
        "mlflow-artifacts://evil.example/x",
        "MLFLOW-ARTIFACTS://evil.example/x",
        " mlflow-artifacts://evil.example/x",
        "mlflow-artifacts://mlflow.example/x",
        "mlflow-artifacts://mlflow.example:5001/x",
        "mlflow-artifacts://mlflow.example:5000.evil.example/x",
        "mlflow-artifacts://mlflow.example:5000@evil.example/x",
        "mlflow-artifacts://user:secret@mlflow.example:5000/x",
        "mlflow-artifacts://evil.example\\@mlflow.example:5000/x",
        "mlflow-artifacts://[evil/x",
        "abfss://models@account.evil.example/1",
        "abfss://models@evil.example:443",
        "abfss://models@evil.example?.dfs.core.windows.net/1",
        "abfss://models@a.evil.example/.dfs.core.windows.net/1",
        "abfss://models@account.dfs.core.windows.net.evil.example/1",
        "abfss://models@account.dfs.core.windows.net:8443/1",
        "abfss://a@b@account.dfs.core.windows.net/1",
        "wasbs://models@account.evil.example/1",
        "http://mlflow.example:5000/x",
        "https://evil.example/x",
        "ftp://evil.example/x",
        "file:///etc",
    ],
)
def test_no_other_host_is_sent_credentials(source: str) -> None:
    with pytest.raises(UnsafeArtifact, match="may not be read") as caught:
        require_allowed_source(source, MlflowSettings(tracking_uri=SERVER), "models:/x/1")
    assert "secret" not in str(caught.value)


def test_a_local_registry_has_no_server_to_name() -> None:
    with pytest.raises(UnsafeArtifact, match="may not be read"):
        require_allowed_source(
            "mlflow-artifacts://evil.example/x", MlflowSettings(tracking_uri="sqlite:////tmp/mlflow.db"), "models:/x/1"
        )
