"""Networks that answer in float32 whatever the processor is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def in_float32() -> Iterator[None]:
    """Without bfloat16, which not every processor multiplies: a comparison must not be of other victims there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("defense_core.inference.NATIVE_BFLOAT16", ())
        yield
