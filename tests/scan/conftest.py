"""Thresholds of these tests are for the networks and readings of float32, on every processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.float32 import in_float32


@pytest.fixture(scope="module", autouse=True)
def _in_float32() -> Iterator[None]:
    """Of the module, so that its own fixtures train in float32 too."""
    with in_float32():
        yield
