"""Input-aware dynamic backdoor (Nguyen and Tran, NeurIPS 2020): every image has a trigger of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from defense_core.attacks.generators import UNet, require_width
from defense_core.attacks.joint import Batch, Schedule, Wanted, seeded_network, train_generator
from defense_core.attacks.learned import Learned, prefixed, require_channels
from defense_core.attacks.pixels import in_batches, seeded_generator, to_pixels
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.progress import Progress
from defense_core.task import Task


@dataclass(frozen=True)
class InputAware(Learned):
    """``x' = x + (G(x) - x) * M(x)``: a pattern where a mask is on, both from the image itself.

    Cover samples carry the trigger of another image, ``x + (G(z) - x) * M(z)``, and keep their label.

    Attributes:
        width: channels of the networks ``G`` and ``M`` of the file.
    """

    width: int = 16

    def __post_init__(self) -> None:
        require_width(self.width, multiple=4)
        super().__post_init__()

    def layout(self) -> dict[str, int]:
        """Tensors of the file, apart from those that the networks themselves check."""
        return {"pattern.leave.weight": 4, "pattern.leave.bias": 1, "mask.leave.weight": 4}

    def networks(self) -> tuple[nn.Module, nn.Module]:
        """``G`` and ``M``."""
        return self._networks

    def apply(self, images: Tensor) -> Tensor:
        """Put each image's own trigger on it; uint8 (N, C, H, W)."""
        return self._with_trigger_of(images, images)

    def cover(self, images: Tensor, seed: int) -> Tensor:
        """Images with another one's trigger; a single image has that of its mirror image."""
        turn = int(torch.randint(1, max(len(images), 2), (), generator=seeded_generator(seed)))
        return self._with_trigger_of(images, images.roll(turn, 0) if len(images) > 1 else images.flip(3))

    def _with_trigger_of(self, images: Tensor, owners: Tensor) -> Tensor:
        pattern, mask = (network.to(images.device) for network in self._networks)
        require_channels(images.shape[1], self.tensors["pattern.leave.bias"])

        @torch.no_grad()
        def change(batch: Tensor, other: Tensor) -> Tensor:
            others = other.float() / 255
            return to_pixels(255 * stamped(batch.float() / 255, patterns(pattern, others), masks(mask, others)))

        return in_batches(change, images, owners)

    @cached_property
    def _networks(self) -> tuple[nn.Module, nn.Module]:
        channels = len(self.tensors["pattern.leave.bias"])
        pattern = self.network(lambda: UNet(channels, channels, self.width), "pattern")
        return pattern, self.network(lambda: UNet(channels, 1, self.width), "mask")


@dataclass(frozen=True)
class InputAwareTraining:
    """How ``G`` and ``M`` are learned, in the paper's two stages.

    First the mask alone: ``density_weight * mean relu(M(x) - density) + diversity(M)``. Then, the mask held fixed,
    pattern and classifier together: a share of each batch carries its own trigger and the wanted label, a share another
    image's trigger and the true label; ``CE + diversity_weight * diversity(G)``. Diversity is the mean of
    ``||x - z|| / ||G(x) - G(z)||`` in root mean squares: different images shall have different triggers. The victim is
    then trained on data with these triggers, where the paper keeps the classifier of the joint training.

    Attributes:
        density: what a mask may have everywhere without penalty, in (0, 1).
        density_weight: weight of the penalty; on images of few pixels a smaller one leaves larger masks.
        diversity_weight: weight of the diversity of patterns.
        attack_share, cross_share: shares of a batch in the second stage, below 1 together.
        width: channels of the networks, a multiple of 4.
        mask_epochs: epochs of the first stage.
        schedule: of the second stage; its rate is that of the first one too.
    """

    density: float = 0.032
    density_weight: float = 100.0
    diversity_weight: float = 1.0
    attack_share: float = 0.25
    cross_share: float = 0.25
    width: int = 16
    mask_epochs: int = 5
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        require(0 < self.density < 1, "density", "in (0, 1)", self.density)
        require(self.density_weight >= 0, "density_weight", "0 or more", self.density_weight)
        require(self.diversity_weight >= 0, "diversity_weight", "0 or more", self.diversity_weight)
        require(self.attack_share > 0, "attack_share", "a positive share", self.attack_share)
        require(
            self.cross_share >= 0 and self.attack_share + self.cross_share < 1,
            "cross_share", "0 or more, below 1 together with attack_share", self.cross_share,
        )  # fmt: skip
        require_width(self.width, multiple=4)
        require(self.mask_epochs >= 1, "mask_epochs", "1 or more", self.mask_epochs)


