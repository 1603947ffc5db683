"""Settings from the environment, and what importing the connection costs nothing of."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from google.api_core.exceptions import Forbidden, NotFound, ServiceUnavailable
from google.auth.exceptions import RefreshError

from components._runtime.mlflow_connection import MlflowSettings, connect, mlflow_errors, without_credentials
from defense_core.errors import AccessDenied, ConfigError, RegistryUnavailable, SourceNotFound


def test_settings_come_from_mlflow_variables() -> None:
    settings = MlflowSettings.from_environment(
        {
            "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
            "MLFLOW_REGISTRY_URI": "http://127.0.0.1:5001",
            "MLFLOW_EXPERIMENT_NAME": "gates",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "7",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "QUARANTINE_MLFLOW_ARTIFACT_ROOT": "s3://bucket/mlflow",
        }
    )
    assert settings == MlflowSettings(
        tracking_uri="http://127.0.0.1:5000",
        registry_uri="http://127.0.0.1:5001",
        experiment="gates",
        artifact_root="s3://bucket/mlflow",
        timeout_s=7,
        max_retries=0,
    )
    assert settings.is_remote
    assert not MlflowSettings.from_environment({"MLFLOW_TRACKING_URI": "sqlite:////tmp/mlflow.db"}).is_remote


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"MLFLOW_TRACKING_URI": ""}, "MLFLOW_TRACKING_URI"),
        ({"MLFLOW_TRACKING_URI": "http://[mlflow:5000"}, "MLFLOW_TRACKING_URI"),
        ({"MLFLOW_REGISTRY_URI": "http://[mlflow:5000"}, "MLFLOW_REGISTRY_URI"),
        ({"MLFLOW_HTTP_REQUEST_TIMEOUT": "soon"}, "MLFLOW_HTTP_REQUEST_TIMEOUT"),
        ({"MLFLOW_HTTP_REQUEST_TIMEOUT": "²"}, "MLFLOW_HTTP_REQUEST_TIMEOUT"),
        ({"MLFLOW_HTTP_REQUEST_TIMEOUT": "0"}, "MLFLOW_HTTP_REQUEST_TIMEOUT"),
        ({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "-1"}, "MLFLOW_HTTP_REQUEST_MAX_RETRIES"),
        ({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "99"}, "MLFLOW_HTTP_REQUEST_MAX_RETRIES"),
    ],
)
def test_bad_settings_name_the_variable(changes: dict[str, str], named: str) -> None:
    environment = {"MLFLOW_TRACKING_URI": "sqlite:////tmp/mlflow.db", **changes}
    with pytest.raises(ConfigError) as caught:
        MlflowSettings.from_environment(environment)
    assert named in str(caught.value)


def test_credentials_are_never_shown() -> None:
    assert without_credentials("https://user:pass@host/path") == "https://host/path"
    assert without_credentials("postgresql://u:p@db:5432/x") == "postgresql://db:5432/x"
    assert without_credentials("http://user:p@ss@host:5000/x") == "http://host:5000/x"
    assert without_credentials("postgresql://u:p/w:o@db:5432/x") == "postgresql://db:5432/x"
    shown = "postgresql://db:5432/x?user=ml&password=…&sslpassword=…&connect_timeout=5"
    assert without_credentials(shown.replace("…", "canary")) == shown
    assert without_credentials("cannot reach s3://b/k?X-Amz-Signature=canary now") == (
        "cannot reach s3://b/k?X-Amz-Signature=… now"
    )
    for plain in ("sqlite:////tmp/a@b.db", "s3://bucket/a:b@c", "http://host:5000/a@b", "http://host/x?user=a&page=2"):
        assert without_credentials(plain) == plain


def test_who_only_reads_makes_no_registry(tmp_path: Path) -> None:
    """An empty mount point is not a registry without models."""
    with pytest.raises(RegistryUnavailable, match="Mount the volume"):
        connect(MlflowSettings(f"sqlite:///{tmp_path}/registry/mlflow.db"), create=False)
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_no_number_is_a_typed_error_without_the_password() -> None:
    with pytest.raises(ConfigError, match="is malformed") as caught:
        connect(MlflowSettings("postgresql://u:p@ss:canary@db/x"))
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(("code", "kind"), [("NoSuchKey", SourceNotFound), ("NoSuchBucket", RegistryUnavailable)])
def test_a_bucket_that_is_not_there_does_not_say_that_a_file_is_gone(code: str, kind: type[Exception]) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 404}}
    with pytest.raises(kind), mlflow_errors("download it", MlflowSettings("sqlite:////tmp/mlflow.db")):
        raise ClientError(answer, "ListObjectsV2")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFound("The specified bucket does not exist."), RegistryUnavailable),
        (Forbidden("storage.objects.list"), AccessDenied),
        (ServiceUnavailable("try again"), RegistryUnavailable),
        (RefreshError("no token"), RegistryUnavailable),
    ],
)
def test_what_cloud_storage_answers_is_a_typed_error(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind), mlflow_errors("list it", MlflowSettings("sqlite:////tmp/mlflow.db")):
        raise error


def test_mlflow_is_imported_only_when_it_is_used() -> None:
    modules = ("mlflow_connection", "tracking", "promotion", "registered_files", "release", "model_versions")
    code = "import sys\n" + "\n".join(f"import components._runtime.{name}" for name in modules)
    code += "\nprint(sorted({'mlflow', 'boto3', 'sqlalchemy', 'onnx', 'torch'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
