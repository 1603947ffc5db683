"""The descent behind trigger inversion: small masks with a pattern, many at once, each with its own weight of size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.data import CleanSet
from defense_core.inference import items_at_once
from defense_core.scan.base import Subject
from defense_core.scan.sampling import Adam, drawn

START = -1.0
"""First value of a mask's logit: a mask of 27 % everywhere."""


@dataclass(frozen=True)
class Descent:
    """How masks are made small.

    Attributes:
        batch_size: images an item and step.
        lr: Adam's step, in logits of mask and pattern.
        kept_at: success that the search holds, in (0, 1].
        growth: factor on an item's lambda at each step at which it succeeds; it falls by ``growth ** 1.5`` otherwise.
        patience: steps without a mask 3 % smaller than the best, after which an item is finished.
    """

    batch_size: int
    lr: float
    kept_at: float
    growth: float
    patience: int


@dataclass(frozen=True, eq=False)
class Patches:
    """Logits of masks (T, 1, H, W) and patterns (T, C, H, W), one tensor (T, 1 + C, H, W)."""

    logits: Tensor

    @property
    def masks(self) -> Tensor:
        return self.logits[:, :1].sigmoid()

    @property
    def patterns(self) -> Tensor:
        return self.logits[:, 1:].sigmoid()

    def on(self, pixels: Tensor) -> Tensor:
        """Images (T, B, C, H, W) in [0, 1] with the patch of their item."""
        masks, patterns = self.masks[:, None], self.patterns[:, None]
        return (1 - masks) * pixels + masks * patterns


class Inversion:
    """Neural Cleanse's descent for some items at once: an item is some images and the class that they shall go to.

    ``losses`` are running means of the cross-entropy, ``active`` says which items still shrink, ``best`` are the
    logits of the smallest mask of each item at which the attack succeeded (the last ones where it never did).

    Args:
        clean: images to draw from.
        pools: for each item, the indices of its images.
        targets: the class of each item.
    """

    def __init__(
        self,
        subject: Subject,
        clean: CleanSet,
        pools: Sequence[Tensor],
        *,
        targets: Sequence[int],
        descent: Descent,
        generator: torch.Generator,
    ) -> None:
        _, channels, height, width = clean.images.shape
        device, count = subject.device, len(targets)
        self._subject, self._clean, self._descent, self._generator = subject, clean, descent, generator
        self._pools = list(pools)
        self._targets = torch.tensor(list(targets), device=device)
        noise = torch.randn(count, 1 + channels, height, width, generator=generator)
        start = torch.zeros(1 + channels, 1, 1)
        start[0] = START
        self.logits = (start + 0.1 * noise).to(device)
        self._adam = Adam(self.logits, descent.lr)
        self._weight = torch.full((count,), 1e-3, device=device)
        self._rate = torch.zeros(count, device=device)
        self.losses = torch.full((count,), math.log(subject.num_classes), device=device)
        self.active = torch.ones(count, dtype=torch.bool, device=device)
        self.best = self.logits.clone()
        self._smallest = torch.full((count,), math.inf, device=device)
        self._stalled = torch.zeros(count, dtype=torch.int64, device=device)

    def step(self) -> None:
        """One Adam step of every active item."""
        rows = self.active.nonzero().flatten()
        index = drawn([self._pools[row] for row in rows.tolist()], self._descent.batch_size, self._generator)
        at_once = items_at_once(self._clean.images, self._descent.batch_size)
        for some, images in zip(rows.split(at_once), index.split(at_once), strict=True):
            self._down(some, self._clean.images[images.to(self._clean.images.device)].float() / 255)
        self._control(rows)

    def _down(self, rows: Tensor, pixels: Tensor) -> None:
        logits = self.logits[rows].requires_grad_(True)
        patches = Patches(logits)
        outputs = self._subject.logits(patches.on(pixels).flatten(0, 1))
        wanted = self._targets[rows].repeat_interleave(pixels.shape[1])
        losses = self._subject.task.losses(outputs, wanted).view(len(rows), -1).mean(1)
        # The size counts as on 32 x 32 pixels, so that lambda means the same at every resolution.
        sizes = 1024 * patches.masks.mean((1, 2, 3))
        (gradient,) = torch.autograd.grad((losses + self._weight[rows] * sizes).sum(), logits)
        hits = (outputs.argmax(1) == wanted).float().view(len(rows), -1).mean(1)
        self._rate[rows] = 0.6 * self._rate[rows] + 0.4 * hits
        self.losses[rows] = 0.6 * self.losses[rows] + 0.4 * losses.detach()
        self._keep(rows, sizes.detach())
        self.logits[rows] -= self._adam.step(gradient, rows)

    def _keep(self, rows: Tensor, sizes: Tensor) -> None:
        """Remember masks that are the smallest yet and still succeed."""
        succeeds = self._rate[rows] >= self._descent.kept_at
        smaller = succeeds & (sizes < self._smallest[rows])
        much_smaller = succeeds & (sizes < 0.97 * self._smallest[rows])
        never = self._smallest[rows].isinf()
        kept = rows[smaller | never]
        self.best[kept] = self.logits[kept]
        self._smallest[rows[smaller]] = sizes[smaller]
        waiting = torch.where(much_smaller | never, torch.zeros_like(self._stalled[rows]), self._stalled[rows] + 1)
        self._stalled[rows] = waiting

    def _control(self, rows: Tensor) -> None:
        """Lambda rises where the attack succeeds and falls where it does not; finished items rest."""
        up = self._descent.growth
        factor = torch.where(self._rate[rows] >= self._descent.kept_at, up, up**-1.5)
        self._weight[rows] = (self._weight[rows] * factor).clamp(1e-6, 1.0)
        self.active[rows] = self._stalled[rows] < self._descent.patience
