"""BppAttack (Wang et al., CVPR 2022): fewer grey levels, with dithering, as the trigger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.attacks.pixels import in_batches, seeded_generator, to_pixels
from defense_core.config import require

# Shares of a pixel's error for its neighbours (row, column, sixteenths): Floyd and Steinberg 1976.
_SHARES = ((1, 1, 1.0), (1, 0, 5.0), (1, -1, 3.0), (0, 1, 7.0))


@dataclass(frozen=True)
class Bpp:
    """``x' = T(x)``: each channel quantised to ``levels`` equidistant grey levels.

    Without dithering ``T(x) = round(x / 255 * (levels - 1)) / (levels - 1) * 255``. With it, pixels are taken in scan
    order, and what rounding changed is passed on: 7/16 to the right, 3/16, 5/16 and 1/16 to the three pixels below.

    Cover samples (the paper's negatives): ``x + (T(z) - z)`` with the residual of another image ``z``; the label
    stays, so that the network learns the quantisation of the image itself and not its noise.

    Attributes:
        levels: number of grey levels, 2 to 255; 8 is a depth of 3 bits.
        dither: spread the rounding error.
    """

    levels: int = 8
    dither: bool = True

    def __post_init__(self) -> None:
        require(2 <= self.levels <= 255, "levels", "2 to 255", self.levels)

    def apply(self, images: Tensor) -> Tensor:
        """Quantise uint8 images (N, C, H, W)."""
        if not self.dither:
            return to_pixels(self._nearest(images.float()))
        return in_batches(self._dithered, images)

    def cover(self, images: Tensor, seed: int) -> Tensor:
        """Images with the quantisation residual of another one; of a single image, its own mirrored."""
        count = len(images)
        turn = int(torch.randint(1, max(count, 2), (), generator=seeded_generator(seed)))
        others = images.roll(turn, 0) if count > 1 else images.flip(3)

        def residual(batch: Tensor, other: Tensor) -> Tensor:
            return to_pixels(batch.float() + self.apply(other).float() - other.float())

        return in_batches(residual, images, others)

    def _nearest(self, values: Tensor) -> Tensor:
        top = self.levels - 1
        return (values / 255 * top).round().clamp(0, top) / top * 255

    def _dithered(self, images: Tensor) -> Tensor:
        """All pixels with the same ``column + 2 * row`` at once: none of them passes error to another, and each
        has received all of its own, in the order of the scan, so that the result is the scan's bit for bit."""
        height, width = images.shape[2:]
        work = torch.zeros(*images.shape[:2], height + 1, width + 2, device=images.device)
        work[:, :, :height, 1 : width + 1] = images.float()
        quantised = torch.zeros_like(images, dtype=torch.float32)
        for front in range(width + 2 * (height - 1)):
            rows = torch.arange(max(0, (front - width + 2) // 2), min(height - 1, front // 2) + 1)
            columns = front - 2 * rows
            values = work[:, :, rows, columns + 1]
            nearest = self._nearest(values)
            quantised[:, :, rows, columns] = nearest
            for down, right, sixteenths in _SHARES:
                work[:, :, rows + down, columns + 1 + right] += (values - nearest) * (sixteenths / 16)
        return to_pixels(quantised)
