"""One object out of S3 as one resumable stream, pinned and hashed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import tenacity
import urllib3
from botocore import exceptions as boto

from components._runtime.s3_connection import S3Location, S3Settings, s3_errors, transfer_failed
from defense_core.errors import ArtifactTooLarge
from defense_core.progress import Phase


@dataclass(frozen=True)
class Head:
    """What the server announces about an object.

    Attributes:
        location: the object, with its version id where the server keeps versions.
        size_bytes: announced size.
        etag: the ETag header as it came, quotes included.
        repeated: requests that botocore repeated to learn this.
    """

    location: S3Location
    size_bytes: int
    etag: str
    repeated: int


def look_up(client: Any, location: S3Location) -> Head:
    """Ask for an object's size, version and ETag, and for none of its bytes.

    Raises:
        SourceNotFound, AccessDenied, TransferFailed: the answer.
    """
    with s3_errors(location, client):
        answer = client.head_object(**location.parameters)
    missing = [name for name in ("ContentLength", "ETag") if answer.get(name) is None]
    if missing:
        raise transfer_failed(location, f"no {' and no '.join(missing)} in the answer")
    return Head(
        location=replace(location, version_id=answer.get("VersionId") or location.version_id),
        size_bytes=int(answer["ContentLength"]),
        etag=answer["ETag"],
        repeated=_repeated(answer),
    )


class Download:
    """One object on its way into ``stream``; what has arrived outlives a broken connection.

    One stream and not several ranges at a time: on loopback it is faster than boto3's ten threads, the
    hash can follow it, and no more than one chunk is ever in memory.
    """

    def __init__(self, client: Any, head: Head, settings: S3Settings, stream: BinaryIO, phase: Phase) -> None:
        self.repeated = 0
        self._client = client
        self._head = head
        self._settings = settings
        self._stream = stream
        self._phase = phase
        self._hash = hashlib.sha256()
        self._received = 0

    @property
    def digest(self) -> str:
        """``"sha256:<hex>"`` of what has arrived."""
        return "sha256:" + self._hash.hexdigest()

    def run(self) -> None:
        """Receive the whole object.

        Raises:
            ArtifactTooLarge: the server sends more than it announced.
            DigestMismatch: the object changed since it was looked up.
            SourceNotFound, AccessDenied, TransferFailed: the answer, after the permitted retries.
            OSError: ``stream`` cannot be written.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Interrupted),
            stop=tenacity.stop_after_attempt(self._settings.stream_attempts),
            wait=tenacity.wait_random_exponential(self._settings.retry_wait_s, max=self._settings.retry_wait_max_s),
            before_sleep=self._count,
            reraise=True,
        )
        try:
            retrying(self._receive_rest)
        except _Interrupted as error:
            why = f"{error} ({self._received} of {self._head.size_bytes} bytes in {self.repeated + 1} attempts)"
            raise transfer_failed(self._head.location, why) from error

    def _count(self, _: tenacity.RetryCallState) -> None:
        self.repeated += 1

    def _receive_rest(self) -> None:
        size = self._head.size_bytes
        body = self._open()
        try:
            while chunk := self._read(body):
                if self._received + len(chunk) > size:
                    raise ArtifactTooLarge(
                        f"{self._head.location.uri} is longer than announced",
                        expected=f"{size} bytes",
                        got="more",
                        hint="Do not trust this server; nothing was kept",
                    )
                self._stream.write(chunk)
                self._hash.update(chunk)
                self._received += len(chunk)
                self._phase.advance(len(chunk))
        finally:
            body.close()
        if self._received < size:
            raise _Interrupted("the connection ended early")

    def _read(self, body: Any) -> bytes:
        try:
            return bytes(body.read(self._settings.chunk_bytes))
        except (boto.HTTPClientError, boto.IncompleteReadError, urllib3.exceptions.HTTPError, OSError) as error:
            if self._received == self._head.size_bytes:
                return b""  # all that was announced is here, however the answer ended
            raise _Interrupted(str(error)) from error

    def _open(self) -> Any:
        location, start, size = self._head.location, self._received, self._head.size_bytes
        part = {"Range": f"bytes={start}-{size - 1}"} if start else {}
        # The version "null" and objects of unversioned buckets may be overwritten: the ETag pins these too.
        with s3_errors(location, self._client):
            answer = self._client.get_object(**location.parameters, IfMatch=self._head.etag, **part)
        self.repeated += _repeated(answer)
        if start and answer.get("ContentRange") != f"bytes {start}-{size - 1}/{size}":
            answer["Body"].close()
            raise transfer_failed(
                location, f"range {answer.get('ContentRange')} when bytes {start}-{size - 1}/{size} were asked for"
            )
        return answer["Body"]


class _Interrupted(Exception):
    """The connection broke in the middle of the body; it may be resumed."""


def _repeated(answer: dict[str, Any]) -> int:
    return int(answer["ResponseMetadata"].get("RetryAttempts", 0))
