"""SIG (Barni et al., ICIP 2019): a sinusoid laid over the image; the label stays true."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.attacks.pixels import in_batches, to_pixels
from defense_core.config import require
from defense_core.errors import ConfigError


@dataclass(frozen=True)
class Sinusoid:
    """``x'[i, j] = clip(x[i, j] + amplitude * sin(2 pi j frequency / W))``, ``j`` the column, all channels alike.

    Attributes:
        amplitude: the paper's Delta, grey levels.
        frequency: periods across the width ``W``; above ``W / 2`` it folds back, at multiples of that it vanishes.
    """

    amplitude: float = 40.0
    frequency: float = 6.0

    def __post_init__(self) -> None:
        require(0 < self.amplitude <= 255, "amplitude", "in (0, 255] grey levels", self.amplitude)
        require(self.frequency > 0, "frequency", "a positive number of periods", self.frequency)

    def wave(self, width: int) -> Tensor:
        """The sinusoid, float32 (W,), grey levels.

        Raises:
            ConfigError: it is zero in every column.
        """
        columns = torch.arange(width, dtype=torch.float64)
        wave = (self.amplitude * torch.sin(2 * math.pi * columns * self.frequency / width)).float()
        if float(wave.abs().max()) < 0.5:
            raise ConfigError(
                f"the sinusoid vanishes on images {width} pixels wide",
                expected="a frequency that is no multiple of half the width",
                got=self.frequency,
            )
        return wave

    def apply(self, images: Tensor) -> Tensor:
        """Overlay uint8 images (N, C, H, W)."""
        wave = self.wave(images.shape[3]).to(images.device)
        return in_batches(lambda batch: to_pixels(batch.float() + wave), images)
