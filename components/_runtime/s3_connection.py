"""How to reach S3: addresses, settings, the client, and botocore's errors as ours."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

import boto3
from botocore import exceptions as boto
from botocore.config import Config

from defense_core.config import require
from defense_core.errors import (
    AccessDenied,
    ConfigError,
    DigestMismatch,
    QuarantineError,
    SourceError,
    SourceNotFound,
    TransferFailed,
)

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_VERSION = "?versionId="
_PREFIX = "QUARANTINE_S3_"
_CREDENTIAL_ERRORS = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.TokenRetrievalError,
    boto.SSOError,
    boto.LoginError,
)
_SETTING_ERRORS = (boto.ProfileNotFound, boto.ConfigParseError, boto.ConfigNotFound)
_ADVICE = {
    "SignatureDoesNotMatch": "The secret key is wrong (some servers say this of an unknown access key too)",
    "InvalidAccessKeyId": "The access key is unknown to this server",
    "ExpiredToken": "The session token has expired; fetch new credentials",
    "RequestTimeTooSkewed": "Set this machine's clock",
    "InvalidObjectState": "The object is archived; restore it first",
}


@dataclass(frozen=True)
class S3Location:
    """An object: bucket, key and, where it is pinned, version id ("" where it is not)."""

    bucket: str
    key: str
    version_id: str = ""

    @property
    def uri(self) -> str:
        """``s3://bucket/key[?versionId=…]``; :func:`parse_s3_uri` turns it back."""
        pinned = f"{_VERSION}{quote(self.version_id, safe='')}" if self.version_id else ""
        return f"s3://{self.bucket}/{self.key}{pinned}"

    @property
    def parameters(self) -> dict[str, str]:
        """Arguments that name this object in boto3's calls."""
        named = {"Bucket": self.bucket, "Key": self.key}
        return named | {"VersionId": self.version_id} if self.version_id else named


def parse_s3_uri(uri: str) -> S3Location:
    """The location that ``s3://bucket/key[?versionId=…]`` names. The key is taken literally, never unquoted.

    Raises:
        ConfigError: another scheme, an impossible bucket name, no key, or another query.
    """
    scheme, _, rest = uri.partition("://")
    path, marker, version = rest.partition(_VERSION)
    bucket, _, key = path.partition("/")
    usable = scheme == "s3" and _BUCKET.fullmatch(bucket) and key and len(key.encode()) <= 1024
    if not usable or "?" in path or (marker and not version):
        raise ConfigError(
            "S3 address is malformed",
            expected="s3://bucket/key or s3://bucket/key?versionId=ID, bucket names of 3 to 63 of a-z 0-9 . -",
            got=repr(uri),
        )
    return S3Location(bucket, key, unquote(version))


@dataclass(frozen=True)
class S3Settings:
    """How to talk to the server. Credentials come from boto3's own chain, never from here.

    Attributes:
        endpoint_url: server other than AWS ("" for AWS).
        region: region name ("" for boto3's own choice).
        request_attempts: tries of one request (botocore's standard retry mode: 5xx, throttling,
            timeouts and connection errors; jittered exponential waits of at most 20 s).
        stream_attempts: connections that may break in the middle of one object before it counts as lost.
        retry_wait_s: the first wait between such connections is random between 0 and this; it doubles.
        retry_wait_max_s: cap of these waits.
        connect_timeout_s: limit for a connection to be made.
        read_timeout_s: limit for the server's silence.
        part_size_bytes: part of a multipart upload.
        chunk_bytes: what is hashed and written at once.
    """

    endpoint_url: str = ""
    region: str = ""
    request_attempts: int = 5
    stream_attempts: int = 8
    retry_wait_s: float = 0.5
    retry_wait_max_s: float = 20.0
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 30.0
    part_size_bytes: int = 8 << 20
    chunk_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("request_attempts", "stream_attempts", "chunk_bytes"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("connect_timeout_s", "read_timeout_s"):
            require(getattr(self, name) > 0, name, "more than 0", getattr(self, name))
        require(
            0 <= self.retry_wait_s <= self.retry_wait_max_s, "retry_wait_s", "0 to retry_wait_max_s", self.retry_wait_s
        )
        require(self.part_size_bytes >= 5 << 20, "part_size_bytes", "at least 5 MiB (S3's rule)", self.part_size_bytes)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> S3Settings:
        """Settings from environment variables; the one place where S3's are read.

        ``QUARANTINE_S3_<FIELD>`` sets any field (``QUARANTINE_S3_READ_TIMEOUT_S=60``). Without them the
        endpoint is ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL`` or ``MLFLOW_S3_ENDPOINT_URL``, the region
        ``AWS_REGION`` or ``AWS_DEFAULT_REGION``.

        Raises:
            ConfigError: a value is not a number, or out of range.
        """
        given = os.environ if environment is None else environment
        endpoints = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "MLFLOW_S3_ENDPOINT_URL")
        values: dict[str, Any] = {
            "endpoint_url": next((given[name] for name in endpoints if given.get(name)), ""),
            "region": given.get("AWS_REGION") or given.get("AWS_DEFAULT_REGION") or "",
        }
        for field in dataclasses.fields(cls):
            text = given.get(_PREFIX + field.name.upper(), "")
            if text:
                values[field.name] = _number_or_text(type(field.default), text, _PREFIX + field.name.upper())
        return cls(**values)


