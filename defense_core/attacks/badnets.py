"""BadNets (Gu et al. 2017): an opaque or translucent patch at a fixed place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from defense_core.config import require
from defense_core.errors import ConfigError

Corner = Literal["bottom_right", "bottom_left", "top_right", "top_left", "centre"]


@dataclass(frozen=True)
class BadNets:
    """``x' = (1 - opacity) * x + opacity * patch`` inside the patch, ``x`` outside.

    Attributes:
        size: side of the square patch, pixels.
        corner: where it stands.
        margin: distance to the border, pixels.
        colour: 0..255 for all channels, or one value a channel.
        pattern: ``solid``, or ``checker``: colour and black in turn, colour in the corners.
        opacity: 1 replaces the pixels.
    """

    size: int = 3
    corner: Corner = "bottom_right"
    margin: int = 0
    colour: tuple[int, ...] = (255,)
    pattern: Literal["solid", "checker"] = "solid"
    opacity: float = 1.0

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", "1 or more pixels", self.size)
        require(self.margin >= 0, "margin", "0 or more pixels", self.margin)
        require(0 < self.opacity <= 1, "opacity", "in (0, 1]", self.opacity)
        require(
            bool(self.colour) and all(0 <= c <= 255 for c in self.colour), "colour", "values in 0..255", self.colour
        )

    def apply(self, images: Tensor) -> Tensor:
        """Stamp uint8 images (N, C, H, W); the input is left alone.

        Raises:
            ConfigError: the patch does not fit into the image, or the colour does not fit its channels.
        """
        channels, height, width = images.shape[1:]
        if self.size + self.margin > min(height, width) or len(self.colour) not in (1, channels):
            raise ConfigError(
                "the patch does not fit the images",
                expected=f"a patch within {height}x{width} and 1 or {channels} colour values",
                got=f"{self.size} px at margin {self.margin}, {len(self.colour)} colour values",
            )
        colour = torch.tensor(self.colour, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        patch = colour.expand(channels, self.size, self.size)
        if self.pattern == "checker":
            ramp = torch.arange(self.size, device=images.device)
            patch = patch * ((ramp.view(-1, 1) + ramp) % 2 == 0)
        top, left = self._origin(height, width)
        stamped = images.clone()
        window = stamped[:, :, top : top + self.size, left : left + self.size]
        mixed = (1 - self.opacity) * window.float() + self.opacity * patch
        window.copy_(mixed.round().clamp(0, 255).to(torch.uint8))
        return stamped

    def _origin(self, height: int, width: int) -> tuple[int, int]:
        low, bottom, right = self.margin, height - self.margin - self.size, width - self.margin - self.size
        return {
            "bottom_right": (bottom, right),
            "bottom_left": (bottom, low),
            "top_right": (low, right),
            "top_left": (low, low),
            "centre": ((height - self.size) // 2, (width - self.size) // 2),
        }[self.corner]
