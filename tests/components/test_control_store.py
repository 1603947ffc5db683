"""Positive controls that are kept: made once for the same work, and never taken for another's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components._runtime.checkpoint_store import SECRET_VARIABLE
from components._runtime.control_store import FILE, ControlStore, control_store
from components._runtime.embedded_s3 import embedded_s3
from components._runtime.plan import RunSettings
from components._runtime.s3 import list_keys, parse_s3_uri
from components.control_model import step
from components.control_model.component import control_model as component
from components.control_model.step import control_model
from defense_core.errors import StorageError
from defense_core.stored_checkpoints import CheckpointFolder
from tests.finished_chain import Chain
from tests.small_model import PLAN_OPTIONS, POLICY

ONE, OTHER = (f"sha256:{digit * 64}" for digit in "12")
SECRET = b"only the control step knows this"


class Planting:
    """In place of planting a backdoor: what came of it, and how often it was done."""

    def __init__(self) -> None:
        self.times = 0
        self.p_value: float | None = 0.01

    def __call__(self, *_: Any, **__: Any) -> Any:
        self.times += 1
        return SimpleNamespace(
            planted=True,
            decided=self.p_value is not None,
            detected=True,
            scan=SimpleNamespace(p_value=self.p_value, fpr=0.05, comparable=self.p_value is not None),
            sentence=lambda: "A patch would have been detected",
            to_results=lambda: {"planted_asr": 0.98, "sentence": "A patch would have been detected"},
        )


@pytest.fixture
def planting(monkeypatch: pytest.MonkeyPatch) -> Planting:
    planted = Planting()
    monkeypatch.setattr(step, "positive_control", planted)
    return planted


def made(chain: Chain, kept: ControlStore | None, **options: Any) -> dict[str, Any]:
    given = {"scan": PLAN_OPTIONS.scan, "report": 0.0, "device": "cpu", "kept": kept, **options}
    return control_model(chain["bundle"], chain["data"] / "clean.npz", **given)


@pytest.mark.parametrize("where", ["path", "file", "s3"])
def test_the_same_control_is_made_once_and_it_is_said(
    where: str, finished: Chain, planting: Planting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with embedded_s3("store") if where == "s3" else monkeypatch.context():
        root = {"path": str(tmp_path / "kept"), "file": f"file://{tmp_path}/kept", "s3": "s3://store/kept"}[where]
        kept = control_store(root)
        first = made(finished, kept)
        again = made(finished, kept)
        if where == "s3":
            assert [key.rpartition("/")[2] for key in list_keys(parse_s3_uri(root))] == [FILE]
    assert planting.times == 1
    assert first["results"]["repeats"] is None
    said = again["results"]["repeats"]
    assert said.startswith(f"kept since {first['environment']['started']}: sha256:")
    assert again["findings"][0]["why"] == f"A patch would have been detected ({said})"
    for part in ("inputs", "outputs", "verdict", "environment"):
        assert again[part] == first[part]
    assert again["results"] == {**first["results"], "repeats": said}


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"config": {"rate": 0.2}}, {"scan": {**PLAN_OPTIONS.scan, "fpr": 0.2}}, {"report": 0.3}],
    ids=lambda options: next(iter(options)),
)
def test_another_control_is_made(options: dict[str, Any], finished: Chain, planting: Planting, tmp_path: Path) -> None:
    kept = control_store(str(tmp_path))
    made(finished, kept)
    assert made(finished, kept, **options)["results"]["repeats"] is None
    assert planting.times == 2


def test_another_release_makes_its_own(
    finished: Chain, planting: Planting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = control_store(str(tmp_path))
    made(finished, kept)
    monkeypatch.setattr("defense_core.stored_checkpoints.__version__", "99.0")
    made(finished, kept)
    assert planting.times == 2


def test_what_is_unknown_is_not_kept(finished: Chain, planting: Planting, tmp_path: Path) -> None:
    planting.p_value = None
    assert made(finished, control_store(str(tmp_path)))["verdict"] == "UNKNOWN"
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_kept_where_no_store_is_named(finished: Chain, planting: Planting) -> None:
    assert control_store("") is None
    made(finished, None)
    made(finished, None)
    assert planting.times == 2


def test_a_control_that_is_too_old_at_the_gate_is_made_again(
    finished: Chain, planting: Planting, tmp_path: Path
) -> None:
    first = made(finished, control_store(str(tmp_path)))
    (file,) = tmp_path.rglob(FILE)
    key = f"sha256:{file.parent.name}"
    first["environment"]["started"] = "2020-01-01T00:00:00+00:00"
    ControlStore(str(tmp_path)).keep(key, first)
    assert ControlStore(str(tmp_path)).find(key) is not None
    assert control_store(str(tmp_path), max_age_days=30) == ControlStore(str(tmp_path), 15)
    assert made(finished, control_store(str(tmp_path), max_age_days=30))["results"]["repeats"] is None
    assert made(finished, control_store(str(tmp_path), max_age_days=30))["results"]["repeats"] is not None
    assert planting.times == 2


# -- what somebody else left there -----------------------------------------------------------


def evidence_of_one(chain: Chain) -> dict[str, Any]:
    """Evidence as of a control: with one finding."""
    scanned = chain.evidence["scan"]
    return {**scanned, "findings": scanned["findings"][:1]}


@pytest.mark.parametrize(
    "change",
    [
        {"environment": {}},
        {"environment": "here"},
        {"environment": {"started": "yesterday"}},
        {"findings": []},
        {"findings": ["found"]},
        {"findings": [{"rule": "control.detected"}]},
        {"inputs": None},
    ],
)
def test_a_file_of_another_shape_is_not_used(
    change: dict[str, Any], finished: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a secret anybody who may write to the store can seal one."""
    kept = ControlStore(str(tmp_path), max_age_days=1)
    kept.keep(ONE, {key: each for key, each in (evidence_of_one(finished) | change).items() if each is not None})
    with caplog.at_level(logging.WARNING, logger="quarantine"):
        assert kept.find(ONE) is None
    assert "another is made" in caplog.text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data[:-20], "damaged or forged"),
        (lambda data: b"", "damaged or forged"),
        (lambda data: data.replace(b'"FAIL"', b'"PASS"'), "damaged or forged"),
        (lambda data: b"\x00" * 100, "damaged or forged"),
    ],
    ids=["truncated", "empty", "changed", "other bytes"],
)
def test_a_file_that_is_not_whole_is_not_used(
    change: Any, said: str, finished: Chain, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = ControlStore(str(tmp_path))
    kept.keep(ONE, {**evidence_of_one(finished), "verdict": "FAIL"})
    (file,) = tmp_path.rglob(FILE)
    file.write_bytes(change(file.read_bytes()))
    with caplog.at_level(logging.WARNING, logger="quarantine"):
        assert kept.find(ONE) is None
    assert said in caplog.text


def test_a_file_of_other_work_is_not_used(finished: Chain, tmp_path: Path) -> None:
    kept = ControlStore(str(tmp_path))
    kept.keep(ONE, evidence_of_one(finished))
    (file,) = tmp_path.rglob(FILE)
    (tmp_path / OTHER.removeprefix("sha256:")).mkdir()
    (tmp_path / OTHER.removeprefix("sha256:") / FILE).write_bytes(file.read_bytes())
    assert kept.find(ONE) is not None
    assert kept.find(OTHER) is None


@pytest.mark.parametrize(("wrote", "reads"), [(b"", SECRET), (b"another", SECRET), (SECRET, b"")])
def test_a_secret_refuses_what_was_sealed_without_it(
    wrote: bytes, reads: bytes, finished: Chain, tmp_path: Path
) -> None:
    ControlStore(str(tmp_path), secret=wrote).keep(ONE, evidence_of_one(finished))
    assert ControlStore(str(tmp_path), secret=reads).find(ONE) is None
    assert ControlStore(str(tmp_path), secret=wrote).find(ONE) is not None


def test_the_secret_is_that_of_the_environment_and_is_not_shown() -> None:
    kept = control_store("store", environment={SECRET_VARIABLE: SECRET.decode()})
    assert kept == ControlStore("store", secret=SECRET)
    assert "only the control" not in repr(kept)


def test_a_store_that_fails_costs_a_line_in_the_log(
    finished: Chain, planting: Planting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def broken(*_: Any) -> None:
        raise StorageError("the disk is gone")

    monkeypatch.setattr(CheckpointFolder, "read", broken)
    monkeypatch.setattr(CheckpointFolder, "write", broken)
    with caplog.at_level(logging.WARNING, logger="quarantine"):
        assert made(finished, control_store(str(tmp_path)))["verdict"] == "PASS"
    assert caplog.text.count("the disk is gone") == 2


# -- the step --------------------------------------------------------------------------------


def test_the_step_keeps_controls_where_the_run_says(finished: Chain, planting: Planting, tmp_path: Path) -> None:
    def run(name: str) -> dict[str, Any]:
        settings = RunSettings(str(tmp_path / "store"), "digits", name=name, controls=str(tmp_path / "kept"))
        component.python_func(
            bundle=SimpleNamespace(path=str(finished["bundle"]), metadata={}),
            data=SimpleNamespace(path=str(finished["data"]), metadata={}),
            scan=json.dumps(PLAN_OPTIONS.scan),
            policy=json.dumps({**POLICY, "require": {"positive_control": True, "max_evidence_age_days": 30}}),
            loading="{}",
            seed=0,
            device="cpu",
            run=settings.to_json(),
            execution="",
            evidence=SimpleNamespace(path=str(tmp_path / f"{name}.json"), metadata={}),
        )
        evidence: dict[str, Any] = json.loads((tmp_path / "store" / name / "control.json").read_text())
        return evidence

    assert run("first")["results"]["repeats"] is None
    assert run("second")["results"]["repeats"].startswith("kept since ")
    assert planting.times == 1
