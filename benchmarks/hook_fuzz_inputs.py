"""Inputs that must not get in, and a client that sends them as they are."""

from __future__ import annotations

import base64
import http.client
import json
import re
import socket
import string
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from benchmarks.hook_process import SECRET
from pipelines.triggers.app import PATH, HookLimits, create_app
from pipelines.triggers.queue import Queue
from pipelines.triggers.signature import Verifier, sign

METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE")


@dataclass
class Tally:
    """Answers by kind of input."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)

    def add(self, kind: str, status: int) -> None:
        """Count one input; status 0: no answer."""
        self.statuses[kind, status] += 1

    def total(self, kind: str = "") -> int:
        """Inputs so far."""
        return sum(count for (each, _), count in self.statuses.items() if kind in ("", each))

    def among(self, low: int, high: int) -> int:
        """Inputs with a status from ``low`` to ``high``."""
        return sum(count for (_, status), count in self.statuses.items() if low <= status <= high)


class Target:
    """The hook, over one kept-open connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def call(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> int:
        """The status of the answer; 0 where there was none."""
        for _ in range(2):
            try:
                return self._call(method, path, headers, body)
            except (OSError, http.client.HTTPException):
                self._connection.close()  # one that the hook had closed meanwhile is opened once more
        return 0

    def _call(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> int:
        self._connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in headers.items():
            self._connection.putheader(name, value.encode("latin-1", "replace"))
        self._connection.putheader("Content-Length", str(len(body)))
        self._connection.endheaders(body)
        answer = self._connection.getresponse()
        answer.read()
        return answer.status

    def raw(self, data: bytes) -> int:
        """Send bytes as they are; the status of the first answer, 0 where there was none."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=15) as connection:
            # A hook that has refused no longer reads; what it said can be read all the same.
            with suppress(OSError):
                connection.sendall(data)
            try:
                answer = connection.recv(64)
            except OSError:
                return 0
        words = answer.split()
        return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0


def event(version: int = 1) -> bytes:
    """A body as MLflow writes it."""
    data: dict[str, Any] = {"name": "vision", "version": str(version), "source": "s3://m", "run_id": None, "tags": {}}
    return json.dumps({"entity": "model_version", "action": "created", "timestamp": "t", "data": data}).encode()


def signed(body: bytes, delivery_id: str, *, at: int | None = None, secret: str = SECRET) -> dict[str, str]:
    """MLflow's headers."""
    moment = int(time.time()) if at is None else at
    return {
        "Content-Type": "application/json",
        "X-MLflow-Delivery-Id": delivery_id,
        "X-MLflow-Timestamp": str(moment),
        "X-MLflow-Signature": sign(secret.encode(), delivery_id, moment, body),
    }


def examples(strategy: Any, count: int, use: Callable[[Any], None]) -> None:
    """``use`` up to ``count`` examples of ``strategy``, in several runs: one run stops where it finds nothing new."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(example: Any) -> None:
        use(example)

    run()


def by_schemathesis(target: Target, tally: Tally, count: int) -> None:
    """Calls from the API's description, of permitted and of broken form: as they are, and with a genuine signature."""
    import schemathesis
    from schemathesis import GenerationMode

    app = create_app(Queue.__new__(Queue), Verifier(lambda: [b""]), limits=HookLimits(), log=None)
    app.openapi_url = "/openapi.json"
    schema = schemathesis.openapi.from_dict(app.openapi())
    operation = schema[PATH]["POST"]

    sent = iter(range(10**9))

    def use(case: Any) -> None:
        body = case.body if isinstance(case.body, bytes) else json.dumps(_plain(case.body)).encode()
        headers = _sendable({str(name): str(value) for name, value in (case.headers or {}).items()})
        tally.add("schemathesis", target.call(str(case.method), PATH, headers, body))
        # The same body under a genuine signature: only its form can keep it out.
        tally.add("schemathesis, signed", target.call("POST", PATH, signed(body, f"schema-{next(sent)}"), body))

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        examples(operation.as_strategy(generation_mode=mode), count // 4, use)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (dict, list, str, int, float, bool, type(None))) else str(value)


def _sendable(headers: Mapping[str, str]) -> dict[str, str]:
    framing = {"content-length", "transfer-encoding", "connection", "host", "expect", "upgrade"}
    plain = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
    return {
        name: re.sub(r"[\x00-\x1f\x7f]", " ", value)
        for name, value in headers.items()
        if plain.fullmatch(name) and name.lower() not in framing
    }


def forged(target: Target, tally: Tally, count: int) -> None:
    """A genuine delivery with one thing changed after it was signed, or signed with another key."""
    changes = st.sampled_from(["body", "cut", "longer", "id", "time", "signature", "bits", "secret", "none", "old"])

    def use(drawn: tuple[str, int, bytes]) -> None:
        change, place, data = drawn
        body, delivery_id = event(1 + place), f"forged-{place}"
        headers = signed(body, delivery_id)
        if change == "body":
            body = bytes([*body[: place % len(body)], body[place % len(body)] ^ 1, *body[place % len(body) + 1 :]])
        elif change == "cut":
            body = body[: place % len(body)]
        elif change == "longer":
            body += data or b" "
        elif change == "id":
            headers["X-MLflow-Delivery-Id"] += "x"
        elif change == "time":
            headers["X-MLflow-Timestamp"] = str(int(time.time()) + 1 + place % 200)
        elif change == "signature":
            headers["X-MLflow-Signature"] = "v1," + base64.b64encode(data.ljust(32, b"\0")[:32]).decode()
        elif change == "bits":
            mac = bytearray(base64.b64decode(headers["X-MLflow-Signature"][3:]))
            mac[place % 32] ^= 1 << (place % 8)
            headers["X-MLflow-Signature"] = "v1," + base64.b64encode(bytes(mac)).decode()
        elif change == "secret":
            headers = signed(body, delivery_id, secret=SECRET[:-1] + "!")
        elif change == "none":
            headers.pop(("X-MLflow-Signature", "X-MLflow-Timestamp", "X-MLflow-Delivery-Id")[place % 3])
        else:
            headers = signed(body, delivery_id, at=int(time.time()) - 400 - place)
        tally.add("forged", target.call("POST", PATH, headers, body))

    examples(st.tuples(changes, st.integers(0, 10**6), st.binary(max_size=48)), count, use)


def malformed(target: Target, tally: Tally, count: int) -> None:
    """Signed as MLflow would, but no event that a registry could send."""
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
        max_leaves=10,
    )
    names = st.sampled_from(["", "a/b", "a:b", "x" * 257, "a\x00b", "a\nb", "\ud800"]) | st.integers() | st.none()
    versions = st.sampled_from(["", "0", "-1", "1.0", "01", "1e3", "٣", "1" * 10, " 1"]) | st.integers() | st.none()
    entities = st.sampled_from(["run", "prompt", "", "model_version.created"]) | values.filter(
        lambda value: not isinstance(value, str)
    )
    bodies = st.one_of(
        st.binary(max_size=300),
        values.map(lambda value: json.dumps(value).encode()),
        names.map(lambda name: _event_with(name=name)),
        versions.map(lambda version: _event_with(version=version)),
        entities.map(lambda entity: json.dumps({**json.loads(event()), "entity": entity}).encode()),
        values.filter(lambda value: not isinstance(value, dict)).map(
            lambda value: json.dumps({**json.loads(event()), "data": value}).encode()
        ),
        st.integers(0, 400).map(lambda cut: event()[: cut % len(event())]),
        st.sampled_from([b"[" * 50_000, b'{"a":' * 20_000, b"9" * 50_000, b"\xff\xfe{}", b"\xef\xbb\xbf" + event()]),
    )
    number = iter(range(10**9))

    def use(body: bytes) -> None:
        headers = signed(body, f"malformed-{next(number)}")
        tally.add("malformed", target.call("POST", PATH, headers, body))

    examples(bodies, count, use)


def _event_with(**fields: Any) -> bytes:
    content = json.loads(event())
    return json.dumps({**content, "data": {**content["data"], **fields}}).encode()


def replayed(target: Target, tally: Tally, count: int, genuine: list[tuple[dict[str, str], bytes]]) -> None:
    """What was accepted once, again as it was."""
    for number in range(count):
        tally.add("replayed", target.call("POST", PATH, *genuine[number % len(genuine)]))


def oversized(target: Target, tally: Tally, count: int) -> None:
    """Signed, and larger than the limit; or with a length that is not true, or in pieces without end."""
    largest = HookLimits().max_body_bytes
    for number in range(count):
        body = event()[:-1] + b" " * (largest + number) + b"}"
        headers = signed(body, f"large-{number}")
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        start = f"POST {PATH} HTTP/1.1\r\nHost: h\r\n".encode() + head
        match number % 4:
            case 0:
                status = target.raw(start + f"Content-Length: {len(body)}\r\n\r\n".encode() + body[: 100 * 1024])
            case 1:
                pieces = b"".join(b"10000\r\n" + b"x" * 65536 + b"\r\n" for _ in range(5))
                status = target.raw(start + b"Transfer-Encoding: chunked\r\n\r\n" + pieces)
            case 2:
                status = target.raw(start + b"Content-Length: " + b"9" * (3 + number % 40) + b"\r\n\r\n{}")
            case _:
                status = target.raw(start + b"Content-Length: -" + str(number + 1).encode() + b"\r\n\r\n{}")
        tally.add("oversized", status)


def broken_http(target: Target, tally: Tally, count: int) -> None:
    """Other methods and paths, and bytes that are no HTTP. For those the hook may hang up without a word."""
    paths = st.text(string.printable, max_size=60).map(lambda text: "/" + "".join(text.split()))
    lines = st.tuples(st.sampled_from([*METHODS, "POST"]), paths, st.binary(max_size=200))

    def use(drawn: tuple[str, str, bytes]) -> None:
        method, path, body = drawn
        if method == "POST" or path.split("?")[0] not in ("/healthz", "/readyz", "/metrics"):
            tally.add("other paths", target.call(method, path, {"Content-Type": "application/json"}, body))

    examples(lines, count // 2, use)

    def use_bytes(data: bytes) -> None:
        # The blank line ends whatever request it may be. Hanging up on it is an answer here.
        tally.add("no HTTP", target.raw(data + b"\r\n\r\n") or 400)

    examples(st.binary(min_size=1, max_size=400), count - count // 2, use_bytes)
