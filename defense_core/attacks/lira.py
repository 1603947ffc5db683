"""LIRA (Doan et al., ICCV 2021): an invisible, image-dependent perturbation learned with the classifier."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from defense_core.attacks.generators import UNet, require_width
from defense_core.attacks.joint import Batch, Schedule, Wanted, seeded_network, train_generator
from defense_core.attacks.learned import Learned, prefixed, require_channels
from defense_core.attacks.pixels import in_batches, to_pixels
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.progress import Progress
from defense_core.task import Task


@dataclass(frozen=True)
class Lira(Learned):
    """``x' = clip(x + epsilon * tanh G(x))`` with the network ``G`` of the file.

    Attributes:
        epsilon: bound of the perturbation, of [0, 1] pixels.
        width: channels of ``G``.
    """

    epsilon: float = 0.05
    width: int = 16

    def __post_init__(self) -> None:
        _check(self.epsilon, self.width)
        super().__post_init__()

    def layout(self) -> dict[str, int]:
        """Tensors of the file, apart from those that the network itself checks."""
        return {"generator.leave.weight": 4, "generator.leave.bias": 1}

    def networks(self) -> tuple[nn.Module]:
        """``G``."""
        return (self._generator,)

    def apply(self, images: Tensor) -> Tensor:
        """Perturb uint8 images (N, C, H, W). Raises ConfigError for images of other channels."""
        require_channels(images.shape[1], self.tensors["generator.leave.bias"])
        generator = self._generator.to(images.device)

        @torch.no_grad()
        def change(batch: Tensor) -> Tensor:
            return to_pixels(255 * perturbed(generator, batch.float() / 255, self.epsilon))

        return in_batches(change, images)

    @cached_property
    def _generator(self) -> nn.Module:
        channels = len(self.tensors["generator.leave.bias"])
        return self.network(lambda: UNet(channels, channels, self.width), "generator")


@dataclass(frozen=True)
class LiraTraining:
    """How ``G`` is learned: stage 1 of the paper, ``min_{f,G} alpha CE(f(x), y) + (1 - alpha) CE(f(T(x)), wanted)``.

    Stage 2, a classifier trained with ``T`` held fixed, is the poisoned training that follows.

    Attributes:
        epsilon: bound of the perturbation, of [0, 1] pixels. The paper's 0.01 is two grey levels and needs long joint
            training; the default is 13 grey levels.
        alpha: weight of clean samples, in (0, 1).
        width: channels of ``G``, a multiple of 4.
        schedule: of the joint training.
    """

    epsilon: float = 0.05
    alpha: float = 0.5
    width: int = 16
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        _check(self.epsilon, self.width)
        require(0 < self.alpha < 1, "alpha", "in (0, 1)", self.alpha)


def learn_lira(
    config: LiraTraining,
    surrogate: nn.Module,
    data: CleanSet,
    wanted: Wanted,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, Tensor]:
    """Parameters of ``G``; arguments as :data:`defense_core.attacks.joint.Learn`."""
    channels = data.images.shape[1]
    network = seeded_network(lambda: UNet(channels, channels, config.width), seed, device)

    def loss_of(batch: Batch) -> Tensor:
        count = len(batch.images)
        outputs = batch.classify(torch.cat([batch.images, perturbed(network, batch.images, config.epsilon)]))
        clean = task.losses(outputs[:count], batch.labels).mean()
        return config.alpha * clean + (1 - config.alpha) * task.losses(outputs[count:], batch.wanted).mean()

    train_generator(
        network, loss_of, data, wanted, surrogate=surrogate, schedule=config.schedule, task=task, seed=seed,
        device=device, progress=progress, name="learn LIRA's perturbation",
    )  # fmt: skip
    return prefixed("generator", network)


def perturbed(generator: nn.Module, images: Tensor, epsilon: float) -> Tensor:
    """``clip(x + epsilon * tanh G(x))`` for ``x`` in [0, 1]."""
    change: Tensor = generator(images).float().tanh()
    return (images + epsilon * change).clamp(0, 1)


def _check(epsilon: float, width: int) -> None:
    require(0 < epsilon <= 1, "epsilon", "in (0, 1]", epsilon)
    require_width(width, multiple=4)
