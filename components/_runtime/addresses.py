"""Addresses that operators give: split in one place, so that a malformed one is bad usage everywhere."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from defense_core.errors import ConfigError


def split_address(address: str) -> SplitResult:
    """``address`` in its parts; a plain path has no scheme.

    Raises:
        ConfigError: it cannot be split (a bracket that is not closed).
    """
    try:
        return urlsplit(address)
    except ValueError as error:
        raise ConfigError(
            "address is malformed", expected="s3://, models:/, file:///… or a path", got=f"{address[:120]!r}: {error}"
        ) from error


def local_path(address: str) -> Path:
    """The path that ``address``, a path or ``file:///…``, names.

    Raises:
        ConfigError: it names a file of another host, none, or cannot be split.
    """
    parts = split_address(address)
    if parts.scheme != "file":
        return Path(address)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path or "\0" in path:
        raise ConfigError(
            "address names no file of this machine",
            expected="file:///absolute/path",
            got=repr(address[:120]),
            hint="Write three slashes, or give the path alone",
        )
    return Path(path)