def connect(settings: S3Settings) -> Any:
    """A boto3 S3 client.

    Raises:
        ConfigError: the endpoint or the AWS profile is not usable.
    """
    config = Config(
        retries={"mode": "standard", "total_max_attempts": settings.request_attempts},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        s3={"addressing_style": "path"} if settings.endpoint_url else {},
        # Checksums of boto3's newer defaults are unknown to many S3 look-alikes; we hash everything ourselves.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        # A session of its own: boto3's default one keeps the first credentials it saw.
        session = boto3.session.Session()
        return session.client(
            "s3", endpoint_url=settings.endpoint_url or None, region_name=settings.region or None, config=config
        )
    except (ValueError, *_SETTING_ERRORS) as error:
        raise ConfigError(
            "S3 settings are not usable", expected="an http(s) endpoint and a known profile", got=error
        ) from error


@contextmanager
def s3_errors(location: S3Location, client: Any = None) -> Iterator[None]:
    """Turn botocore's errors of the block into typed ones.

    Args:
        location: the object that the block is about.
        client: asked what exactly is missing or refused when the answer alone does not tell.
    """
    try:
        yield
    except boto.ClientError as error:
        raise _refused(error, location, client) from error
    except _CREDENTIAL_ERRORS as error:
        hint = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or a role"
        raise AccessDenied(
            f"{location.uri} cannot be asked for", expected="usable credentials", got=error, hint=hint
        ) from error
    except (*_SETTING_ERRORS, boto.ParamValidationError) as error:
        raise ConfigError(f"{location.uri} cannot be asked for", expected="usable settings", got=error) from error
    except (boto.BotoCoreError, boto.HTTPClientError) as error:
        raise transfer_failed(location, error) from error


def transfer_failed(location: S3Location, why: object) -> TransferFailed:
    """The error for a transfer that no permitted retry could save."""
    return TransferFailed(
        f"transfer of {location.uri} failed",
        expected="an answer within the permitted retries",
        got=why,
        hint="Nothing was left behind. Check the endpoint and the network, then run it again",
    )


def code_of(error: boto.ClientError) -> str:
    """S3's error code: a name, or the HTTP status where the answer had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: boto.ClientError) -> int:
    """HTTP status of the answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refused(error: boto.ClientError, location: S3Location, client: Any) -> QuarantineError:
    status, code = status_of(error), code_of(error)
    if status >= 500 or code in {"SlowDown", "RequestTimeout", "ConditionalRequestConflict"} or status == 429:
        return transfer_failed(location, error)
    if status == 412:
        return DigestMismatch(
            f"{location.uri} changed while it was read",
            expected="the object that was looked up",
            got="another one",
            hint="Nothing was kept. Turn the bucket's versioning on, or run it again",
        )
    return _diagnosed(error, location, client)


def _diagnosed(error: boto.ClientError, location: S3Location, client: Any) -> QuarantineError:
    status, code = status_of(error), code_of(error)
    # Answers to HEAD have no body, so they name no cause: a listing's answer does.
    cause = _cause(client, location.bucket) if client is not None else None
    if status in (401, 403):
        return _denied(location, (cause if code.isdigit() else None) or code)
    if cause == "NoSuchBucket" or code == "NoSuchBucket":
        return SourceNotFound(
            f"bucket {location.bucket} does not exist", hint=f"Check the address {location.uri} and the endpoint"
        )
    if cause in {"SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken"}:
        return _denied(location, cause)
    if status in (404, 405) or (status == 400 and location.version_id):
        return _absent(location, client)
    return SourceError(
        f"{location.uri} cannot be used", expected="an answer", got=error, hint="Check the address and the region"
    )


def _denied(location: S3Location, code: str) -> AccessDenied:
    hint = _ADVICE.get(code, "Check the credentials and their rights to read this object (and to list the bucket)")
    return AccessDenied(f"{location.uri} is refused", expected="credentials with the right to it", got=code, hint=hint)


def _absent(location: S3Location, client: Any) -> SourceNotFound:
    if location.version_id and client is not None and _exists(client, location):
        return SourceNotFound(
            f"version {location.version_id} of s3://{location.bucket}/{location.key} does not exist",
            expected="the id of a version that was not deleted",
            got=location.version_id,
            hint="List the object's versions, or leave ?versionId= out for the latest",
        )
    return SourceNotFound(
        f"key {location.key} does not exist in bucket {location.bucket}", hint=f"Check the address {location.uri}"
    )


def _cause(client: Any, bucket: str) -> str | None:
    try:
        client.list_objects_v2(Bucket=bucket, MaxKeys=1)
    except boto.ClientError as error:
        return code_of(error)
    except boto.BotoCoreError:
        return None  # the first answer has to do
    return None


def _exists(client: Any, location: S3Location) -> bool:
    try:
        client.head_object(Bucket=location.bucket, Key=location.key)
    except boto.ClientError as error:
        return status_of(error) != 404
    except boto.BotoCoreError:
        return True  # not known to be absent
    return True


def _number_or_text(kind: type, text: str, name: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(
            f"environment variable {name} is malformed", expected=kind.__name__, got=repr(text)
        ) from error
