"""What an untrusted artifact may ask for has bounds itself."""

from __future__ import annotations

import math
from typing import Any

import pytest

from defense_core.errors import EXIT_USAGE, ConfigError
from defense_core.limits import LoadLimits


@pytest.mark.parametrize(
    "settings",
    [
        {"timeout_s": math.inf},
        {"timeout_s": math.nan},
        {"timeout_s": 1e8},
        {"timeout_s": 1e300},
        {"timeout_s": 0.0},
        {"max_bytes": 2**63 - 1},
        {"max_bytes": (1 << 48) + 1},
        {"max_bytes": 0},
    ],
)
def test_limits_that_no_reader_can_count_to_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="out of range") as caught:
        LoadLimits(**settings)
    assert caught.value.exit_code == EXIT_USAGE


def test_the_largest_limits() -> None:
    assert LoadLimits(timeout_s=7 * 86400, max_bytes=1 << 48).max_entries == 20_000
