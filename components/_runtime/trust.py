"""Whose code may build a network: the operator's allow-list, from options and from the image."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from defense_core.factories import check_trusted_modules

VARIABLE = "QUARANTINE_TRUSTED_MODULES"


def trusted_modules(named: Iterable[str] = (), environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Entries that were named by option or configuration, and those of ``QUARANTINE_TRUSTED_MODULES``.

    Args:
        named: ``package``, ``package.module`` or ``package.module:factory`` entries.
        environment: where the variable is read, separated by commas; the process's by default.

    Raises:
        ConfigError: an entry is malformed, or trusts a whole library.
    """
    values = os.environ if environment is None else environment
    listed = [entry.strip() for entry in values.get(VARIABLE, "").split(",")]
    return check_trusted_modules([*named, *filter(None, listed)])
