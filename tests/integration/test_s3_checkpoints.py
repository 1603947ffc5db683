"""Checkpoints in a real S3 store, and in one that goes away."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from components._runtime.checkpoint_store import INTERVAL_VARIABLE, StepCheckpoints, step_checkpoints
from components._runtime.s3 import S3Settings
from defense_core.checkpoints import Saved

SAVED = Saved(3, False, ({"step": 1},), {"weight": torch.arange(6.0)})


KEY, OTHER = (f"sha256:{digit * 64}" for digit in "12")


def checkpoints(bucket: str) -> StepCheckpoints:
    return step_checkpoints(f"s3://{bucket}/evidence/", {INTERVAL_VARIABLE: "1e-9"})


@pytest.fixture(autouse=True)
def _environment(s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUARANTINE_S3_ENDPOINT_URL", s3_settings.endpoint_url)
    monkeypatch.setenv("QUARANTINE_S3_REGION", s3_settings.region)
    monkeypatch.setenv("QUARANTINE_S3_REQUEST_ATTEMPTS", "2")


def test_saved_found_again_damaged_and_removed(bucket: str, s3_client: Any) -> None:
    place = checkpoints(bucket)
    place.of_work(KEY).of_loop("unlearn").save(lambda: SAVED, finished=False)
    key = f"evidence/.checkpoints/{'1' * 64}/001-unlearn"
    found = place.of_work(KEY).of_loop("unlearn").load()
    assert found is not None
    assert torch.equal(found.tensors["weight"], SAVED.tensors["weight"])
    assert checkpoints(bucket).of_work(OTHER).of_loop("unlearn").load() is None
    data = s3_client.get_object(Bucket=bucket, Key=key)["Body"].read()
    s3_client.put_object(Bucket=bucket, Key=key, Body=data[:-9])
    assert place.of_work(KEY).of_loop("unlearn").load() is None
    place.clear()
    assert "Contents" not in s3_client.list_objects_v2(Bucket=bucket, Prefix="evidence/")


def test_a_store_that_refuses_is_a_line_in_the_log(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    place = checkpoints(bucket)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with caplog.at_level("WARNING", "quarantine"):
        checkpoint = place.of_work(KEY).of_loop("unlearn")
        assert checkpoint.load() is None
        checkpoint.save(lambda: SAVED, finished=False)
        place.clear()
    assert "is not used" in caplog.text
    assert "was not written, the work goes on" in caplog.text
    assert "were not removed" in caplog.text
