"""Blended injection (Chen et al. 2017): one fixed picture mixed faintly into the whole image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from defense_core.attacks.pixels import in_batches, require_drawable
from defense_core.config import require


@dataclass(frozen=True)
class Blended:
    """``x' = (1 - alpha) * x + alpha * k`` with a fixed picture ``k``.

    The picture is generated: uniform noise of ``cells x cells`` blocks, enlarged bilinearly
    to the image, so that it has structure at a scale that resizing and cropping keep.

    Attributes:
        alpha: share of the picture, in (0, 1].
        cells: blocks a side.
        seed: draws the picture.
    """

    alpha: float = 0.2
    cells: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, "alpha", "in (0, 1]", self.alpha)
        require_drawable(self.cells, self.seed)

    def picture(self, channels: int, height: int, width: int) -> Tensor:
        """The picture ``k``: float32 in 0..255, (C, H, W)."""
        generator = torch.Generator().manual_seed(self.seed)
        coarse = torch.rand(1, channels, self.cells, self.cells, generator=generator) * 255
        return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]

    def apply(self, images: Tensor) -> Tensor:
        """Blend uint8 images (N, C, H, W); the result is floored to uint8."""
        picture = self.picture(*images.shape[1:]).to(images.device)

        def mixed(batch: Tensor) -> Tensor:
            return ((1 - self.alpha) * batch.float() + self.alpha * picture).clamp(0, 255).floor().to(torch.uint8)

        return in_batches(mixed, images)
