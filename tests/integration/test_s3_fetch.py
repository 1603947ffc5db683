"""Fetch from a real S3 server: what arrives, what is refused, what survives a bad network."""

from __future__ import annotations

import http.server
import io
import random
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import urllib3

from components._runtime.s3 import (
    S3Location,
    S3Settings,
    fetch_object,
    list_keys,
    parse_s3_uri,
    read_bytes,
    upload_bytes,
    upload_file,
)
from components._runtime.s3_download import Download, Head
from defense_core.errors import (
    AccessDenied,
    ArtifactTooLarge,
    Cancelled,
    ConfigError,
    DigestMismatch,
    QuarantineError,
    SourceNotFound,
    StorageError,
    TransferFailed,
)
from defense_core.files import sha256_bytes
from defense_core.progress import NullProgress
from tests.integration.cutting_proxy import CuttingProxy
from tests.integration.swift_server import SwiftServer

MIB = 1 << 20
CONTENT = random.Random(0).randbytes(12 * MIB)
OTHER = random.Random(1).randbytes(12 * MIB)
LIMIT = 64 * MIB


@pytest.fixture
def model(bucket: str, s3_client: Any) -> S3Location:
    """An object of 12 MiB; its version id is not pinned."""
    s3_client.put_object(Bucket=bucket, Key="models/net.pt", Body=CONTENT)
    return S3Location(bucket, "models/net.pt")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "incoming"
    folder.mkdir()
    return folder


def refused(
    kind: type[QuarantineError], folder: Path, location: S3Location, settings: S3Settings, **options: Any
) -> str:
    """Message of the error; asserts its type and that nothing was left."""
    with pytest.raises(kind) as caught:
        fetch_object(location, folder / "net.pt", settings=settings, **{"max_bytes": LIMIT} | options)
    assert list(folder.iterdir()) == []
    return str(caught.value)


class AtChunk(NullProgress):
    """Calls ``action`` at the given chunk; a true result is a stop request."""

    def __init__(self, at: int, action: Callable[[], object]) -> None:
        self._calls = 0
        self._at = at
        self._action = action
        super().__init__(self._count)

    def _count(self) -> bool:
        self._calls += 1
        return self._calls == self._at and bool(self._action())


# -- addresses and settings -----------------------------------------------------------------


def test_address_with_and_without_version_round_trips() -> None:
    for uri in ("s3://models/a/b c.pt", "s3://models/a%20b.pt?versionId=17.5%2F_x"):
        assert parse_s3_uri(uri).uri == uri
    assert parse_s3_uri("s3://models/k?versionId=a%2Fb").version_id == "a/b"
    assert parse_s3_uri("s3://models/a%20b").key == "a%20b"


@pytest.mark.parametrize(
    "uri",
    ["", "models/net.pt", "http://models/net.pt", "s3://models", "s3://models/", "s3:///net.pt", "s3://UPPER/net.pt",
     "s3://m/net.pt", "s3://models/net.pt?versionid=1", "s3://models/net.pt?versionId="],
)  # fmt: skip
def test_malformed_address_is_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="s3://bucket/key"):
        parse_s3_uri(uri)


def test_settings_come_from_the_environment() -> None:
    given = {"AWS_ENDPOINT_URL": "http://one", "AWS_REGION": "eu-west-1", "QUARANTINE_S3_READ_TIMEOUT_S": "7.5"}
    settings = S3Settings.from_environment(given)
    assert (settings.endpoint_url, settings.region, settings.read_timeout_s) == ("http://one", "eu-west-1", 7.5)
    assert (
        S3Settings.from_environment(given | {"QUARANTINE_S3_ENDPOINT_URL": "http://two"}).endpoint_url == "http://two"
    )
    with pytest.raises(ConfigError, match="QUARANTINE_S3_STREAM_ATTEMPTS"):
        S3Settings.from_environment({"QUARANTINE_S3_STREAM_ATTEMPTS": "many"})
    with pytest.raises(ConfigError, match="request_attempts"):
        S3Settings(request_attempts=0)


