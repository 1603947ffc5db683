"""The webhook's answers, asked over ASGI: no port, no thread of a server."""

from __future__ import annotations

import asyncio
import time

import pytest
from sqlalchemy.exc import OperationalError

from pipelines.triggers.app import PATH
from pipelines.triggers.queue import Queue
from tests.triggers.asgi import hook
from tests.triggers.fakes import SECRET, event, headers


@pytest.fixture
def queue(tmp_path):
    opened = Queue.open(f"sqlite:///{tmp_path}/queue.db")
    yield opened
    opened.close()


def run(coroutine):
    return asyncio.run(coroutine)


def ask(queue, calls, **limits):
    """Answers to ``calls(client)``, a coroutine function."""

    async def main():
        async with hook(queue, **limits) as client:
            return await calls(client)

    return run(main())


def test_signed_delivery_is_kept_before_it_is_answered(queue):
    answer = ask(queue, lambda client: client.deliver())
    assert (answer.status, answer.word) == (202, "accepted")
    assert queue.counts()["hints"] == 1


def test_body_in_pieces_is_one_body(queue):
    body = event()

    async def calls(client):
        head = headers(body)
        return await client.call(head=head, parts=[body[index : index + 1] for index in range(len(body))])

    assert ask(queue, calls).status == 202


def test_replay_is_refused_and_asks_for_nothing(queue):
    async def calls(client):
        return [(await client.deliver()).status for _ in range(3)], await client.deliver(delivery="d-2")

    statuses, other = ask(queue, calls)
    assert (statuses, other.status) == ([202, 409, 409], 202)
    assert queue.claim_hints(5, lease_s=1)[0].seen == 2


def test_replay_after_a_restart_is_refused(queue):
    assert ask(queue, lambda client: client.deliver()).status == 202
    assert ask(queue, lambda client: client.deliver()).status == 409


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"X-MLflow-Signature": None}, "unsigned"),
        ({"X-MLflow-Timestamp": None}, "unsigned"),
        ({"X-MLflow-Delivery-Id": None}, "unsigned"),
        ({"X-MLflow-Signature": "v1,AAAA"}, "malformed"),
        ({"X-MLflow-Signature": "v1," + "A" * 43 + "="}, "forged"),
        ({"X-MLflow-Delivery-Id": "other"}, "forged"),
        ({"X-MLflow-Timestamp": "1"}, "expired"),
    ],
)
def test_unauthentic_calls_learn_nothing_and_leave_nothing(queue, change, reason):
    body = event()

    async def calls(client):
        head = {name: value for name, value in {**headers(body), **change}.items() if value is not None}
        return await client.call(head=head, parts=(body,)), await client.call("GET", "/metrics")

    answer, metrics = ask(queue, calls)
    assert (answer.status, answer.word) == (401, "not authentic")
    assert f'quarantine_hook_deliveries_total{{result="{reason}"}} 1.0' in metrics.body.decode()
    assert queue.counts()["hints"] == 0


def test_reordered_and_late_deliveries_count_within_the_window(queue):
    async def calls(client):
        now = time.time()
        return [
            (await client.deliver(delivery=f"d{age}", at=now - age)).status for age in (0, 200, 7, 290, 400, -290, -400)
        ]

    assert ask(queue, calls) == [202, 202, 202, 202, 401, 202, 401]


def test_unread_body_is_not_waited_for_where_the_headers_are_bad(queue):
    async def calls(client):
        started = time.monotonic()
        answer = await client.call(head={"X-MLflow-Timestamp": "1"}, parts=(b"x",), hang=True)
        return answer.status, time.monotonic() - started

    status, seconds = ask(queue, calls, body_timeout_s=20.0)
    assert status == 401
    assert seconds < 10.0


@pytest.mark.parametrize("declared", ["5000", "9" * 5000, "-1", "abc", "\xb2", "1,1", ""])
def test_length_that_is_too_large_or_no_number_is_refused_unread(queue, declared):
    body = event()

    async def calls(client):
        return await client.call(head={**headers(body), "Content-Length": declared}, parts=(body,), hang=True)

    answer = ask(queue, calls, max_body_bytes=4096)
    assert answer.status == 413
    assert answer.headers["connection"] == "close"


def test_oversized_stream_is_cut_at_the_limit_whatever_was_declared(queue):
    async def calls(client):
        head = headers(b"x" * 5000)
        return [
            (await client.call(head={**head, **more}, parts=[b"x" * 1000] * 5, hang=True)).status
            for more in ({}, {"Content-Length": "10"})
        ]

    assert ask(queue, calls, max_body_bytes=4096) == [413, 413]


def test_largest_permitted_body_is_taken(queue):
    body = event(description="d")
    body = event(description="d" * (4096 - len(body) + 1))
    assert len(body) == 4096
    assert ask(queue, lambda client: client.deliver(body), max_body_bytes=4096).status == 202


def test_body_that_does_not_come_is_given_up(queue):
    async def calls(client):
        return await client.call(head=headers(event()), parts=(event()[:5],), hang=True)

    assert ask(queue, calls).status == 408


