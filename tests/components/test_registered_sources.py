"""Which address of a registry entry is read, and with whose credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from components._runtime.mlflow_connection import MlflowSettings
from components._runtime.registered_sources import (
    require_allowed_source,
    require_mounted,
    require_stated_source,
    require_store,
)
from defense_core.errors import RegistryUnavailable, SourceNotFound, UnsafeArtifact

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


LOCAL = "sqlite:////tmp/mlflow.db"


@pytest.mark.parametrize("source", ["/tmp/mlartifacts/1", "file:///etc", "FILE:///etc", "../etc"])
def test_a_registry_that_is_a_server_names_no_file_of_ours(source: str) -> None:
    with pytest.raises(UnsafeArtifact, match="may not be read"):
        require_stated_source(source, MlflowSettings(tracking_uri=LOCAL, registry_uri=SERVER), "models:/x/1")
    require_allowed_source(source.lower(), MlflowSettings(tracking_uri=LOCAL, registry_uri=SERVER), "a run's")


def test_a_registry_on_this_machine_names_its_files() -> None:
    require_stated_source("/tmp/mlartifacts/1", MlflowSettings(tracking_uri=LOCAL), "models:/x/1")
    require_stated_source("s3://bucket/1", MlflowSettings(tracking_uri=LOCAL, registry_uri=SERVER), "models:/x/1")
    with pytest.raises(UnsafeArtifact, match="may not be read"):
        require_stated_source("ftp://host/1", MlflowSettings(tracking_uri=LOCAL), "models:/x/1")


def artifacts(root: Path) -> Path:
    """Where MLflow keeps a logged model's files."""
    return root / "1" / "models" / "m-1" / "artifacts"


@pytest.mark.parametrize("mounted", ["not there", "an empty mount point"])
def test_a_store_that_is_not_mounted_is_not_taken_for_an_empty_one(mounted: str, tmp_path: Path) -> None:
    if mounted == "an empty mount point":
        (tmp_path / "store").mkdir()
    with pytest.raises(RegistryUnavailable, match="Mount the volume"):
        require_mounted(f"file://{artifacts(tmp_path / 'store')}", "models:/x/1")


@pytest.mark.parametrize("left", ["1/models/m-1/artifacts/MLmodel", "1/models/m-1/other", "1/models/m-2/x", "1/run/x"])
def test_deleted_files_of_a_mounted_store_are_gone(left: str, tmp_path: Path) -> None:
    path = tmp_path / "store" / left
    path.parent.mkdir(parents=True)
    path.touch()
    require_mounted(str(artifacts(tmp_path / "store")), "models:/x/1")


def test_another_store_answers_for_itself() -> None:
    require_mounted("s3://bucket/models", "models:/x/1")
    require_store("/tmp/models", "models:/x/1", lambda _: pytest.fail("a folder of this machine was asked for"))


PROXIED = "mlflow-artifacts:/1/models/m-1/artifacts"


@pytest.mark.parametrize(
    ("uri", "around"),
    [
        (PROXIED, ["mlflow-artifacts:/1/models/m-1", "mlflow-artifacts:/1/models", "mlflow-artifacts:/1"]),
        ("s3://bucket/a/b", ["s3://bucket/a", "s3://bucket/"]),
    ],
)
def test_a_store_of_another_machine_that_lists_nothing_at_all_is_not_there(uri: str, around: list[str]) -> None:
    asked: list[str] = []

    def listed(address: str) -> list[str]:
        asked.append(address)
        return []

    with pytest.raises(RegistryUnavailable, match="Mount the volume"):
        require_store(uri, "models:/x/1", listed)
    assert asked == [uri, *around]


@pytest.mark.parametrize("held", [PROXIED, "mlflow-artifacts:/1/models/m-1", "mlflow-artifacts:/1"])
def test_files_that_were_deleted_from_a_store_that_holds_others_are_gone(held: str) -> None:
    require_store(PROXIED, "models:/x/1", lambda address: ["other"] if address == held else [])


def test_a_listing_that_is_not_found_is_a_store_that_is_not_there() -> None:
    def listed(address: str) -> list[str]:
        raise SourceNotFound(address)

    with pytest.raises(RegistryUnavailable, match="Mount the volume"):
        require_store(PROXIED, "models:/x/1", listed)
