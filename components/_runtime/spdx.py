"""SPDX licence expressions: recognised, and written in one way."""

from __future__ import annotations

import functools
import re
from typing import Any

from defense_core.errors import ConfigError

_FORM = re.compile(r"\s*[A-Za-z0-9(][A-Za-z0-9 .+()-]{0,199}")


def spdx(text: str) -> str | None:
    """``text`` as a normal SPDX expression (``apache-2.0`` → ``Apache-2.0``); ``None``: it is none."""
    if not _FORM.fullmatch(text):
        return None
    try:
        return str(_licensing().parse(text, validate=True))
    except Exception:  # noqa: BLE001 - the library fails in many ways on a malformed text, which may be a stranger's
        return None


def require_spdx(text: str) -> None:
    """Raise ConfigError unless ``text`` is an SPDX expression."""
    if spdx(text) is None:
        raise ConfigError(
            "the declared licence is no SPDX expression",
            expected="an identifier such as Apache-2.0, or an expression of them",
            got=repr(text)[:100],
            hint="See https://spdx.org/licenses",
        )


@functools.cache
def _licensing() -> Any:
    # It reads all licences of the SPDX list, which takes a moment.
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()
