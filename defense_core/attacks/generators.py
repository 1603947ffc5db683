"""The small image-to-image networks that learned triggers consist of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.config import require

MAX_WIDTH = 512
"""Channels of the widest network: what it weighs can be written to a trigger's file and read back."""


def require_width(width: int, *, multiple: int = 1) -> None:
    """Refuse networks that cannot be made. Raises ConfigError."""
    wanted = f"a multiple of {multiple}, " if multiple > 1 else "1 or more, "
    require(multiple <= width <= MAX_WIDTH and width % multiple == 0, "width", f"{wanted}at most {MAX_WIDTH}", width)


class UNet(nn.Module):
    """One step down, one step up, and a skip connection; any image of 2x2 pixels or more.

    Group normalisation works within one image, so that an image's trigger does not depend on its batch.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int) -> None:
        super().__init__()
        self.enter = _block(in_channels, width)
        self.deep = nn.Sequential(_block(width, 2 * width), _block(2 * width, width))
        self.join = _block(2 * width, width)
        self.leave = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H, W), unbounded."""
        outer = self.enter(inputs)
        inner = self.deep(F.avg_pool2d(outer, 2))
        inner = F.interpolate(inner, outer.shape[2:], mode="bilinear", align_corners=False)
        result: Tensor = self.leave(self.join(torch.cat([outer, inner], dim=1)))
        return result


class ColourMap(nn.Module):
    """A change of colours: each pixel's new value follows from its old one and from the image's mean and deviation.

    Convolutions are 1x1, so that places, edges and shapes stay where they are.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3 * channels, width, 1), nn.Tanh(), nn.Conv2d(width, width, 1), nn.Tanh(),
            nn.Conv2d(width, channels, 1),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] to a change in [-1, 1] of the same shape."""
        mean = inputs.mean(dim=(2, 3), keepdim=True).expand_as(inputs)
        deviation = inputs.var(dim=(2, 3), keepdim=True, unbiased=False).add(1e-8).sqrt().expand_as(inputs)
        result: Tensor = self.layers(torch.cat([inputs, mean, deviation], dim=1)).tanh()
        return result


def _block(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GroupNorm(4, out_channels), nn.LeakyReLU(0.1)
    )
