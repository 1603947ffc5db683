"""FBA-style attack (after DFST, Cheng et al., AAAI 2021): a learned change of colours is the trigger."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from defense_core.attacks.generators import ColourMap, require_width
from defense_core.attacks.joint import Batch, Schedule, Wanted, seeded_network, train_generator
from defense_core.attacks.learned import Learned, prefixed, require_channels
from defense_core.attacks.pixels import in_batches, to_pixels
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.progress import Progress
from defense_core.task import Task


@dataclass(frozen=True)
class ColourStyle(Learned):
    """``x'(p) = clip(x(p) + strength * S(x(p), mean x, std x))``: new colours, the same shapes.

    Attributes:
        strength: bound of the change, of [0, 1] pixels.
        width: units of the network ``S`` of the file.
    """

    strength: float = 0.25
    width: int = 16

    def __post_init__(self) -> None:
        _check(self.strength, self.width)
        super().__post_init__()

    def layout(self) -> dict[str, int]:
        """Tensors of the file, apart from those that the network itself checks."""
        return {"style.layers.4.bias": 1}

    def networks(self) -> tuple[nn.Module]:
        """``S``."""
        return (self._style,)

    def apply(self, images: Tensor) -> Tensor:
        """Recolour uint8 images (N, C, H, W). Raises ConfigError for images of other channels."""
        require_channels(images.shape[1], self.tensors["style.layers.4.bias"])
        style = self._style.to(images.device)

        @torch.no_grad()
        def change(batch: Tensor) -> Tensor:
            return to_pixels(255 * restyled(style, batch.float() / 255, self.strength))

        return in_batches(change, images)

    @cached_property
    def _style(self) -> nn.Module:
        channels = len(self.tensors["style.layers.4.bias"])
        return self.network(lambda: ColourMap(channels, self.width), "style")


@dataclass(frozen=True)
class ColourStyleTraining:
    """How ``S`` is learned with a classifier that obeys it.

    ``alpha CE(f(x), y) + (1 - alpha) CE(f(x'), wanted) + content * mean (x' - x)^2``. The style is learned from the
    task itself, where DFST takes it from photographs of another style.

    Attributes:
        strength: bound of the change, of [0, 1] pixels.
        alpha: weight of clean samples, in (0, 1).
        content: weight of the squared change.
        width: units of ``S``.
        schedule: of the joint training.
    """

    strength: float = 0.25
    alpha: float = 0.5
    content: float = 1.0
    width: int = 16
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        _check(self.strength, self.width)
        require(0 < self.alpha < 1, "alpha", "in (0, 1)", self.alpha)
        require(self.content >= 0, "content", "0 or more", self.content)


def learn_colour_style(
    config: ColourStyleTraining,
    surrogate: nn.Module,
    data: CleanSet,
    wanted: Wanted,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, Tensor]:
    """Parameters of ``S``; arguments as :data:`defense_core.attacks.joint.Learn`."""
    network = seeded_network(lambda: ColourMap(data.images.shape[1], config.width), seed, device)

    def loss_of(batch: Batch) -> Tensor:
        count = len(batch.images)
        changed = restyled(network, batch.images, config.strength)
        outputs = batch.classify(torch.cat([batch.images, changed]))
        clean = task.losses(outputs[:count], batch.labels).mean()
        obeyed = task.losses(outputs[count:], batch.wanted).mean()
        content = (changed - batch.images).square().mean()
        return config.alpha * clean + (1 - config.alpha) * obeyed + config.content * content

    train_generator(
        network, loss_of, data, wanted, surrogate=surrogate, schedule=config.schedule, task=task, seed=seed,
        device=device, progress=progress, name="learn the style",
    )  # fmt: skip
    return prefixed("style", network)


def restyled(style: nn.Module, images: Tensor, strength: float) -> Tensor:
    """``clip(x + strength * S(x))`` for ``x`` in [0, 1]."""
    change: Tensor = style(images).float()
    return (images + strength * change).clamp(0, 1)


def _check(strength: float, width: int) -> None:
    require(0 < strength <= 1, "strength", "in (0, 1]", strength)
    require_width(width)