def test_unusable_endpoint_is_a_config_error(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    refused(ConfigError, folder, model, replace(s3_settings, endpoint_url="no address"))


# -- what arrives ---------------------------------------------------------------------------


def test_fetch_gives_bytes_digest_and_version(
    model: S3Location, folder: Path, s3_settings: S3Settings, s3_client: Any
) -> None:
    fetched = fetch_object(
        model, folder / "net.pt", max_bytes=len(CONTENT), expected_sha256=sha256_bytes(CONTENT), settings=s3_settings
    )
    assert (folder / "net.pt").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["net.pt"]
    head = s3_client.head_object(Bucket=model.bucket, Key=model.key)
    assert fetched.version_id == head["VersionId"]
    assert fetched.etag == head["ETag"].strip('"')
    assert (fetched.sha256, fetched.size_bytes, fetched.uri) == (sha256_bytes(CONTENT), len(CONTENT), model.uri)
    assert fetched.attempts == 1
    assert fetched.path == folder / "net.pt"


def test_progress_counts_bytes(
    model: S3Location, folder: Path, s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    class Counting(NullProgress):
        def phase(self, name: str, total: int | None = None) -> Any:
            phase = super().phase(name, total)
            assert total == len(CONTENT)
            monkeypatch.setattr(phase, "advance", steps.append)
            return phase

    fetch_object(model, folder / "net.pt", max_bytes=LIMIT, settings=s3_settings, progress=Counting())
    assert sum(steps) == len(CONTENT)
    assert max(steps) <= s3_settings.chunk_bytes


def test_empty_object(bucket: str, folder: Path, s3_settings: S3Settings) -> None:
    location = S3Location(bucket, "empty")
    upload_bytes(b"", location, s3_settings)
    fetched = fetch_object(location, folder / "empty", max_bytes=0, settings=s3_settings)
    assert (fetched.size_bytes, fetched.sha256) == (0, sha256_bytes(b""))


def test_multipart_upload_comes_back_whole(bucket: str, folder: Path, s3_settings: S3Settings, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(CONTENT)
    location = S3Location(bucket, "parts")
    upload_file(source, location, replace(s3_settings, part_size_bytes=5 * MIB))
    fetched = fetch_object(location, folder / "net.pt", max_bytes=LIMIT, settings=s3_settings)
    assert fetched.etag.endswith("-3")
    assert fetched.sha256 == sha256_bytes(CONTENT)


# -- which version --------------------------------------------------------------------------


def test_named_version_is_fetched(model: S3Location, folder: Path, s3_settings: S3Settings, s3_client: Any) -> None:
    old = s3_client.head_object(Bucket=model.bucket, Key=model.key)["VersionId"]
    s3_client.put_object(Bucket=model.bucket, Key=model.key, Body=OTHER)
    fetched = fetch_object(replace(model, version_id=old), folder / "net.pt", max_bytes=LIMIT, settings=s3_settings)
    assert (fetched.version_id, fetched.sha256) == (old, sha256_bytes(CONTENT))


def test_object_overwritten_between_head_and_get(
    model: S3Location, folder: Path, s3_settings: S3Settings, s3_client: Any
) -> None:
    class Overwriting(NullProgress):
        def phase(self, name: str, total: int | None = None) -> Any:
            s3_client.put_object(Bucket=model.bucket, Key=model.key, Body=OTHER)
            return super().phase(name, total)

    fetched = fetch_object(model, folder / "net.pt", max_bytes=LIMIT, settings=s3_settings, progress=Overwriting())
    latest = s3_client.head_object(Bucket=model.bucket, Key=model.key)["VersionId"]
    assert fetched.version_id != latest
    assert fetched.sha256 == sha256_bytes(CONTENT)


def test_object_overwritten_between_two_ranges(
    model: S3Location, folder: Path, s3_settings: S3Settings, s3_client: Any, swift: SwiftServer
) -> None:
    overwrite = partial(s3_client.put_object, Bucket=model.bucket, Key=model.key, Body=OTHER)
    with CuttingProxy(swift.port, cuts=[5 * MIB], on_cut=overwrite).running() as proxy:
        settings = replace(s3_settings, endpoint_url=proxy.endpoint_url)
        fetched = fetch_object(model, folder / "net.pt", max_bytes=LIMIT, settings=settings)
    assert fetched.attempts == 2
    assert fetched.sha256 == sha256_bytes(CONTENT)
    assert all(f"versionId={fetched.version_id}" in path for method, path, _ in proxy.requests if method == "GET")


def test_unversioned_object_overwritten_between_two_ranges(
    folder: Path, s3_settings: S3Settings, s3_client: Any, swift: SwiftServer
) -> None:
    location = S3Location("plain-bucket", "net.pt")
    s3_client.create_bucket(Bucket=location.bucket)
    s3_client.put_object(Bucket=location.bucket, Key=location.key, Body=CONTENT)
    overwrite = partial(s3_client.put_object, Bucket=location.bucket, Key=location.key, Body=OTHER)
    with CuttingProxy(swift.port, cuts=[5 * MIB], on_cut=overwrite).running() as proxy:
        message = refused(DigestMismatch, folder, location, replace(s3_settings, endpoint_url=proxy.endpoint_url))
    assert "changed while it was read" in message


# -- what is refused ------------------------------------------------------------------------


def test_missing_bucket_key_and_version_are_told_apart(
    model: S3Location, folder: Path, s3_settings: S3Settings, s3_client: Any
) -> None:
    absent = S3Location("no-such-bucket", "net.pt")
    assert "bucket no-such-bucket does not exist" in refused(SourceNotFound, folder, absent, s3_settings)
    absent = S3Location(model.bucket, "none.pt")
    assert "key none.pt does not exist" in refused(SourceNotFound, folder, absent, s3_settings)
    gone = s3_client.put_object(Bucket=model.bucket, Key=model.key, Body=b"x")["VersionId"]
    s3_client.delete_object(Bucket=model.bucket, Key=model.key, VersionId=gone)
    for version in (gone, "malformed"):
        message = refused(SourceNotFound, folder, replace(model, version_id=version), s3_settings)
        assert f"version {version} of s3://{model.bucket}/{model.key} does not exist" in message


def test_deleted_object_is_not_found(model: S3Location, folder: Path, s3_settings: S3Settings, s3_client: Any) -> None:
    s3_client.delete_object(Bucket=model.bucket, Key=model.key)
    refused(SourceNotFound, folder, model, s3_settings)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(
    model: S3Location, folder: Path, s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "wrong")
    # Swift answers so for an unknown access key too.
    assert "SignatureDoesNotMatch" in refused(AccessDenied, folder, model, s3_settings)


def test_no_credentials(
    model: S3Location, folder: Path, s3_settings: S3Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "AWS_ACCESS_KEY_ID" in refused(AccessDenied, folder, model, s3_settings)


def test_larger_than_the_limit_is_refused_before_any_byte(
    model: S3Location, folder: Path, s3_settings: S3Settings, swift: SwiftServer
) -> None:
    with CuttingProxy(swift.port).running() as proxy:
        settings = replace(s3_settings, endpoint_url=proxy.endpoint_url)
        message = refused(ArtifactTooLarge, folder, model, settings, max_bytes=len(CONTENT) - 1)
    assert f"got {len(CONTENT)} bytes" in message
    assert [method for method, _, _ in proxy.requests] == ["HEAD"]


def test_wrong_digest(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    message = refused(DigestMismatch, folder, model, s3_settings, expected_sha256=sha256_bytes(OTHER))
    assert sha256_bytes(CONTENT) in message
    refused(ConfigError, folder, model, s3_settings, expected_sha256="md5:0")


def test_old_file_survives_a_failed_fetch(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    (folder / "net.pt").write_bytes(b"old")
    with pytest.raises(DigestMismatch):
        fetch_object(
            model, folder / "net.pt", max_bytes=LIMIT, settings=s3_settings, expected_sha256=sha256_bytes(OTHER)
        )
    assert [path.read_bytes() for path in folder.iterdir()] == [b"old"]


class _Liar(http.server.BaseHTTPRequestHandler):
    """Announces 1,000 bytes; sends without end, or forgets that a range was asked for."""

    protocol_version = "HTTP/1.1"
    endless = True

    def do_HEAD(self) -> None:
        self._head({"Content-Length": "1000"})

    def do_GET(self) -> None:
        if self.endless:
            self._head({"Transfer-Encoding": "chunked"})
            for _ in range(64):
                self.wfile.write(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
        else:
            self._head({"Content-Length": "1000"})
            self.wfile.write(bytes(600))
        self.close_connection = True

    def _head(self, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in ({"ETag": '"e"'} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """The test's output stays quiet."""


@contextmanager
def lying_server(endless: bool) -> Iterator[str]:
    handler = type("Handler", (_Liar,), {"endless": endless})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_server_that_sends_more_than_it_announced(folder: Path, s3_settings: S3Settings) -> None:
    with lying_server(endless=True) as endpoint:
        settings = replace(s3_settings, endpoint_url=endpoint)
        message = refused(ArtifactTooLarge, folder, S3Location("models", "k"), settings, max_bytes=1000)
    assert "longer than announced" in message


def test_server_that_ignores_ranges(folder: Path, s3_settings: S3Settings) -> None:
    with lying_server(endless=False) as endpoint:
        # Small chunks, so that the first connection leaves something to resume from.
        settings = replace(s3_settings, endpoint_url=endpoint, chunk_bytes=500)
        message = refused(TransferFailed, folder, S3Location("models", "k"), settings)
    assert "bytes 600-999/1000 were asked for" in message


# -- bad networks and servers ---------------------------------------------------------------


class _Cut:
    """An S3 client whose first answer breaks off with ``error`` after ``first`` bytes of :data:`BODY`."""

    def __init__(self, error: Exception, first: int) -> None:
        self.ranges: list[str | None] = []
        self._error = error
        self._first = first

    def get_object(self, Range: str = "", **_: object) -> dict[str, Any]:
        self.ranges.append(Range)
        start = int(Range.removeprefix("bytes=").partition("-")[0]) if Range else 0
        parts: list[Any] = [BODY[start:]] if Range else [BODY[: self._first], self._error]
        answer = {"Body": SimpleNamespace(read=partial(self._read, parts), close=lambda: None)}
        whole = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        return {**answer, "ContentRange": whole, "ResponseMetadata": {"RetryAttempts": 0}}

    def _read(self, parts: list[Any], _: int) -> bytes:
        part = parts.pop(0) if parts else b""
        if isinstance(part, Exception):
            raise part
        return bytes(part)


BODY = bytes(range(200))


@pytest.mark.parametrize("error", [urllib3.exceptions.SSLError("bad record"), ConnectionResetError(104, "reset")])
@pytest.mark.parametrize(("first", "ranges"), [(60, ["", "bytes=60-199"]), (200, [""])])
def test_an_answer_that_breaks_off_is_resumed_only_where_something_lacks(
    error: Exception, first: int, ranges: list[str]
) -> None:
    client, stream = _Cut(error, first), io.BytesIO()
    settings = S3Settings(retry_wait_s=0.0, retry_wait_max_s=0.0)
    phase = NullProgress().phase("fetch", total=len(BODY))
    download = Download(client, Head(S3Location("models", "k"), len(BODY), '"e"', 0), settings, stream, phase)
    download.run()
    assert (stream.getvalue(), download.digest, client.ranges) == (BODY, sha256_bytes(BODY), ranges)


def test_connection_cut_twice_is_resumed(
    model: S3Location, folder: Path, s3_settings: S3Settings, swift: SwiftServer
) -> None:
    with CuttingProxy(swift.port, cuts=[5 * MIB + 77, 3 * MIB + 5]).running() as proxy:
        settings = replace(s3_settings, endpoint_url=proxy.endpoint_url)
        fetched = fetch_object(model, folder / "net.pt", max_bytes=LIMIT, settings=settings)
    assert (folder / "net.pt").read_bytes() == CONTENT
    assert (fetched.sha256, fetched.attempts) == (sha256_bytes(CONTENT), 3)
    starts = [int(part.removeprefix("bytes=").split("-")[0] or 0) if part else 0 for part in proxy.downloads]
    assert starts[0] == 0
    assert 4 * MIB <= starts[1] <= 5 * MIB + 77
    assert starts[1] + 2 * MIB <= starts[2]
    # Resumed, not restarted: at most a chunk and what was on the wire is lost with each cut.
    assert proxy.answered <= len(CONTENT) + 3 * MIB


def test_connection_cut_for_ever(model: S3Location, folder: Path, s3_settings: S3Settings, swift: SwiftServer) -> None:
    with CuttingProxy(swift.port, cuts=[3 * MIB], then=2000).running() as proxy:
        message = refused(TransferFailed, folder, model, replace(s3_settings, endpoint_url=proxy.endpoint_url))
    assert f"of {len(CONTENT)} bytes in {s3_settings.stream_attempts} attempts" in message
    assert len(proxy.downloads) == s3_settings.stream_attempts


def test_silent_server(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = replace(s3_settings, endpoint_url=endpoint, read_timeout_s=0.3)
        refused(TransferFailed, folder, model, settings)
    refused(TransferFailed, folder, model, replace(settings, endpoint_url=endpoint))  # now nobody listens


def test_storage_down_then_up_again(
    model: S3Location, folder: Path, s3_settings: S3Settings, swift: SwiftServer
) -> None:
    swift.kill("object")
    timer = threading.Timer(1.0, swift.restart, args=("object",))
    timer.start()
    try:
        # A loaded machine takes its time to start the server again.
        patient = replace(s3_settings, request_attempts=20)
        fetched = fetch_object(model, folder / "net.pt", max_bytes=LIMIT, settings=patient)
    finally:
        timer.join()
    assert fetched.sha256 == sha256_bytes(CONTENT)
    assert fetched.attempts > 1


def test_storage_down_for_ever(model: S3Location, folder: Path, s3_settings: S3Settings, swift: SwiftServer) -> None:
    swift.kill("object")
    try:
        assert "503" in refused(TransferFailed, folder, model, s3_settings)
    finally:
        swift.restart("object")


# -- this machine ---------------------------------------------------------------------------


def test_disk_full(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))
    try:
        refused(StorageError, folder, model, s3_settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_folder_that_cannot_be_made(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    (folder / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        fetch_object(model, folder / "file" / "net.pt", max_bytes=LIMIT, settings=s3_settings)


def test_stop_request_in_the_middle(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    refused(Cancelled, folder, model, s3_settings, progress=AtChunk(4, lambda: True))


def test_ctrl_c_in_the_middle(model: S3Location, folder: Path, s3_settings: S3Settings) -> None:
    # A shell starts what it puts into the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fetch_object(
                model,
                folder / "net.pt",
                max_bytes=LIMIT,
                settings=s3_settings,
                progress=AtChunk(4, lambda: signal.raise_signal(signal.SIGINT)),
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert list(folder.iterdir()) == []


# -- small files of an evidence store -------------------------------------------------------


def test_put_if_absent_writes_once(bucket: str, s3_settings: S3Settings) -> None:
    location = S3Location(bucket, "runs/1/fetch.json")
    assert upload_bytes(b"first", location, s3_settings, only_if_absent=True)
    assert not upload_bytes(b"second", location, s3_settings, only_if_absent=True)
    assert read_bytes(location, s3_settings) == b"first"
    assert upload_bytes(b"third", location, s3_settings)
    assert read_bytes(location, s3_settings) == b"third"


def test_keys_are_listed_by_prefix(bucket: str, s3_settings: S3Settings) -> None:
    for key in ("runs/1/b.json", "runs/1/a.json", "runs/10/a.json"):
        upload_bytes(b"{}", S3Location(bucket, key), s3_settings)
    assert list_keys(S3Location(bucket, "runs/1/"), s3_settings) == ("runs/1/a.json", "runs/1/b.json")
    assert list_keys(S3Location(bucket, "none/"), s3_settings) == ()
    with pytest.raises(SourceNotFound, match="bucket no-such-bucket"):
        list_keys(S3Location("no-such-bucket", ""), s3_settings)


def test_small_reads_are_bounded(bucket: str, s3_settings: S3Settings) -> None:
    location = S3Location(bucket, "big.json")
    upload_bytes(bytes(100), location, s3_settings)
    with pytest.raises(ArtifactTooLarge):
        read_bytes(location, s3_settings, max_bytes=99)


def test_upload_errors_are_typed(
    bucket: str, s3_settings: S3Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    with pytest.raises(StorageError):
        upload_file(source, S3Location(bucket, "k"), s3_settings)
    source.write_bytes(b"x")
    with pytest.raises(SourceNotFound, match="bucket no-such-bucket"):
        upload_file(source, S3Location("no-such-bucket", "k"), s3_settings)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AccessDenied):
        upload_file(source, S3Location(bucket, "k"), s3_settings)
    with pytest.raises(AccessDenied):
        upload_bytes(b"x", S3Location(bucket, "k"), s3_settings)
