"""``quarantine verify`` and ``keygen``: exit codes, sentences and JSON."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from defense_core.errors import EXIT_USAGE

GOLDEN = Path(__file__).resolve().parent.parent / "formats" / "v1"
KEY = ("--public-key", str(GOLDEN / "signing.pub"))


def quarantine(*words: object) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, as a user runs it."""
    command = [sys.executable, "-m", "pipelines.cli", *map(str, words)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=GOLDEN.parent.parent.parent, check=False)
    assert "Traceback" not in answer.stderr
    return answer


@pytest.fixture
def release(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "release", tmp_path / "release")
    return tmp_path / "release"


def test_a_whole_release_passes() -> None:
    answer = quarantine("verify", GOLDEN / "release", *KEY)
    assert answer.returncode == 0
    assert "PASS" in answer.stdout
    assert "decision: allow by the policy golden" in answer.stdout


def test_json_for_machines(release: Path) -> None:
    (release / "model.onnx").write_bytes(b"other")
    answer = quarantine("verify", release, *KEY, "--json")
    assert answer.returncode == 1
    facts = json.loads(answer.stdout)
    assert facts["verdict"] == "FAIL"
    differing = [each for each in facts["findings"] if each["verdict"] == "FAIL"]
    assert {each["file"] for each in differing} == {"model.onnx"}
    assert all(each["bound"] and each["value"] and "model.onnx" in each["why"] for each in differing)


def test_a_difference_is_a_sentence(release: Path) -> None:
    (release / "evidence" / "fetch.json").unlink()
    answer = quarantine("verify", release, *KEY)
    assert answer.returncode == 1
    assert "evidence/fetch.json is missing" in " ".join(answer.stdout.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((GOLDEN / "release",), "no default"),
        ((GOLDEN / "release", *KEY, "--certificate-chain", GOLDEN / "signing.pub"), "no default"),
        ((GOLDEN / "nowhere", *KEY), "no folder"),
        ((GOLDEN / "release", "--public-key", GOLDEN / "nowhere.pub"), "cannot be read"),
        ((GOLDEN / "release", "--public-key", GOLDEN / "expected.json"), "not usable"),
        ((GOLDEN / "release", "--certificate-chain", GOLDEN / "signing.pub"), "certificates in PEM"),
        ((GOLDEN / "release", *KEY, "--policy", GOLDEN / "nowhere.yaml"), "nowhere.yaml"),
        (("models:/a:b", *KEY), "models:/"),
        (("models:/a/1", *KEY, "--promotion", GOLDEN / "expected.json"), "--promotion is for a folder"),
        ((GOLDEN / "release", *KEY, "--promotion", GOLDEN / "nowhere.json"), "cannot be read"),
    ],
)
def test_usage_errors(words: tuple[object, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    answer = quarantine("verify", *words)
    assert answer.returncode == 3
    assert says in answer.stderr


def test_a_file_that_is_no_promotion_statement() -> None:
    answer = quarantine("verify", GOLDEN / "release", *KEY, "--promotion", GOLDEN / "expected.json", "--json")
    assert answer.returncode == 1
    (difference,) = [each for each in json.loads(answer.stdout)["findings"] if each["verdict"] == "FAIL"]
    assert (difference["rule"], difference["file"]) == ("verify.promotion", str(GOLDEN / "expected.json"))
    assert "no DSSE envelope" in difference["why"]


def test_another_policy_than_demanded() -> None:
    answer = quarantine("verify", GOLDEN / "release", *KEY, "--policy", "strict")
    assert answer.returncode == 1
    assert "another policy" in " ".join(answer.stdout.split())


def test_a_registry_that_is_not_mounted_is_unknown_and_none_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'volume' / 'mlflow.db'}")
    answer = quarantine("verify", "models:/digits/1", *KEY)
    assert answer.returncode == 2
    assert "there is no registry" in answer.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_registry_that_does_not_answer_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert quarantine("verify", "models:/digits/1", *KEY).returncode == 2


def test_keygen_never_overwrites(tmp_path: Path) -> None:
    first = quarantine("keygen", "--out", tmp_path / "keys", "--json")
    assert first.returncode == 0
    private = Path(json.loads(first.stdout)["private_key"])
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    assert before.decode().splitlines()[1] not in first.stdout
    second = quarantine("keygen", "--out", tmp_path / "keys")
    assert second.returncode == EXIT_USAGE
    assert "exists" in second.stderr
    assert private.read_bytes() == before
