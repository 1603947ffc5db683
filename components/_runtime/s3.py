"""Objects in S3: streaming fetch of an untrusted one, upload, and small files for an evidence store.

A fetch asks first (HEAD), refuses what is too large, pins the version, then takes the object as one stream
that is hashed and written as it comes. A connection that breaks is resumed with a Range request from the
last good byte; version id and ETag make sure that the bytes are still those of the same object.
"""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore import exceptions as boto

from components._runtime.s3_connection import S3Location, S3Settings, connect, parse_s3_uri, s3_errors, status_of
from components._runtime.s3_download import Download, look_up
from defense_core.errors import ArtifactTooLarge, ConfigError, DigestMismatch, StorageError
from defense_core.files import atomic_file
from defense_core.progress import NullProgress, Progress

__all__ = [
    "Fetched",
    "S3Location",
    "S3Settings",
    "delete_objects",
    "fetch_object",
    "list_keys",
    "parse_s3_uri",
    "read_bytes",
    "upload_bytes",
    "upload_file",
]

SMALL_FILE_BYTES = 16 << 20
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Fetched:
    """A file that came from S3.

    Attributes:
        path: where it lies now.
        uri: ``s3://bucket/key``.
        version_id: the version that was read; "" where the bucket keeps none.
        sha256: ``"sha256:<hex>"`` of the bytes, our own.
        size_bytes: its size.
        etag: the server's ETag, without quotes; not always a digest.
        seconds: wall time of the whole fetch.
        attempts: 1, plus one for every request or connection that had to be repeated.
    """

    path: Path
    uri: str
    version_id: str
    sha256: str
    size_bytes: int
    etag: str
    seconds: float
    attempts: int


def fetch_object(
    location: S3Location,
    destination: Path,
    *,
    max_bytes: int,
    expected_sha256: str | None = None,
    settings: S3Settings | None = None,
    progress: Progress | None = None,
) -> Fetched:
    """Stream an untrusted object to the file ``destination``; on any failure nothing is left there.

    Args:
        location: the object. Without a version id, the latest version is taken and pinned.
        destination: the file to write.
        max_bytes: a larger object is refused before its first byte is asked for.
        expected_sha256: ``"sha256:<hex>"`` that the bytes must have.
        settings: how to reach the server; by default :meth:`S3Settings.from_environment`.
        progress: one step per byte; also the point where a stop request takes effect.

    Raises:
        SourceNotFound: bucket, key or version does not exist.
        AccessDenied: the credentials are missing, wrong or without the right.
        ArtifactTooLarge: more than ``max_bytes``, as announced or as sent.
        DigestMismatch: other bytes than ``expected_sha256``, or the object changed meanwhile.
        TransferFailed: the server or the connection kept failing.
        StorageError: the file cannot be written.
        Cancelled: a stop was requested.
    """
    if expected_sha256 is not None and not _DIGEST.fullmatch(expected_sha256):
        raise ConfigError(
            "digest is malformed", expected="sha256: and 64 lower-case hex digits", got=repr(expected_sha256)
        )
    settings = settings or S3Settings.from_environment()
    started = time.monotonic()
    client = connect(settings)
    head = look_up(client, location)
    if head.size_bytes > max_bytes:
        raise ArtifactTooLarge(
            f"{location.uri} is too large",
            expected=f"at most {max_bytes} bytes",
            got=f"{head.size_bytes} bytes",
            hint="Raise the limit if you trust the object's size; nothing was downloaded",
        )
    with (
        (progress or NullProgress()).phase("fetch", total=head.size_bytes) as phase,
        atomic_file(destination) as stream,
    ):
        download = Download(client, head, settings, stream, phase)
        download.run()
        digest = download.digest
        if expected_sha256 is not None and digest != expected_sha256:
            hint = "Find out who changed the object; nothing was kept"
            raise DigestMismatch(
                f"{location.uri} is not what was promised", expected=expected_sha256, got=digest, hint=hint
            )
    return Fetched(
        path=Path(destination),
        uri=replace(location, version_id="").uri,
        version_id=head.location.version_id,
        sha256=digest,
        size_bytes=head.size_bytes,
        etag=head.etag.strip('"'),
        seconds=time.monotonic() - started,
        attempts=1 + head.repeated + download.repeated,
    )


