"""Which addresses a registry entry may name: any writer of the registry can set any source."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from components._runtime.mlflow_connection import MlflowSettings, without_credentials
from defense_core.errors import UnsafeArtifact

REMOTE_SCHEMES = ("mlflow-artifacts", "s3", "gs", "wasbs", "abfss")
LOCAL_SCHEMES = ("", "file")
# Where Microsoft serves Azure storage. MLflow sends its Azure credentials to the host that an abfss address names.
_AZURE_HOST = re.compile(
    r"[^@]+@(?:[^@.]+\.(?:blob|dfs)\.core\.(?:windows\.net|chinacloudapi\.cn|usgovcloudapi\.net)"
    r"|onelake\.dfs\.fabric\.microsoft\.com)",
    re.ASCII,
)


def require_allowed_source(uri: str, settings: MlflowSettings, what: str) -> None:
    """Refuse a source that a registry entry must not make us read: the web, our own files, or another's server.

    Raises:
        UnsafeArtifact: its scheme is not an artifact store's, it is a path and MLflow is remote, or it names a host
            that would be sent credentials which are not its own.
    """
    allowed = REMOTE_SCHEMES if settings.is_remote else REMOTE_SCHEMES + LOCAL_SCHEMES
    scheme, host = _scheme_and_host(uri)
    if scheme not in allowed:
        raise UnsafeArtifact(
            f"source of {what} may not be read",
            expected="one of " + ", ".join(f"{scheme}:" for scheme in allowed if scheme),
            got=without_credentials(uri),
            hint="A registry entry can name any address; register the files through MLflow's artifact store",
        )
    own = urlsplit(settings.tracking_uri).netloc.rpartition("@")[2]
    if scheme == "mlflow-artifacts" and host not in ("", own):
        raise _foreign_host(what, f"no host, or {own}", uri)
    if scheme in ("wasbs", "abfss") and not _AZURE_HOST.fullmatch(host):
        raise _foreign_host(what, "a host of Azure storage", uri)


def _scheme_and_host(uri: str) -> tuple[str, str]:
    """As MLflow reads them; a malformed address has the scheme ``?``, which no store has."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "?", ""
    return parts.scheme, parts.netloc


def _foreign_host(what: str, expected: str, uri: str) -> UnsafeArtifact:
    return UnsafeArtifact(
        f"source of {what} may not be read",
        expected=expected,
        got=without_credentials(uri),
        hint="MLflow's client would send its credentials to that host; tell the owner of the registry",
    )
