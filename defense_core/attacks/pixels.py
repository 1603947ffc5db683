"""Between uint8 images and the real-valued pixels that equations speak of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_pixels(values: Tensor) -> Tensor:
    """Real values, in units of grey levels, as uint8: rounded to the nearest level, then clipped to 0..255."""
    return values.round().clamp(0, 255).to(torch.uint8)


def in_batches(change: Callable[[Tensor], Tensor], images: Tensor, size: int = 512) -> Tensor:
    """``change`` applied to ``size`` images at a time, so that memory does not grow with the set."""
    if len(images) <= size:
        return change(images)
    return torch.cat([change(batch) for batch in images.split(size)])


def seeded_generator(seed: int) -> torch.Generator:
    """A CPU generator, so that the same seed draws the same numbers on every device."""
    return torch.Generator().manual_seed(seed)
