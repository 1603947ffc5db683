"""Evidence, failure records and models in a real S3 store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components._runtime.evidence import Clock, compose
from components._runtime.s3 import S3Settings
from components._runtime.step import failure_record
from components._runtime.store import open_store
from components.fetch_model.step import fetch_model
from defense_core import errors
from defense_core.files import sha256_file
from defense_core.limits import LoadLimits
from tests.small_model import make_inputs


@pytest.fixture(autouse=True)
def _environment(s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARANTINE_S3_ENDPOINT_URL", s3_settings.endpoint_url)
    monkeypatch.setenv("QUARANTINE_S3_REGION", s3_settings.region)
    monkeypatch.setenv("QUARANTINE_S3_REQUEST_ATTEMPTS", "2")


def evidence(**results: Any) -> dict[str, Any]:
    return compose("fetch", Clock.start(), inputs={"source": "sha256:" + "1" * 64}, results=results)


def test_records_in_s3_behave_like_those_in_a_folder(bucket: str) -> None:
    store = open_store(f"s3://{bucket}/evidence", "run")
    first = evidence(n=1)
    store.put(first)
    store.put(evidence(n=2))
    store.put_failure("select", failure_record("select", errors.EvidenceMissing("no candidate")))
    store.shelf.put("report.json", b"{}")
    records = store.records()
    assert records.evidence == {"fetch": first}
    assert records.failures["select"]["error"] == "EvidenceMissing"
    assert open_store(f"s3://{bucket}/evidence/", "other").records().evidence == {}
    with pytest.raises(errors.EvidenceMismatch):
        store.put({**evidence(), "verdict": "FAIL"})


def test_a_model_and_its_images_come_from_s3(bucket: str, s3_client: Any, tmp_path: Path) -> None:
    plan = make_inputs(tmp_path / "inputs")
    for name in ("model.safetensors", "clean.npz", "test.npz"):
        s3_client.upload_file(str(tmp_path / "inputs" / name), bucket, f"in/{name}")
    version = s3_client.head_object(Bucket=bucket, Key="in/model.safetensors")["VersionId"]
    there = {
        "model": f"s3://{bucket}/in/model.safetensors",
        "clean": f"s3://{bucket}/in/clean.npz",
        "test": f"s3://{bucket}/in/test.npz",
    }
    found = fetch_model(replace(plan, **there), tmp_path / "bundle", tmp_path / "data")
    assert found["inputs"]["source"] == sha256_file(tmp_path / "inputs" / "model.safetensors")
    assert found["results"]["version_id"] == version
    assert found["results"]["identity"] == fetch_model(plan, tmp_path / "b2", tmp_path / "d2")["results"]["identity"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "s3://{bucket}/in/absent.pt"}, errors.SourceNotFound),
        ({"model": "s3://no-such-bucket-anywhere/model.pt"}, errors.SourceNotFound),
        ({"clean": "s3://{bucket}/in/absent.npz"}, errors.SourceNotFound),
        ({"model": "s3://{bucket}"}, errors.ConfigError),
    ],
)
def test_what_is_not_in_s3_leaves_nothing(
    change: dict[str, str], error: type[Exception], bucket: str, tmp_path: Path
) -> None:
    plan = make_inputs(tmp_path / "inputs")
    filled = {key: value.format(bucket=bucket) for key, value in change.items()}
    with pytest.raises(error):
        fetch_model(replace(plan, **filled), tmp_path / "bundle", tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["inputs"]


def test_a_large_object_is_refused_before_the_download(bucket: str, s3_client: Any, tmp_path: Path) -> None:
    plan = make_inputs(tmp_path / "inputs")
    s3_client.put_object(Bucket=bucket, Key="big.pt", Body=b"x" * 10_000)
    limited = replace(plan.loading, limits=LoadLimits(max_bytes=9_999))
    with pytest.raises(errors.ArtifactTooLarge, match="9999"):
        fetch_model(
            replace(plan, model=f"s3://{bucket}/big.pt", loading=limited), tmp_path / "bundle", tmp_path / "data"
        )
    assert not (tmp_path / "bundle").exists()
