"""WaNet (Nguyen and Tran, ICLR 2021): a small smooth warp of the whole image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from defense_core.attacks.pixels import in_batches, require_drawable, seeded_generator, to_pixels
from defense_core.config import require


@dataclass(frozen=True)
class WaNet:
    """``x' = x`` sampled at ``clip(identity + strength * P / side, -1, 1)``, coordinates in [-1, 1].

    ``P`` is a ``cells x cells`` field drawn from U[-1, 1] for each axis, divided by its mean absolute value and
    enlarged to the image by bicubic interpolation (eq. 2-6); ``side`` is the image's extent along the axis, so that
    ``strength`` is about the mean shift in half pixels.

    Noise mode: cover samples are warped by the same field plus U[-1, 1] / side at every pixel, drawn for each image
    anew, and keep their label, so that the network learns this warp and not any warp.

    Attributes:
        strength: the paper's s.
        cells: the paper's k.
        seed: draws the field.
    """

    strength: float = 0.5
    cells: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.strength > 0, "strength", "a positive number", self.strength)
        require_drawable(self.cells, self.seed, least=2)

    def field(self, height: int, width: int) -> Tensor:
        """``strength * P / side``, float32 (H, W, 2): shifts along x, then along y, in [-1, 1] coordinates."""
        coarse = torch.rand(1, 2, self.cells, self.cells, generator=seeded_generator(self.seed)) * 2 - 1
        coarse = coarse / coarse.abs().mean()
        smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
        return self.strength * smooth / torch.tensor([width, height], dtype=torch.float32)

    def apply(self, images: Tensor) -> Tensor:
        """Warp uint8 images (N, C, H, W)."""
        shift = self.field(*images.shape[2:]).to(images.device).unsqueeze(0)
        return in_batches(lambda batch: _warped(batch, shift), images)

    def cover(self, images: Tensor, seed: int) -> Tensor:
        """Noise-mode images: the warp with a random disturbance of its own for each image."""
        height, width = images.shape[2:]
        shift = self.field(height, width)
        generator = seeded_generator(seed)

        def disturbed(batch: Tensor) -> Tensor:
            noise = torch.rand(len(batch), height, width, 2, generator=generator) * 2 - 1
            return _warped(batch, (shift + noise / torch.tensor([width, height], dtype=torch.float32)).to(batch.device))

        return in_batches(disturbed, images)


def _warped(images: Tensor, shift: Tensor) -> Tensor:
    height, width = images.shape[2:]
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    identity = torch.stack([columns, rows], dim=-1).to(images.device)
    grid = (identity + shift).clamp(-1, 1).expand(len(images), -1, -1, -1)
    return to_pixels(F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=True))
