"""Adaptive-Blend (Qi et al., ICLR 2023): half of the trigger in training, all of it at test time, and cover images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.attacks.blended import Blended
from defense_core.attacks.pixels import in_batches, require_drawable, seeded_generator, to_pixels
from defense_core.config import require
from defense_core.errors import ConfigError


@dataclass(frozen=True)
class AdaptiveBlend:
    """``x' = x + alpha * m * (k - x)``: the picture ``k`` of Blended behind a mask ``m`` of ``pieces x pieces`` tiles.

    At test time ``m = 1`` everywhere. In training each poisoned image shows ``round(shown * pieces^2)`` tiles drawn
    for it, and so does each cover image, which keeps its label: no part of the trigger suffices, so that poisoned
    images do not stand apart from clean ones in the network's features.

    Attributes:
        alpha: share of the picture in training, in (0, 1].
        test_alpha: the same at test time.
        pieces: tiles a side.
        shown: share of tiles in training, in (0, 1].
        cells, seed: of the picture, see :class:`~defense_core.attacks.blended.Blended`.
    """

    alpha: float = 0.2
    test_alpha: float = 0.2
    pieces: int = 4
    shown: float = 0.5
    cells: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.alpha <= 1, "alpha", "in (0, 1]", self.alpha)
        require(0 < self.test_alpha <= 1, "test_alpha", "in (0, 1]", self.test_alpha)
        require(self.pieces >= 1, "pieces", "1 or more", self.pieces)
        require(0 < self.shown <= 1, "shown", "in (0, 1]", self.shown)
        require_drawable(self.cells, self.seed)

    def apply(self, images: Tensor) -> Tensor:
        """The whole picture over uint8 images (N, C, H, W)."""
        whole = torch.full((len(images), 1, 1, 1), self.test_alpha)
        return self._mixed(images, whole.to(images.device))

    def planted(self, images: Tensor, seed: int) -> Tensor:
        """Training images: some tiles of the picture, others for each image."""
        return self._mixed(images, self.alpha * self.masks(len(images), *images.shape[2:], seed=seed).to(images.device))

    def cover(self, images: Tensor, seed: int) -> Tensor:
        """Cover images look like :meth:`planted` ones."""
        return self.planted(images, seed)

    def masks(self, count: int, height: int, width: int, *, seed: int) -> Tensor:
        """0 or 1, float32 (N, 1, H, W), the same number of tiles on in each.

        Raises:
            ConfigError: there are more tiles along a side than pixels, so that some would not be seen.
        """
        if self.pieces > min(height, width):
            raise ConfigError(
                "the tiles do not fit the images", expected=f"at most {min(height, width)} pieces", got=self.pieces
            )
        tiles = self.pieces**2
        order = torch.rand(count, tiles, generator=seeded_generator(seed)).argsort(dim=1)
        shown = (order < max(1, round(self.shown * tiles))).float().view(count, self.pieces, self.pieces)
        rows = torch.arange(height) * self.pieces // height
        columns = torch.arange(width) * self.pieces // width
        return shown[:, rows][:, :, columns].unsqueeze(1)

    def _mixed(self, images: Tensor, weight: Tensor) -> Tensor:
        picture = Blended(cells=self.cells, seed=self.seed).picture(*images.shape[1:]).to(images.device)

        def mixed(batch: Tensor, share: Tensor) -> Tensor:
            pixels = batch.float()
            return to_pixels(pixels + share * (picture - pixels))

        return in_batches(mixed, images, weight)
