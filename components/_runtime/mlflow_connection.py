"""Where MLflow is, how long to wait for it, and what its failures mean.

``import mlflow`` costs 1.2–1.4 s with a warm disk, whichever of its modules is named, and the first
client on an SQL store another 0.8 s. So nothing here imports it before :func:`connect`.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from components._runtime.addresses import without_secret_parameters
from defense_core.errors import (
    AccessDenied,
    ConfigError,
    QuarantineError,
    RegistryConflict,
    RegistryUnavailable,
    SourceNotFound,
    StorageError,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

REACH_TIMEOUT_S = 5
REACH_RETRIES = 2

_ABSENT = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"}
_DENIED = {"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"}
_CONFLICT = {"RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS", "RESOURCE_CONFLICT", "ABORTED"}
_REFUSED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
# HTTP takes passwords with "@", SQLAlchemy such with "/": what follows a colon is one unless it is a port.
_CREDENTIALS = re.compile(r"//(?:[^/@]*@(?:[^/@\s]*@)*|[^/@:\s]*:(?![0-9]{1,5}/)[^@\s]*@)")


@dataclass(frozen=True)
class MlflowSettings:
    """Where MLflow is.

    Attributes:
        tracking_uri: ``sqlite:////path/mlflow.db``, ``http(s)://host:port`` or another SQL URI.
        registry_uri: the same for the model registry; empty means the tracking URI.
        experiment: name of the experiment that holds the runs.
        artifact_root: where a new experiment keeps its artifacts; empty means the server's
            default, or a folder ``mlartifacts`` beside an SQLite file.
        timeout_s: wait for one answer of a server, whole seconds.
        max_retries: further attempts after a dropped connection or a 429/5xx answer.
    """

    tracking_uri: str
    registry_uri: str = ""
    experiment: str = "model-quarantine"
    artifact_root: str = ""
    timeout_s: int = 60
    max_retries: int = 3

    def __post_init__(self) -> None:
        for variable, uri in (("MLFLOW_TRACKING_URI", self.tracking_uri), ("MLFLOW_REGISTRY_URI", self.registry_uri)):
            _require_address(variable, uri)
        if not self.tracking_uri:
            raise ConfigError(
                "no MLflow tracking address",
                expected="sqlite:////path/mlflow.db or http(s)://host:port",
                got="an empty string",
                hint="Set MLFLOW_TRACKING_URI",
            )
        if self.timeout_s < 1 or not 0 <= self.max_retries <= 10:
            raise ConfigError(
                "MLflow waiting times are out of range",
                expected="timeout_s >= 1 and 0 <= max_retries <= 10",
                got=f"timeout_s={self.timeout_s}, max_retries={self.max_retries}",
                hint="Correct MLFLOW_HTTP_REQUEST_TIMEOUT or MLFLOW_HTTP_REQUEST_MAX_RETRIES",
            )

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> MlflowSettings:
        """Settings from MLflow's own variables and ``QUARANTINE_MLFLOW_ARTIFACT_ROOT``."""
        values = os.environ if environment is None else environment
        return cls(
            tracking_uri=values.get("MLFLOW_TRACKING_URI", ""),
            registry_uri=values.get("MLFLOW_REGISTRY_URI", ""),
            experiment=values.get("MLFLOW_EXPERIMENT_NAME") or cls.experiment,
            artifact_root=values.get("QUARANTINE_MLFLOW_ARTIFACT_ROOT", ""),
            timeout_s=_whole_number(values, "MLFLOW_HTTP_REQUEST_TIMEOUT", cls.timeout_s),
            max_retries=_whole_number(values, "MLFLOW_HTTP_REQUEST_MAX_RETRIES", cls.max_retries),
        )

    @property
    def is_remote(self) -> bool:
        """Whether the tracking store is a server, whose file paths mean nothing here."""
        return _is_server(self.tracking_uri)

    @property
    def has_remote_registry(self) -> bool:
        """Whether the model registry is a server, which others write to."""
        return _is_server(self.registry_uri or self.tracking_uri)


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")


@dataclass(frozen=True)
class MlflowConnection:
    """A client and the settings it was made from."""

    settings: MlflowSettings
    client: MlflowClient


def connect(settings: MlflowSettings, *, create: bool = True) -> MlflowConnection:
    """A client on a store that answers.

    An SQL store is created on first use, unless ``create`` is false: who only reads takes an SQLite file that is not
    there for a volume that is not mounted. A server that refuses connections is reported after about
    2 s, one that does not answer after about 20 s; later calls are bounded by
    ``timeout_s * (max_retries + 1)`` each.

    Raises:
        RegistryUnavailable: nothing answers there, or the database cannot be opened.
        AccessDenied: the server refuses these credentials.
        ConfigError: the address is malformed.
    """
    _prepare_environment(settings)
    registry_uri = settings.registry_uri or settings.tracking_uri
    with mlflow_errors("connect to MLflow", settings):
        from mlflow import MlflowClient

        for uri in sorted({settings.tracking_uri, registry_uri}):
            _reach(uri, create=create)
        try:
            client = MlflowClient(tracking_uri=settings.tracking_uri, registry_uri=registry_uri)
        except ValueError:  # SQLAlchemy's, of a port; its text may hold the rest of a password
            raise _malformed("MLflow's address", "a port that is no number") from None
    return MlflowConnection(settings, client)


