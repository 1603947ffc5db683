"""A small network and images for it, that oracles are computed on."""

from __future__ import annotations

import torch
from torch import nn

from defense_core.architectures import build
from defense_core.data import CleanSet


def small_cnn() -> nn.Module:
    """Four channels wide, for images of 1x8x8 and four classes."""
    return build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 4})


def clean_set(count: int = 24) -> CleanSet:
    """Noise, with labels in turn."""
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return CleanSet(images.to(torch.uint8), torch.arange(count) % 4, 4)
