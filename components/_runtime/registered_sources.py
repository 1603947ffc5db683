"""Which addresses a registry entry may name: any writer of the registry can set any source."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit, urlunsplit

from components._runtime.mlflow_connection import MlflowSettings, without_credentials
from defense_core.errors import AccessDenied, RegistryUnavailable, SourceNotFound, UnsafeArtifact
from defense_core.files import reading

REMOTE_SCHEMES = ("mlflow-artifacts", "s3", "gs", "wasbs", "abfss")
LOCAL_SCHEMES = ("", "file")
ENCLOSING = 3
"""Folders around a version's own that belong to its run or model and to its experiment."""
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


def require_stated_source(uri: str, settings: MlflowSettings, what: str) -> None:
    """:func:`require_allowed_source` for what the registry itself says, before a run or logged model is looked up.

    Runs may be kept on this machine while the registry is a server: what it says must not name our files then either.
    """
    if settings.has_remote_registry and _scheme_and_host(uri)[0] in LOCAL_SCHEMES:
        raise UnsafeArtifact(
            f"source of {what} may not be read",
            expected="a run, a logged model or an artifact store",
            got=without_credentials(uri),
            hint="The registry is a server, and any of its writers can name a path on this machine",
        )
    require_allowed_source(uri, settings, what)


def require_mounted(uri: str, what: str) -> None:
    """Refuse to take a local store that is not there for one whose files were deleted.

    The folder of a version lies in folders of its run or model and of its experiment. Where none of them holds
    anything, what is missing is the store: a volume that is not mounted, a machine that never had it.

    Args:
        uri: a path or ``file:`` address; any other is left to its store, which answers or does not.

    Raises:
        AccessDenied: this account may not look there.
        RegistryUnavailable: neither the folder nor one of the ``ENCLOSING`` folders around it holds anything.
    """
    if _scheme_and_host(uri)[0] not in LOCAL_SCHEMES:
        return
    from mlflow.utils.file_utils import local_file_uri_to_path

    folder = Path(local_file_uri_to_path(uri))
    around = (folder, *folder.parents)[: ENCLOSING + 1]
    with reading(folder, RegistryUnavailable, "a readable folder", denied=AccessDenied):
        holds_something = any(each.is_dir() and any(each.iterdir()) for each in around)
    if not holds_something:
        raise _not_there(what, folder)


def require_store(uri: str, what: str, listed: Callable[[str], Collection[object]]) -> None:
    """:func:`require_mounted` for a store that is no folder of this machine, and that lists nothing at ``uri``.

    A server or bucket whose volume is missing answers like an empty one.

    Args:
        listed: what the store lists at an address.

    Raises:
        RegistryUnavailable: it lists nothing at ``uri`` or at one of the ``ENCLOSING`` addresses around it either, or
            says of one that there is none.
        as ``listed``.
    """
    if _scheme_and_host(uri)[0] in LOCAL_SCHEMES:
        return
    parts = urlsplit(uri)
    path = PurePosixPath(parts.path)
    around = [urlunsplit(parts._replace(path=str(each))) for each in (path, *path.parents)[: ENCLOSING + 1]]
    try:
        holds_something = any(listed(address) for address in around)
    except SourceNotFound as error:
        raise _not_there(what, without_credentials(uri)) from error
    if not holds_something:
        raise _not_there(what, without_credentials(uri))


def _not_there(what: str, folder: object) -> RegistryUnavailable:
    return RegistryUnavailable(
        f"the artifact store of {what} is not there",
        expected=f"a folder {folder}, or what remains of the experiment around it",
        got="nothing, or empty folders",
        hint="Mount the volume that holds the registry's artifacts, or run where it is mounted",
    )


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