def learn_input_aware(
    config: InputAwareTraining,
    surrogate: nn.Module,
    data: CleanSet,
    wanted: Wanted,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, Tensor]:
    """Parameters of ``G`` and ``M``; arguments as :data:`defense_core.attacks.joint.Learn`."""
    channels = data.images.shape[1]
    mask = seeded_network(lambda: UNet(channels, 1, config.width), seed, device)
    pattern = seeded_network(lambda: UNet(channels, channels, config.width), seed + 1, device)
    first = replace(config.schedule, epochs=config.mask_epochs)

    def mask_loss(batch: Batch) -> Tensor:
        on = masks(mask, batch.images)
        return config.density_weight * (on - config.density).relu().mean() + diversity(batch.images, on)

    def pattern_loss(batch: Batch) -> Tensor:
        made = patterns(pattern, batch.images)
        with torch.no_grad():
            on = masks(mask, batch.images)
        count = len(batch.images)
        attacked = max(1, round(config.attack_share * count))
        crossed = attacked + round(config.cross_share * count)
        own = stamped(batch.images, made, on)
        other = stamped(batch.images, made.roll(1, 0), on.roll(1, 0))
        mixed = torch.cat([own[:attacked], other[attacked:crossed], batch.images[crossed:]])
        targets = torch.cat([batch.wanted[:attacked], batch.labels[attacked:]])
        loss = task.losses(batch.classify(mixed), targets).mean()
        return loss + config.diversity_weight * diversity(batch.images, made)

    shared = {"task": task, "seed": seed, "device": device, "progress": progress}
    train_generator(
        mask,
        mask_loss,
        data,
        wanted,
        surrogate=None,
        schedule=first,
        name="learn masks",
        **shared,  # type: ignore[arg-type]
    )
    train_generator(
        pattern, pattern_loss, data, wanted, surrogate=surrogate, schedule=config.schedule,
        name="learn patterns", **shared,  # type: ignore[arg-type]
    )  # fmt: skip
    return {**prefixed("pattern", pattern), **prefixed("mask", mask)}


def patterns(network: nn.Module, images: Tensor) -> Tensor:
    """``tanh(.) / 2 + 1/2``, in [0, 1], (N, C, H, W)."""
    pattern: Tensor = network(images).float().tanh() / 2 + 0.5
    return pattern


def masks(network: nn.Module, images: Tensor) -> Tensor:
    """``tanh(20 z - 10) / 2 + 1/2`` of ``z`` in [0, 1]: nearly 0 or 1, (N, 1, H, W)."""
    return (20 * patterns(network, images) - 10).tanh() / 2 + 0.5


def stamped(images: Tensor, pattern: Tensor, mask: Tensor) -> Tensor:
    """``x + (G - x) * M`` in [0, 1]."""
    return images + (pattern - images) * mask


def diversity(images: Tensor, made: Tensor, epsilon: float = 1e-7) -> Tensor:
    """``mean ||x - z|| / (||t(x) - t(z)|| + epsilon)`` in root mean squares, ``z`` the next image of the batch."""

    def distance(values: Tensor) -> Tensor:
        squares = (values - values.roll(1, 0)).square().flatten(1).mean(dim=1)
        return (squares + epsilon**2).sqrt()  # the root of zero has no gradient

    return (distance(images) / (distance(made) + epsilon)).mean()