@contextmanager
def mlflow_errors(action: str, settings: MlflowSettings) -> Iterator[None]:
    """Turn what MLflow and its transports raise into this project's errors.

    Args:
        action: what was being done, as an infinitive (``"set the alias champion"``).
        settings: named in the message, without credentials.
    """
    where = without_credentials(settings.tracking_uri)
    try:
        yield
    except QuarantineError:
        raise
    except _mlflow_exceptions() as error:
        raise _typed(error, action, where) from error
    except OSError as error:
        raise StorageError(
            f"cannot {action}",
            expected="readable and writable files with free space",
            got=_first_line(error),
            hint="Free space or correct the permissions, then run again",
        ) from error


def without_credentials(uri: str) -> str:
    """``uri``, or a text with addresses, without ``user:password@`` and without the values of secret parameters."""
    return without_secret_parameters(_CREDENTIALS.sub("//", uri))


def _prepare_environment(settings: MlflowSettings) -> None:
    """MLflow reads these variables when it is imported and at each request."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(settings.timeout_s)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(settings.max_retries)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)


def _reach(uri: str, *, create: bool) -> None:
    """Fail early and cheaply: MLflow itself would retry a broken SQL store for 100 s."""
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        _reach_server(uri)
    elif parts.scheme == "sqlite":
        _reach_sqlite(uri, create=create)


def _reach_server(uri: str) -> None:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import augmented_raise_for_status, http_request

    # The client's own transport, so that its proxies, certificates and credentials apply.
    response = http_request(
        get_default_host_creds(uri),
        "/health",
        "GET",
        timeout=REACH_TIMEOUT_S,
        max_retries=REACH_RETRIES,
        backoff_factor=1,
        raise_on_status=False,
    )
    if response.status_code != 404:  # a gateway may publish the API without /health
        augmented_raise_for_status(response)


def _reach_sqlite(uri: str, *, create: bool) -> None:
    path = Path(uri.removeprefix("sqlite:///").split("?")[0])
    if not create and not path.is_file():
        raise RegistryUnavailable(
            f"there is no registry at {path}",
            expected="an SQLite file",
            got="nothing",
            hint="Mount the volume that holds it, or correct the address",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=REACH_TIMEOUT_S)) as database:
        database.execute("PRAGMA schema_version").fetchone()


def _mlflow_exceptions() -> tuple[type[BaseException], ...]:
    """Evaluated only while an exception passes, so that its imports cost nothing otherwise."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    network = (ConnectionError, TimeoutError)
    return (
        MlflowException,
        RequestException,
        SQLAlchemyError,
        sqlite3.Error,
        Boto3Error,
        BotoCoreError,
        ClientError,
        *_google_exceptions(),
        *network,
    )


def _google_exceptions() -> tuple[type[BaseException], ...]:
    """What a client of Cloud Storage raises; nothing where it is not installed."""
    try:
        from google.api_core.exceptions import GoogleAPIError
        from google.auth.exceptions import GoogleAuthError
    except ImportError:
        return ()
    return (GoogleAPIError, GoogleAuthError)


def _typed(error: BaseException, action: str, where: str) -> QuarantineError:
    code = _code(error)
    got = f"{code or type(error).__name__}: {_first_line(error)}"
    what = f"cannot {action} at {where}"
    if code in _ABSENT:
        return SourceNotFound(what, expected="an existing entry", got=got, hint="Check the name, version and alias")
    if code in _DENIED:
        return AccessDenied(
            what, expected="credentials that allow it", got=got, hint="Check MLFLOW_TRACKING_USERNAME or _TOKEN"
        )
    if code in _CONFLICT:
        return RegistryConflict(what, expected="no contradicting entry", got=got, hint="Look at the entry, then rerun")
    if code in _REFUSED:
        return ConfigError(what, expected="a value that MLflow accepts", got=got, hint="Correct the value")
    return RegistryUnavailable(
        what, expected="an answer", got=got, hint="Check that the server runs, then run again; nothing is half promoted"
    )


def _code(error: BaseException) -> str:
    """MLflow's error code, also of an HTTP answer to an artifact request."""
    own: Any = getattr(error, "error_code", "")
    if own:
        return str(own)
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict) and response.get("Error", {}).get("Code") == "NoSuchBucket":
        return ""  # a store that is not there, or not this one, says nothing about what was in it
    status = getattr(response, "status_code", None)
    if status is None and isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if isinstance(error, _google_exceptions()):
        status = getattr(error, "code", None)
        if status == 404:
            return ""  # the same: a listing of Cloud Storage is empty, not absent, where nothing lies
    return {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND"}.get(status or 0, "")


def _first_line(error: BaseException) -> str:
    lines = without_credentials(str(error)).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _require_address(variable: str, uri: str) -> None:
    try:
        urlsplit(uri)
    except ValueError as error:
        raise _malformed(variable, str(error)) from None  # the address itself may hold a password


def _malformed(what: str, got: str) -> ConfigError:
    return ConfigError(
        f"{what} is malformed",
        expected="sqlite:////path/mlflow.db or http(s)://host:port",
        got=got,
        hint="Correct it; in a password write @ as %40",
    )


def _whole_number(values: Mapping[str, str], name: str, default: int) -> int:
    text = values.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ConfigError(f"{name} is not a number", expected="whole seconds or a count", got=text, hint="Correct it")
    return int(text)
