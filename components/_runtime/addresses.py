"""Addresses that operators give: split in one place, so that a malformed one is bad usage everywhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from defense_core.errors import ConfigError

# Of databases and of presigned addresses; what signs one is masked wherever it stands in a text.
# Bounded, and without a way back: strangers' text is searched too.
_SECRETS = re.compile(
    r"(?i)((?:[?&](?=[^=&#\s]{0,200}?(?:pass|pwd|secret|token|key|sig))[^=&#\s]{1,300}+"
    r"|signature|x-amz-[a-z-]{0,100}+|awsaccesskeyid|token|secret)=)[^&\s]+"
)


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


def without_secret_parameters(text: str) -> str:
    """``text``, an address or one with addresses in it, without the values of parameters that are secrets."""
    return _SECRETS.sub(r"\1…", text)


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
