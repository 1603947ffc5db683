"""Rate limit, redaction and metrics."""

from __future__ import annotations

import io
import json
import logging

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from pipelines.triggers.logs import REDACTED, ForwardedRecords, Redactor, logger
from pipelines.triggers.metrics import Metrics
from pipelines.triggers.queue import Queue
from pipelines.triggers.rate import RateLimit
from tests.triggers.fakes import key

CANARY = "canary-5f1e9c-do-not-log"


def test_burst_then_rate():
    now = [0.0]
    rate = RateLimit(10.0, 5, clock=lambda: now[0])
    assert [rate.allows("a") for _ in range(6)] == [True] * 5 + [False]
    now[0] = 0.25
    assert [rate.allows("a") for _ in range(3)] == [True, True, False]


def test_callers_do_not_share_and_memory_is_bounded():
    rate = RateLimit(1.0, 1, max_callers=10, clock=lambda: 0.0)
    assert rate.allows("a")
    assert not rate.allows("a")
    assert all(rate.allows(f"caller-{number}") for number in range(1000))
    assert len(rate) == 10


def test_zero_means_no_limit():
    rate = RateLimit(0, 1)
    assert all(rate.allows("a") for _ in range(1000))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 0.5), max_size=60), st.floats(1, 50), st.integers(1, 20))
def test_never_more_than_burst_and_rate_allow(waits, rate_per_s, burst):
    now = [0.0]
    rate, allowed = RateLimit(rate_per_s, burst, clock=lambda: now[0]), 0
    for wait in waits:
        now[0] += wait
        allowed += rate.allows("a")
    assert allowed <= burst + rate_per_s * now[0] + 1e-6


# -- logs ------------------------------------------------------------------------------


def written(log_to):
    stream = io.StringIO()
    log_to(logger(Redactor(lambda: [CANARY]), stream))
    return stream.getvalue()


def test_lines_are_json_with_level_and_time():
    line = json.loads(written(lambda log: log.info("delivery", model="m", version="1", count=3)))
    assert (line["event"], line["level"], line["model"], line["count"]) == ("delivery", "info", "m", 3)
    assert line["timestamp"].endswith("Z")


def test_known_secrets_go_wherever_they_stand():
    def log_to(log):
        log.info(f"said {CANARY}", a=CANARY, b=[CANARY, {"c": f"x{CANARY}x"}], d=ValueError(CANARY))  # noqa: G004
        try:
            raise RuntimeError(f"failed with {CANARY}")
        except RuntimeError:
            log.exception("it failed")

    text = written(log_to)
    assert "canary" not in text
    assert text.count(REDACTED) >= 5
    assert "RuntimeError" in text


def test_secret_names_and_credentials_go_whatever_they_hold():
    text = written(
        lambda log: log.info(
            "see postgresql://user:hunter2@db/queue and Authorization: Bearer hunter2",
            slash="postgresql://user:a/hunter2@db/queue",
            at="http://user:a@hunter2@host/x",
            password="hunter2",
            nested={"api_key": "hunter2", "X-MLflow-Signature": "hunter2"},
            url="https://h/x?X-Amz-Signature=hunter2&a=1",
        )
    )
    assert "hunter2" not in text
    assert "db/queue" in text
    assert "&a=1" in text


def test_line_breaks_of_a_caller_stay_in_their_line():
    assert len(written(lambda log: log.info("x", caller='a\n{"event": "forged"}\r\n')).splitlines()) == 1


def test_other_libraries_logs_are_redacted_too():
    stream = io.StringIO()
    handler = ForwardedRecords(logger(Redactor(lambda: [CANARY]), stream))
    record = logging.LogRecord("uvicorn", logging.WARNING, "f", 1, "got %s\nfrom %s", ("x", CANARY), None)
    handler.emit(record)
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["logger"]) == (f"got x from {REDACTED}", "warning", "uvicorn")


# -- metrics ---------------------------------------------------------------------------


def test_metrics_show_the_queue(tmp_path):
    queue = Queue.open(f"sqlite:///{tmp_path}/q.db")
    queue.enqueue([key(1), key(2)])
    text = generate_latest(Metrics(queue).registry).decode()
    assert 'quarantine_queue_rows{state="pending"} 2.0' in text
    assert "quarantine_queue_up 1.0" in text


def test_metrics_answer_while_the_store_is_away(tmp_path):
    queue = Queue.open(f"sqlite:///{tmp_path}/q.db")
    metrics = Metrics(queue)
    queue.close()
    (tmp_path / "q.db").unlink()
    (tmp_path / "q.db").mkdir()
    text = generate_latest(metrics.registry).decode()
    assert "quarantine_queue_up 0.0" in text
    assert "quarantine_queue_rows{" not in text