def upload_file(path: Path, location: S3Location, settings: S3Settings | None = None) -> None:
    """Put the file at ``path`` to ``location`` (in parts where it is large), over whatever is there.

    Raises:
        StorageError: the file cannot be read.
        SourceNotFound, AccessDenied, TransferFailed: as for :func:`fetch_object`.
    """
    settings = settings or S3Settings.from_environment()
    client = connect(settings)
    transfer = TransferConfig(
        multipart_threshold=settings.part_size_bytes, multipart_chunksize=settings.part_size_bytes
    )
    try:
        with s3_errors(location, client):
            client.upload_file(str(path), location.bucket, location.key, Config=transfer)
    except S3UploadFailedError as error:
        # boto3 wraps what it got; the cause is what our errors are made of.
        with s3_errors(location, client):
            raise error.__context__ or error from error
    except OSError as error:
        raise StorageError(f"cannot read {path}", expected="a readable file", got=error.strerror) from error


def upload_bytes(
    data: bytes, location: S3Location, settings: S3Settings | None = None, *, only_if_absent: bool = False
) -> bool:
    """Put ``data`` to ``location``.

    Args:
        data: the content; small, it is sent in one request.
        location: where to.
        settings: how to reach the server; by default :meth:`S3Settings.from_environment`.
        only_if_absent: never replace an object (``If-None-Match: *``, decided by the server).

    Returns:
        Whether it was written; false only with ``only_if_absent``, where an object was there already.

    Raises:
        SourceNotFound, AccessDenied, TransferFailed: as for :func:`fetch_object`.
    """
    settings = settings or S3Settings.from_environment()
    client = connect(settings)
    condition = {"IfNoneMatch": "*"} if only_if_absent else {}
    with s3_errors(location, client):
        try:
            client.put_object(Bucket=location.bucket, Key=location.key, Body=data, **condition)
        except boto.ClientError as error:
            if not (only_if_absent and status_of(error) == 412):
                raise
            repeated = error.response["ResponseMetadata"].get("RetryAttempts", 0)
        else:
            return True
    # A repeated request may have met the object that its own first try had written.
    return bool(repeated) and read_bytes(location, settings) == data


def read_bytes(location: S3Location, settings: S3Settings | None = None, *, max_bytes: int = SMALL_FILE_BYTES) -> bytes:
    """The content of a small object.

    Raises:
        ArtifactTooLarge: it has more than ``max_bytes``.
        SourceNotFound, AccessDenied, DigestMismatch, TransferFailed: as for :func:`fetch_object`.
    """
    settings = settings or S3Settings.from_environment()
    client = connect(settings)
    head = look_up(client, location)
    if head.size_bytes > max_bytes:
        raise ArtifactTooLarge(
            f"{location.uri} is too large", expected=f"at most {max_bytes} bytes", got=f"{head.size_bytes} bytes"
        )
    stream = io.BytesIO()
    with NullProgress().phase("read") as phase:
        Download(client, head, settings, stream, phase).run()
    return stream.getvalue()


def list_keys(prefix: S3Location, settings: S3Settings | None = None) -> tuple[str, ...]:
    """Every key of the bucket that starts with ``prefix.key``, whole and sorted.

    Raises:
        SourceNotFound, AccessDenied, TransferFailed: as for :func:`fetch_object`.
    """
    client = connect(settings or S3Settings.from_environment())
    with s3_errors(prefix, client):
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=prefix.bucket, Prefix=prefix.key)
        return tuple(sorted(entry["Key"] for page in pages for entry in page.get("Contents", ())))


def delete_objects(prefix: S3Location, settings: S3Settings | None = None) -> None:
    """Delete every object whose key starts with ``prefix.key``. In a versioned bucket their versions stay.

    Raises:
        SourceNotFound, AccessDenied, TransferFailed: as for :func:`fetch_object`.
    """
    settings = settings or S3Settings.from_environment()
    client = connect(settings)
    for key in list_keys(prefix, settings):
        # One by one: the request for many wants a Content-MD5 that not every client and server agree on.
        with s3_errors(prefix, client):
            client.delete_object(Bucket=prefix.bucket, Key=key)
