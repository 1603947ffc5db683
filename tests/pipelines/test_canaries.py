"""Credentials in the environment of a whole run turn up nowhere in what it leaves."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest

from components._runtime.embedded_s3 import embedded_s3
from components._runtime.s3 import parse_s3_uri, upload_file
from components._runtime.signing_keys import generate_key_pair
from defense_core.errors import EXIT_PASS
from pipelines import compile as compiling
from pipelines.local import LocalRun, run_local
from pipelines.node_pools import POOLS
from pipelines.pod_secrets import check_plain_environment
from tests.small_model import make_inputs

CANARIES = {
    "AWS_ACCESS_KEY_ID": "AKIACANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/secret+access=key",
    "AWS_SESSION_TOKEN": "canary-session-token",
    "MLFLOW_TRACKING_USERNAME": "canary-user",
    "MLFLOW_TRACKING_PASSWORD": "canary p@ssword",
    "MLFLOW_TRACKING_TOKEN": "canary-tracking-token",
    "SOMETHING_ELSE_SECRET": "canary-something-else",
}


def spellings(value: str) -> set[bytes]:
    """A value as it is, as in an address, and as in basic authentication."""
    forms = {value, quote(value), quote(value, safe=""), base64.b64encode(value.encode()).decode().rstrip("=")}
    return {form.encode() for form in forms}


def leaks(root: Path, values: list[str]) -> list[str]:
    """``file: value`` for every file below ``root`` that holds one of ``values``; symbolic links too."""
    forms = {form: value for value in values for form in spellings(value)}
    found = []
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        content = path.read_bytes()
        found += [f"{path.relative_to(root)}: {value}" for form, value in forms.items() if form in content]
    return found


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An S3 server that takes any credentials, and canaries for credentials."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("QUARANTINE_ACCELERATOR", "nvidia.com/gpu=1")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    with embedded_s3("models"):
        for name, value in CANARIES.items():
            monkeypatch.setenv(name, value)
        yield


def run(tmp_path: Path, said: list[str], key: Path) -> LocalRun:
    plan = make_inputs(tmp_path / "inputs", methods=("tsbd",), configs={"tsbd": {"epochs": 1, "unlearn_epochs": 1}})
    addresses = {}
    for field in ("model", "clean", "test"):
        path = Path(getattr(plan, field))
        addresses[field] = f"s3://models/{path.name}"
        upload_file(path, parse_s3_uri(addresses[field]))
    plan = replace(plan, device="auto", **addresses)
    return run_local(plan, tmp_path / "work", model_name="digits", name="first", signing_key=key, on_line=said.append)


@pytest.mark.timeout(900)  # a whole run, while other tests use the other core
def test_a_run_leaves_no_credential_anywhere(planted: None, tmp_path: Path) -> None:
    keys = generate_key_pair(tmp_path / "keys")
    said: list[str] = []
    ended = run(tmp_path, said, keys.private)
    assert (ended.outcome.decision, ended.exit_code) == ("allow", EXIT_PASS), ended.log.read_text()[-3000:]
    work = tmp_path / "work"
    # Evidence, report, artifacts, log, the database and the artifacts of MLflow: all of it is below this folder.
    assert (work / "mlflow.db").is_file()
    assert list(work.glob("evidence/first/*.json"))
    assert list(work.glob("mlartifacts/**/MLmodel"))
    assert ended.log.is_relative_to(work)
    secrets = [*CANARIES.values(), *keys.private.read_text().splitlines()[1:-1]]
    (tmp_path / "work" / "said.txt").write_text("\n".join(said))
    assert leaks(work, secrets) == []
    # The search finds what is there.
    (work / "planted.txt").write_text("user:" + quote(CANARIES["MLFLOW_TRACKING_PASSWORD"]))
    assert leaks(work, secrets) == [f"planted.txt: {CANARIES['MLFLOW_TRACKING_PASSWORD']}"]
    # The same run had the variable of a GPU pool, and no GPU.
    purified = (ended.evidence / "purify.tsbd.json").read_text()
    assert '"accelerator":"nvidia.com/gpu=1"' in purified
    assert '"device":"cpu"' in purified
    assert any("this step runs on the CPU" in line for line in said)


def test_a_run_that_fails_names_no_credential_either(
    planted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    password = "canary-in-address"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://canary-user:{password}@127.0.0.1:{port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    keys = generate_key_pair(tmp_path / "keys")
    said: list[str] = []
    ended = run(tmp_path, said, keys.private)
    assert ended.outcome.failed_step == "fetch"
    assert f"127.0.0.1:{port}" in (ended.evidence / "fetch.failed.json").read_text()
    (tmp_path / "work" / "said.txt").write_text("\n".join([*said, ended.outcome.why]))
    assert leaks(tmp_path / "work", [*CANARIES.values(), password]) == []


@pytest.mark.parametrize("name", ["", *(path.stem for path in POOLS.glob("*.yaml"))])
def test_what_is_compiled_holds_no_credential(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in CANARIES.items():
        monkeypatch.setenv(variable, value)
    compiling.compile_to(tmp_path, compiling.golden_pools()[name])
    assert (tmp_path / compiling.FILE_NAME).is_file()
    assert leaks(tmp_path, list(CANARIES.values())) == []


def test_no_shipped_file_of_node_pools_writes_a_secret_out() -> None:
    for pools in compiling.golden_pools().values():
        for settings in pools.steps.values() if pools is not None else ():
            check_plain_environment(settings.environment or {})