def test_caller_that_hangs_up_is_no_failure(queue):
    async def calls(client):
        sent = []

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        head = [(name.lower().encode(), value.encode()) for name, value in headers(event()).items()]
        scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "query_string": b"",
            "headers": head,
            "client": ("h", 1),
        }
        await client.app({**scope, "http_version": "1.1", "scheme": "http", "root_path": ""}, receive, send)
        return sent[0]["status"]

    assert ask(queue, calls) == 400


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 3000, event(version="x"), event(entity="run")])
def test_signed_nonsense_is_refused(queue, body):
    assert ask(queue, lambda client: client.deliver(body)).status == 400
    assert queue.counts()["hints"] == 0


def test_events_that_bring_nothing_new_are_not_kept(queue):
    async def calls(client):
        bodies = [event(entity="model_version_tag", action="set", key="quarantine.decision", value="allow")]
        bodies += [event(entity="model_version_alias", action="deleted", alias="champion")]
        return [(await client.deliver(body, f"d{index}")).status for index, body in enumerate(bodies)]

    assert ask(queue, calls) == [200, 200]
    assert queue.counts()["hints"] == 0


def test_one_address_cannot_use_up_the_rate_of_another(queue):
    async def calls(client):
        flood = [(await client.call(caller="10.6.6.6")).status for _ in range(7)]
        refused = await client.call(caller="10.6.6.6")
        return flood, refused, (await client.deliver()).status

    flood, refused, genuine = ask(queue, calls, rate_per_s=0.001, burst=5)
    assert flood == [401] * 5 + [429] * 2
    assert refused.headers["retry-after"] == "1"
    assert genuine == 202


class Broken(Queue):
    """A queue whose disk is full for a while."""

    full = True

    def record(self, batch):
        if self.full:
            raise OperationalError("INSERT", {}, Exception("database or disk is full"))
        return super().record(batch)

    def check(self):
        self.record([])


def test_full_disk_is_a_503_and_the_repeated_delivery_is_kept(queue):
    broken = Broken(queue.engine)

    async def calls(client):
        refused, ready = await client.deliver(), await client.call("GET", "/readyz")
        broken.full = False
        return refused, ready, await client.deliver()

    refused, ready, repeated = ask(broken, calls, retry_after_s=7)
    assert (refused.status, refused.headers["retry-after"], ready.status, repeated.status) == (503, "7", 503, 202)
    assert queue.counts()["hints"] == 1


def test_many_at_once_share_commits(queue):
    commits = []

    class Counting(Queue):
        def record(self, batch):
            commits.append(len(batch))
            return super().record(batch)

    async def calls(client):
        bodies = [event(version=str(number + 1)) for number in range(300)]
        return await asyncio.gather(*(client.deliver(body, f"d{index}") for index, body in enumerate(bodies)))

    answers = ask(Counting(queue.engine), calls)
    assert {answer.status for answer in answers} == {202}
    assert queue.counts()["hints"] == 300
    assert sum(commits) == 300
    assert len(commits) < 30


def test_what_was_read_is_kept_when_the_hook_stops(queue):
    class Slow(Queue):
        def record(self, batch):
            time.sleep(0.2)
            return super().record(batch)

    async def main():
        async with hook(Slow(queue.engine)) as client:
            waiting = [asyncio.create_task(client.deliver(delivery=f"d{number}")) for number in range(20)]
            await asyncio.sleep(0.05)
        return [(await each).status for each in waiting], (await client.deliver(delivery="late")).status

    statuses, late = run(main())
    assert statuses == [202] * 20
    assert late == 503


def test_probes_answer(queue):
    async def calls(client):
        return [await client.call("GET", path) for path in ("/healthz", "/readyz", "/metrics")]

    health, ready, metrics = ask(queue, calls)
    assert (health.status, ready.status, metrics.status) == (200, 200, 200)
    assert metrics.headers["content-type"].startswith("text/plain")
    assert b"quarantine_queue_oldest_seconds" in metrics.body


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", PATH, 405),
        ("PUT", PATH, 405),
        ("POST", "/", 404),
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/metrics", 405),
    ],
)
def test_nothing_else_is_there(queue, method, path, status):
    assert ask(queue, lambda client: client.call(method, path)).status == status


def test_logs_hold_neither_secret_nor_signature_nor_body(queue):
    async def calls(client):
        body = event(description="canary-in-the-body")
        await client.deliver(body)
        await client.call(head={**headers(body), "X-MLflow-Delivery-Id": "zz"}, parts=(body,))
        return client.log.getvalue()

    text = ask(queue, calls)
    assert '"event": "delivery"' in text
    assert '"result": "forged"' in text
    assert not [word for word in (SECRET, "v1,", "canary", "evil") if word in text]


def test_a_flood_of_refusals_does_not_fill_the_log(queue):
    async def calls(client):
        for _ in range(200):
            await client.call()
        return client.log.getvalue()

    assert len(ask(queue, calls).splitlines()) <= 15
