"""LF (Zeng et al., ICCV 2021): one smooth perturbation that pushes most images to the target class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.attacks.joint import Wanted
from defense_core.attacks.learned import Learned
from defense_core.attacks.pixels import in_batches, seeded_generator, to_pixels
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.errors import ConfigError
from defense_core.inference import autocast, channels_last
from defense_core.layers import evaluating
from defense_core.loop import batch_indices
from defense_core.progress import Progress
from defense_core.task import Task


@dataclass(frozen=True)
class LowFrequency(Learned):
    """``x' = clip(x + v)`` with a fixed ``v``, tensor ``perturbation`` (C, H, W), grey levels."""

    def layout(self) -> dict[str, int]:
        """Tensors of the file."""
        return {"perturbation": 3}

    def apply(self, images: Tensor) -> Tensor:
        """Add the perturbation to uint8 images (N, C, H, W). Raises ConfigError for images of another size."""
        perturbation = self.tensors["perturbation"]
        if images.shape[1:] != perturbation.shape:
            raise ConfigError(
                "the perturbation does not fit the images", expected=tuple(perturbation.shape), got=images.shape[1:]
            )
        perturbation = perturbation.to(images.device)
        return in_batches(lambda batch: to_pixels(batch.float() + perturbation), images)


@dataclass(frozen=True)
class LowFrequencyTraining:
    """How ``v`` is computed: Adam on the coefficients of the lowest cosine frequencies.

    ``min_v mean CE(f(clip(x + v)), target)``, ``v = B_H^T A B_W`` with the first ``round(band * side)`` rows ``B`` of
    the orthonormal DCT-II, at least 2, so that ``v`` has no high frequency at all; after each step it is scaled back
    to ``max |v| <= epsilon``. (The paper filters a targeted DeepFool perturbation instead, to the same end.)

    Attributes:
        epsilon: bound of the perturbation, grey levels.
        band: share of the frequencies along each axis, in (0, 1].
        passes: passes over the images.
        images: how many images of other classes are used.
        lr: learning rate, as a share of ``epsilon * sqrt(H W)``, the size of a coefficient.
    """

    epsilon: float = 26.0
    band: float = 0.2
    passes: int = 10
    images: int = 1000
    lr: float = 0.02

    def __post_init__(self) -> None:
        require(0 < self.epsilon <= 255, "epsilon", "in (0, 255] grey levels", self.epsilon)
        require(0 < self.band <= 1, "band", "in (0, 1]", self.band)
        require(self.passes >= 1, "passes", "1 or more", self.passes)
        require(self.images >= 1, "images", "1 or more", self.images)
        require(self.lr > 0, "lr", "a positive rate", self.lr)


def learn_low_frequency(
    config: LowFrequencyTraining,
    surrogate: nn.Module,
    data: CleanSet,
    wanted: Wanted,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, Tensor]:
    """The perturbation against a clean ``surrogate``; arguments as :data:`defense_core.attacks.joint.Learn`."""
    others = data.subset((wanted(data.labels) != data.labels).nonzero().flatten())
    if not len(others) or bool((wanted(others.labels) != wanted(others.labels)[0]).any()):
        raise ConfigError("a universal perturbation needs one target class", expected="all-to-one", got="another rule")
    generator = seeded_generator(seed)
    others = others.subset(torch.randperm(len(others), generator=generator)[: config.images]).to(device)
    height, width = others.images.shape[2:]
    left, right = (cosines(side, config.band).to(device) for side in (height, width))
    coefficients = torch.zeros(others.images.shape[1], len(left), len(right), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([coefficients], lr=config.lr * config.epsilon * math.sqrt(height * width))
    batches = [batch for _ in range(config.passes) for batch in batch_indices(len(others), 128, generator)]
    context = autocast(surrogate, "auto", device)
    with evaluating(surrogate), progress.phase("universal perturbation", total=len(batches)) as phase:
        for batch in batches:
            perturbation = left.T @ coefficients @ right
            pixels = (others.images[batch].float() + perturbation).clamp(0, 255) / 255
            with context():
                outputs = surrogate(channels_last(task.inputs(pixels)))
            loss = task.losses(outputs, wanted(others.labels[batch])).mean()
            (coefficients.grad,) = torch.autograd.grad(loss, [coefficients])
            optimizer.step()
            with torch.no_grad():
                largest = (left.T @ coefficients @ right).abs().max()
                coefficients.mul_((config.epsilon / largest.clamp_min(1e-12)).clamp(max=1.0))
            phase.advance(loss=float(loss.detach()))
    return {"perturbation": (left.T @ coefficients @ right).detach().cpu()}


def cosines(side: int, band: float) -> Tensor:
    """The lowest rows of the orthonormal DCT-II, float32 (F, side): ``sqrt(2/n) cos(pi (2 j + 1) k / 2 n)``."""
    count = min(side, max(2, round(band * side)))
    frequency = torch.arange(count, dtype=torch.float64).unsqueeze(1)
    place = torch.arange(side, dtype=torch.float64)
    rows = math.sqrt(2 / side) * torch.cos(math.pi * (2 * place + 1) * frequency / (2 * side))
    rows[0] /= math.sqrt(2)
    return rows.float()
