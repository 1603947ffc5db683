"""Between uint8 images and the real-valued pixels that equations speak of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from defense_core.config import require

MAX_CELLS = 1024
MAX_SEED = 2**63 - 1
"""Largest seed that torch takes, as everywhere else."""
BATCH = 512
"""Images at a time, so that memory does not grow with the set."""


def to_pixels(values: Tensor) -> Tensor:
    """Real values, in units of grey levels, as uint8: rounded to the nearest level, then clipped to 0..255."""
    return values.round().clamp(0, 255).to(torch.uint8)


def in_batches(change: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """``change`` of ``BATCH`` images at a time, in order, and of what belongs to them in further tensors."""
    parts = zip(*(each.split(BATCH) for each in rows), strict=True)
    return torch.cat([change(*part) for part in parts])


def require_drawable(cells: int, seed: int, *, least: int = 1) -> None:
    """Refuse a grid or a seed that nothing can be drawn with.

    Raises:
        ConfigError: fewer than ``least`` cells a side or more than 1,024, or a seed that torch does not take.
    """
    require(least <= cells <= MAX_CELLS, "cells", f"{least} to {MAX_CELLS}", cells)
    require(0 <= seed <= MAX_SEED, "seed", f"0 to {MAX_SEED}", seed)


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator, so that the same seed draws the same numbers on every device."""
    return torch.Generator().manual_seed(seed)
