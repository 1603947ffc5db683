"""SIGINT and SIGTERM in the middle of each step: no output, a failure record, nothing promoted, exit code 2."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import components.attest_promotion.step
import components.control_model.step
import components.evaluate_model.step
import components.export_onnx.step
import components.fetch_model.step
import components.gate_promotion.step
import components.promote_model.step
import components.purify_model.step
import components.reopen_release.step
import components.report.step
import components.scan_backdoor.step
import components.select_model.step
import components.sign_evidence.step
from components._runtime.evidence import DECISION, Clock, compose, write_evidence
from components._runtime.mlflow_connection import MlflowSettings, connect
from components._runtime.plan import RunSettings
from components._runtime.step import interruptible, step_scope
from components._runtime.store import open_store
from components.attest_promotion.component import attest_promotion
from components.control_model.component import control_model
from components.evaluate_model.component import evaluate_model
from components.export_onnx.component import export_onnx
from components.fetch_model.component import fetch_model
from components.gate_promotion.component import gate_promotion
from components.promote_model.component import promote_model
from components.purify_model.component import purify_model
from components.reopen_release.component import reopen_release
from components.report.component import report
from components.scan_backdoor.component import scan_backdoor
from components.select_model.component import select_model
from components.sign_evidence.component import sign_evidence
from defense_core.errors import EXIT_UNKNOWN, EXIT_USAGE, Cancelled
from tests.finished_chain import Chain, make_release
from tests.small_model import POLICY


def artifact(path: Path) -> Any:
    return SimpleNamespace(path=str(path), metadata={})


def evidence_of(chain: Chain, tmp_path: Path, name: str) -> Any:
    write_evidence(tmp_path / "in" / name, chain.evidence[name])
    return artifact(tmp_path / "in" / name)


def call_of(step: str, chain: Chain, tmp_path: Path) -> tuple[Callable[..., None], dict[str, Any]]:
    """A component and its arguments; whatever it writes lies in ``tmp_path/out``."""
    out = {name: artifact(tmp_path / "out" / name) for name in ("one", "two", "evidence")}
    (tmp_path / "out").mkdir()
    no_control = tmp_path / "no-control"
    no_control.touch()
    nothing_registered = tmp_path / "promoted"
    promoted = {"registered": False, "signature_required": False}
    write_evidence(nothing_registered, compose("promote", Clock.start(), inputs={}, results=promoted))
    given = {"data": artifact(chain["data"]), "loading": "{}", "seed": 0}
    arguments = chain.plan.arguments()
    named: dict[str, Any] = {
        "fetch": (fetch_model, {**arguments, "bundle": out["one"], "data": out["two"]}),
        "purify.tsbd": (
            purify_model,
            {
                **given,
                "bundle": artifact(chain["bundle"]),
                "method": "tsbd",
                "configs": arguments["configs"],
                "device": "cpu",
            }
            | {"purified": out["one"]},
        ),
        "scan": (
            scan_backdoor,
            {**given, "bundle": artifact(chain["bundle"]), "name": "scan", "device": "cpu", "methods": ["tsbd"]}
            | {"scan": arguments["scan"], "policy": arguments["policy"], "scanned": out["one"]},
        ),
        "control": (
            control_model,
            {**given, "bundle": artifact(chain["bundle"]), "device": "cpu", "scan": arguments["scan"]}
            | {"policy": json.dumps({**POLICY, "require": {"positive_control": True}})},
        ),
        "evaluate.before": (
            evaluate_model,
            {**given, "bundle": artifact(chain["bundle"]), "name": "before", "device": "cpu"},
        ),
        "select": (
            select_model,
            {"candidates": [artifact(chain["tsbd"])], "methods": ["tsbd"], "selected": out["one"]},
        ),
        "export": (export_onnx, {**given, "bundle": artifact(chain["selected"]), "onnx": out["one"]}),
        "gate": (
            gate_promotion,
            {
                "fetched": evidence_of(chain, tmp_path, "fetch"),
                "before": evidence_of(chain, tmp_path, "evaluate.before"),
                "scanned": evidence_of(chain, tmp_path, "scan"),
                "rescanned": evidence_of(chain, tmp_path, "rescan"),
                "control": artifact(no_control),
                "purified": [evidence_of(chain, tmp_path, "purify.tsbd")],
                "evaluated": [evidence_of(chain, tmp_path, "evaluate.tsbd")],
                "selected": evidence_of(chain, tmp_path, "select"),
                "exported": evidence_of(chain, tmp_path, "export"),
                "policy": arguments["policy"],
                "decision": out["one"],
            },
        ),
        "sign": (
            sign_evidence,
            {
                "bundle": artifact(chain["selected"]),
                "onnx": artifact(chain["onnx"]),
                "decision": artifact(chain["decision"]),
                "release": out["one"],
            },
        ),
        "promote": (
            promote_model,
            {"release": artifact(tmp_path / "release")},
        ),
        "attest": (attest_promotion, {"promoted": artifact(nothing_registered)}),
        "reopen": (
            reopen_release,
            {"release": str(tmp_path / "release"), "approvers": "{}", "public_key": ""}
            | {"bundle": out["one"], "onnx": out["two"], "decision": artifact(tmp_path / "out" / "three")},
        ),
        "report": (report, {"status": None, "page": out["one"]}),
    }
    component, inputs = named[step]
    if step != "report":
        inputs = {**inputs, "evidence": out["evidence"]}
    return component.python_func, inputs


# In the middle of each step: where its output is half made, or the registry is about to be touched.
MIDDLE = {
    "fetch": (components.fetch_model.step, "save_bundle"),
    "purify.tsbd": (components.purify_model.step, "select_signals"),
    "evaluate.before": (components.evaluate_model.step, "evaluate"),
    "scan": (components.scan_backdoor.step, "write_evidence"),
    "control": (components.control_model.step, "positive_control"),
    "select": (components.select_model.step, "bundle_digest"),
    "export": (components.export_onnx.step, "write_evidence"),
    "gate": (components.gate_promotion.step, "write_decision"),
    "sign": (components.sign_evidence.step, "stage"),
    "promote": (components.promote_model.step, "promote"),
    "attest": (components.attest_promotion.step, "compose"),
    "reopen": (components.reopen_release.step, "check_former"),
    "report": (components.report.step, "_rendered"),
}


@pytest.mark.parametrize("step", MIDDLE)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_step(
    step: str, number: signal.Signals, finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = MIDDLE[step]
    real = getattr(module, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        done = real(*arguments, **options) if step not in ("promote", "control") else None
        os.kill(os.getpid(), number)
        return done

    make_release(finished, tmp_path / "release", None)
    monkeypatch.setattr(module, name, interrupted)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    settings = RunSettings(evidence=str(tmp_path / "store"), model_name="model", name="run")
    function, arguments = call_of(step, finished, tmp_path)
    with pytest.raises(SystemExit) as ended:
        function(**arguments, run=settings.to_json(), execution="")
    assert ended.value.code == EXIT_UNKNOWN
    assert list((tmp_path / "out").iterdir()) == []
    records = open_store(settings.evidence, "run").records()
    assert records.evidence == {}
    assert records.failures[step]["error"] == "Cancelled"
    assert number.name in records.failures[step]["message"]
    if step == "promote":
        assert not connect(MlflowSettings(f"sqlite:///{tmp_path / 'mlflow.db'}")).client.search_registered_models()


def gate_at(at: str, chain: Chain, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> bytes:
    """One attempt of the gate of the run ``run`` at the time ``at``: the decision that it wrote."""
    folder.mkdir()
    function, arguments = call_of("gate", chain, folder)
    clock = SimpleNamespace(start=lambda: Clock(at, time.monotonic()))
    monkeypatch.setattr(components.gate_promotion.step, "Clock", clock)
    settings = RunSettings(evidence=str(folder.parent / "store"), model_name="model", name="run")
    function(**{**arguments, **changes}, run=settings.to_json(), execution="")
    return (Path(arguments["decision"].path) / DECISION).read_bytes()


def test_a_gate_that_was_killed_after_its_record_comes_to_the_same_decision(
    finished: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.now(UTC)
    first, hour = now.isoformat(timespec="seconds"), (now + timedelta(hours=1)).isoformat(timespec="seconds")
    decision = gate_at(first, finished, tmp_path / "first", monkeypatch)
    assert gate_at(hour, finished, tmp_path / "again", monkeypatch) == decision
    store = open_store(str(tmp_path / "store"), "run")
    assert store.records().failures == {}
    gate = store.earlier("gate")
    assert gate is not None
    assert gate["results"]["decided_at"] == first
    kept = (tmp_path / "store" / "run" / "gate.json").read_bytes()
    for attempt in ("first", "again"):
        written = (tmp_path / attempt / "out").rglob("gate.json")
        assert [path.read_bytes() for path in written] == [kept], "the release holds what the store does"
    with pytest.raises(SystemExit):
        gate_at(hour, finished, tmp_path / "other", monkeypatch, policy=json.dumps({**POLICY, "name": "other"}))


@pytest.mark.parametrize(
    "forged",
    [
        {"results": {"decided_at": "soon"}},
        {"results": {"decided_at": "2999-01-01T00:00:00+00:00"}},
        {"results": {"decided_at": "2020-01-01T00:00:00+00:00"}},
        {"results": None},
        {"inputs": {}},
        {"outputs": {}},
    ],
)
def test_a_record_that_is_no_gates_sets_no_time(forged: dict[str, Any], finished: Chain) -> None:
    decide, policy = components.gate_promotion.step.gate_promotion, dict(finished.plan.policy)
    later = (datetime.now(UTC) + timedelta(seconds=200)).isoformat(timespec="seconds")
    gate = decide(finished.evidence, policy, at=later)
    assert decide(finished.evidence, policy, earlier=gate)["results"]["decided_at"] == later
    found = decide(finished.evidence, policy, earlier={**gate, **forged})
    assert found["results"]["decided_at"] == found["environment"]["started"]


def test_a_record_from_before_the_run_sets_no_time(finished: Chain) -> None:
    decide, policy = components.gate_promotion.step.gate_promotion, dict(finished.plan.policy)
    planted = decide(
        finished.evidence, policy, at=(datetime.now(UTC) - timedelta(days=2)).isoformat(timespec="seconds")
    )
    found = decide(finished.evidence, policy, earlier=planted)
    assert found["results"]["decided_at"] == found["environment"]["started"]


@pytest.fixture
def _with_a_terminal() -> Iterator[None]:
    """Also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("_with_a_terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_handlers_of_before_are_back(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    with pytest.raises(Cancelled, match=number.name), interruptible():
        os.kill(os.getpid(), number)
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


def test_under_nohup_a_terminal_that_goes_away_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_swallowed_signal_still_stops_the_next_step() -> None:
    with interruptible() as stop:
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_outside_the_main_thread_signals_stay_as_they_are() -> None:
    seen: list[bool] = []

    def body() -> None:
        with interruptible() as stop:
            seen.append(stop())

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [False]


def test_malformed_run_settings_end_with_usage() -> None:
    with pytest.raises(SystemExit) as ended, step_scope("fetch", "{"):
        pass
    assert ended.value.code == EXIT_USAGE


def test_a_defect_is_recorded_and_raised_on(tmp_path: Path) -> None:
    settings = RunSettings(evidence=str(tmp_path), model_name="model", name="run")
    with pytest.raises(ZeroDivisionError), step_scope("export", settings.to_json()):
        _ = 1 / 0
    assert open_store(str(tmp_path), "run").records().failures["export"]["error"] == "ZeroDivisionError"
