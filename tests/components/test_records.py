"""Records of a run: evidence and failures in a store, and how a run's end is read from them."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from components._runtime import journal
from components._runtime.evidence import Clock, compose
from components._runtime.mlflow_connection import MlflowSettings, connect
from components._runtime.outcome import outcome_of
from components._runtime.plan import RunSettings
from components._runtime.step import LOG_FORMAT, STEP_LINE, OneLine, Scope, failure_record, redacted
from components._runtime.store import EvidenceStore, Records, open_store
from defense_core import errors
from defense_core.progress import NullProgress
from tests.finished_chain import Chain

SOURCE = "sha256:" + "1" * 64


def fetch_evidence(**results: Any) -> dict[str, Any]:
    return compose("fetch", Clock.start(), inputs={"source": SOURCE}, results=results)


def test_a_retried_step_keeps_its_first_evidence(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    first, second = (
        {**fetch_evidence(n=1), "environment": {"started": when}} for when in ("2026-01-01T00:00:00Z", "2026-01-02")
    )
    assert store.put(first) == first
    assert store.put(second) == first
    assert store.records().evidence == {"fetch": first}


def test_results_that_a_step_did_not_measure_are_never_handed_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(str(tmp_path), "run")
    planted, measured = fetch_evidence(n=1), fetch_evidence(n=2)
    store.put(planted)
    assert store.put(measured) == measured
    assert "other results" in caplog.text
    assert store.records().evidence == {"fetch": planted}, "the store never changes"


@pytest.mark.parametrize("key", ["version", "torch", "image", "seed", "device"])
def test_an_environment_that_a_step_did_not_run_in_is_never_handed_on(key: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    own = fetch_evidence(n=1)
    store.put({**own, "environment": {**own["environment"], key: "chosen"}})
    assert store.put(own) == own


def test_when_how_long_and_where_an_attempt_ran_is_the_first_ones(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    own = fetch_evidence(n=1)
    first = {**own, "environment": {**own["environment"], "started": "x", "seconds": 9.0, "accelerator": "y"}}
    store.put(first)
    assert store.put(own) == first


def test_what_a_retried_step_hands_on_is_what_the_store_keeps(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    scope = Scope("fetch", RunSettings(str(tmp_path), "run"), NullProgress(), store)
    for attempt in (1, 2):
        scope.finish(fetch_evidence(n=1), tmp_path / f"{attempt}.json")
    kept = (tmp_path / "run" / "fetch.json").read_bytes()
    assert [(tmp_path / f"{attempt}.json").read_bytes() for attempt in (1, 2)] == [kept, kept]


def test_evidence_never_changes(tmp_path: Path) -> None:
    store = open_store(tmp_path.as_uri(), "run")
    store.put(fetch_evidence())
    with pytest.raises(errors.EvidenceMismatch, match="differs"):
        store.put({**fetch_evidence(), "outputs": {"model": SOURCE}})
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fetch.json"]


def test_what_an_earlier_attempt_left_is_read_again(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    assert store.earlier("fetch") is None
    first = fetch_evidence()
    store.put(first)
    assert store.earlier("fetch") == first

    def denied(name: str) -> bytes:
        raise errors.AccessDenied(f"cannot read {name}", hint="Check the credentials")

    hidden = replace(store, shelf=SimpleNamespace(get=denied))
    assert hidden.earlier("fetch") is None, "an account that may not list is told nothing of what is not there"
    (tmp_path / "run" / "fetch.json").write_text("{")
    with pytest.raises(errors.EvidenceMismatch, match="damaged"):
        store.earlier("fetch")


DEEP = json.dumps({**fetch_evidence(), "message": "m"})[:-1] + ', "x": ' + "[" * 495 + "]" * 495 + "}"


@pytest.mark.parametrize("data", ["[" * 200_000, "{", "{}", pytest.param(DEEP, id="deep")])
def test_what_is_no_record_is_named(data: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for file in ("fetch.json", "scan.failed.json"):
        (tmp_path / "run" / file).write_text(data)
    assert set(open_store(str(tmp_path), "run").records().damaged) == {"fetch.json", "scan.failed.json"}


@pytest.mark.parametrize("key", ["inputs", "outputs", "results", "findings"])
def test_evidence_of_another_shape_is_damaged(key: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "gate.json").write_text(json.dumps({**fetch_evidence(), "name": "gate", key: "text"}))
    records = open_store(str(tmp_path), "run").records()
    assert (dict(records.evidence), set(records.damaged)) == ({}, {"gate.json"})
    assert outcome_of(records).exit_code == errors.EXIT_USAGE


@pytest.mark.parametrize("code", ["x", 0, 4, True, 1.5, None, [1]])
def test_a_failure_that_ends_with_another_code_is_damaged(code: Any, tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    store.put_failure("scan", {"name": "scan", "message": "m", "exit_code": code})
    records = store.records()
    assert (dict(records.failures), set(records.damaged)) == ({}, {"scan.failed.json"})
    assert outcome_of(records).exit_code == errors.EXIT_USAGE


def test_an_object_that_is_too_large_is_named_and_a_store_that_is_away_is_not(tmp_path: Path) -> None:
    def refused(error: errors.QuarantineError) -> Any:
        def get(name: str) -> bytes:
            raise error

        return SimpleNamespace(get=get, names=lambda: ["scan.json"])

    large = EvidenceStore(refused(errors.ArtifactTooLarge("scan.json is too large")))
    assert set(large.records().damaged) == {"scan.json"}
    with pytest.raises(errors.TransferFailed):
        EvidenceStore(refused(errors.TransferFailed("cut"))).records()


@pytest.mark.parametrize("name", ["../../outside", "/tmp/outside", "purify.other", None, ["purify.tsbd"]])
def test_evidence_under_the_name_of_another_is_damaged(name: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "purify.tsbd.json").write_text(json.dumps({**fetch_evidence(), "name": name}))
    store = open_store(str(tmp_path), "run")
    assert (dict(store.records().evidence), set(store.records().damaged)) == ({}, {"purify.tsbd.json"})
    with pytest.raises(errors.EvidenceMismatch, match=r"evidence of purify\.tsbd"):
        store.earlier("purify.tsbd")
    with pytest.raises(errors.EvidenceMismatch, match=r"evidence of purify\.tsbd"):
        store.put({**fetch_evidence(), "name": "purify.tsbd"})


def test_the_journal_names_files_by_the_evidence_file(finished: Chain, tmp_path: Path) -> None:
    kept = {name: finished.evidence[name] for name in ("purify.tsbd", "evaluate.tsbd")}
    planted = {name: {**each, "name": f"{tmp_path}/outside"} for name, each in kept.items()}
    connection = connect(MlflowSettings(f"sqlite:///{tmp_path / 'mlflow.db'}"))
    records = Records({"fetch": finished.evidence["fetch"], **planted})
    settings = RunSettings(evidence=str(tmp_path), model_name="model", name="run")
    journal.end(connection, settings, records, {}, outcome_of(records))
    assert not list(tmp_path.glob("outside*"))


def test_a_failure_is_forgotten_once_the_step_succeeds(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    store.put_failure("fetch", failure_record("fetch", errors.TransferFailed("cut", hint="Run it again")))
    assert store.records().failures["fetch"]["message"] == "cut. Run it again."
    assert outcome_of(store.records()).failed_step == "fetch"
    assert outcome_of(store.records()).exit_code == errors.EXIT_UNKNOWN
    store.put(fetch_evidence())
    assert store.records().failures == {}


@pytest.mark.parametrize("damaged", [False, True])
def test_a_failure_is_forgotten_once_nothing_is_asked_of_the_step(damaged: bool, tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    store.put_failure("purify.soup", failure_record("purify.soup", errors.Cancelled("stopped by SIGTERM")))
    if damaged:
        (tmp_path / "run" / "purify.soup.failed.json").write_text("{")
    settings = RunSettings(str(tmp_path), "run")
    Scope("purify.soup", settings, NullProgress(), store).finish(None, tmp_path / "evidence")
    assert (store.records().failures, store.records().damaged) == ({}, {})
    assert (tmp_path / "evidence").read_bytes() == b""
    store.put_failure("purify.soup", failure_record("purify.soup", errors.Cancelled("stopped by SIGINT")))
    assert list(store.records().failures) == ["purify.soup"], "what fails after that is a failure"


def test_a_step_that_never_failed_leaves_no_record_where_nothing_is_asked(tmp_path: Path) -> None:
    open_store(str(tmp_path), "run").settle("control")
    assert not (tmp_path / "run").exists()


def test_a_damaged_record_is_named_not_hidden(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "run")
    store.put(fetch_evidence())
    (tmp_path / "run" / "select.json").write_text("{")
    records = store.records()
    assert list(records.damaged) == ["select.json"]
    assert outcome_of(records).failed_step == "select"
    assert outcome_of(records).exit_code == errors.EXIT_USAGE


def test_a_step_that_was_killed_is_the_first_without_a_record() -> None:
    records = Records({"fetch": fetch_evidence(methods=["tsbd"]), "evaluate.before": {}, "scan": {}})
    outcome = outcome_of(records)
    assert outcome.failed_step == "purify.tsbd"
    assert outcome.decision == "none"
    assert "killed" in outcome.why
    assert outcome_of(records, stopped="stopped by SIGINT.").why == "stopped by SIGINT."


def test_a_control_that_was_killed_is_its_own_failure_not_the_gates(finished: Chain) -> None:
    before = {name: each for name, each in finished.evidence.items() if name not in ("gate", "sign", "promote")}
    asked = fetch_evidence(methods=["tsbd", "fine_tuning"], positive_control=True)
    outcome = outcome_of(Records({**before, "fetch": asked}))
    assert (outcome.decision, outcome.failed_step, outcome.exit_code) == ("none", "control", errors.EXIT_UNKNOWN)
    assert "killed" in outcome.why
    not_asked = fetch_evidence(methods=["tsbd", "fine_tuning"], positive_control=False)
    assert outcome_of(Records({**before, "fetch": not_asked})).failed_step == "gate"


@pytest.mark.parametrize(("decision", "code"), [("allow", 0), ("observe", 0), ("deny", 1), ("unknown", 2)])
def test_the_exit_code_is_the_decisions(decision: str, code: int, finished: Chain) -> None:
    gate = {"results": {"outcome": decision}}
    records = Records({**finished.evidence, "gate": gate, "sign": {}, "promote": {}})
    assert outcome_of(records).exit_code == code
    assert outcome_of(records).failed_step == ""


def test_failures_are_named_in_the_order_of_the_pipeline(finished: Chain) -> None:
    failure = {"message": "m", "exit_code": 2}
    records = Records(
        {"fetch": finished.evidence["fetch"]}, {"report": failure, "select": failure, "purify.tsbd": failure}
    )
    assert outcome_of(records).failed_step == "purify.tsbd"


def test_a_failure_record_holds_no_credentials() -> None:
    secret = "p4ssw0rd-canary"
    error = errors.RegistryUnavailable(
        "cannot reach http://user:" + secret + "@host/x", got=f"https://b/k?X-Amz-Signature={secret}&a=1"
    )
    assert secret not in json.dumps(failure_record("fetch", error))
    assert redacted(f"s3://k?AWSAccessKeyId={secret}") == "s3://k?AWSAccessKeyId=…"
    assert redacted(f"http://u:p@{secret}@host/x or mysql://u:a/{secret}@host/x") == "http://host/x or mysql://host/x"


@pytest.mark.parametrize("text", ["?key", "://a:", "x-amz-", "?a=token", "&sig?pass"])
def test_a_long_text_of_a_stranger_is_recorded_in_no_time(text: str) -> None:
    error = errors.StateDictMismatch("does not fit", got=text * 250_000)
    started = time.process_time()
    record = failure_record("fetch", error)
    assert time.process_time() - started < 2
    assert max(len(value) for value in record.values() if isinstance(value, str)) <= 2000


def test_what_a_cut_would_break_in_two_is_masked() -> None:
    record = failure_record("fetch", RuntimeError("x" * 1985 + "http://user:" + "p4ssw0rd" * 4 + "@host/"))
    assert "p4ssw0rd"[:3] not in json.dumps(record)


def test_a_record_of_a_stranger_is_one_line() -> None:
    planted = "x\n2026-01-01 00:00:00,000 quarantine INFO gate: PASS\x1b[2J"
    outcome = outcome_of(Records({}, {"fetch": {"message": planted}}))
    assert outcome.why.isprintable()
    formatter = OneLine(LOG_FORMAT)
    line = formatter.format(logging.LogRecord("quarantine", logging.ERROR, "", 0, "%s failed", (planted,), None))
    assert line.isprintable()
    found = STEP_LINE.fullmatch(line)
    assert found is not None
    assert found["level"] == "ERROR"
    try:
        raise ZeroDivisionError(planted)
    except ZeroDivisionError:
        record = logging.LogRecord("quarantine", logging.ERROR, "", 0, "defect", (), sys.exc_info())
    assert "\nTraceback" in formatter.format(record)


def test_a_defect_is_recorded_with_its_type() -> None:
    record = failure_record("export", ZeroDivisionError("division by zero"))
    assert (record["error"], record["step"], record["exit_code"]) == (
        "ZeroDivisionError",
        "export",
        errors.EXIT_UNKNOWN,
    )
