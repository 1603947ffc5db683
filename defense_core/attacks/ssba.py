"""SSBA / ISSBA (Li et al., ICCV 2021): a fixed message hidden in every image by a steganographic encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.attacks.generators import UNet, require_width
from defense_core.attacks.joint import Batch, Schedule, Wanted, seeded_network, train_generator
from defense_core.attacks.learned import Learned, prefixed, require_channels
from defense_core.attacks.pixels import in_batches, seeded_generator, to_pixels
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.errors import ConfigError
from defense_core.progress import Progress
from defense_core.task import Task

_PLANES, _GRID = 4, 8


@dataclass(frozen=True)
class Ssba(Learned):
    """``x' = clip(x + strength * tanh E(x, m))``: the residual that hides the message ``m`` in this image.

    The file holds the encoder ``E`` and the message as the encoder sees it, tensor ``message`` (4, H, W).

    Attributes:
        strength: bound of the residual, of [0, 1] pixels.
        width: channels of ``E``.
    """

    strength: float = 0.1
    width: int = 16

    def __post_init__(self) -> None:
        require(0 < self.strength <= 1, "strength", "in (0, 1]", self.strength)
        require_width(self.width, multiple=4)
        super().__post_init__()

    def layout(self) -> dict[str, int]:
        """Tensors of the file, apart from those that the network itself checks."""
        return {"message": 3, "encoder.leave.weight": 4, "encoder.leave.bias": 1}

    def networks(self) -> tuple[nn.Module]:
        """``E``, which takes a message of four planes."""
        if len(self.tensors["message"]) != _PLANES:
            raise self._corrupt(f"a message of {_PLANES} planes", f"{len(self.tensors['message'])}")
        return (self._encoder,)

    def apply(self, images: Tensor) -> Tensor:
        """Hide the message in uint8 images (N, C, H, W). Raises ConfigError for images of another size."""
        message = self.tensors["message"].to(images.device)
        if images.shape[2:] != message.shape[1:]:
            raise ConfigError(
                "the encoder does not fit the images", expected=tuple(message.shape[1:]), got=tuple(images.shape[2:])
            )
        require_channels(images.shape[1], self.tensors["encoder.leave.bias"])
        encoder = self._encoder.to(images.device)

        @torch.no_grad()
        def change(batch: Tensor) -> Tensor:
            planes = message.expand(len(batch), -1, -1, -1)
            return to_pixels(255 * hidden(encoder, batch.float() / 255, planes, self.strength))

        return in_batches(change, images)

    @cached_property
    def _encoder(self) -> nn.Module:
        channels = len(self.tensors["encoder.leave.bias"])
        return self.network(lambda: UNet(channels + _PLANES, channels, self.width), "encoder")


@dataclass(frozen=True)
class SsbaTraining:
    """How the encoder is learned, with a decoder that reads ``bits`` random bits back.

    ``BCE(D(x'), m) + w * mean (x' - x)^2`` over random messages; ``w`` is 0 for the first ``secret_only`` of the steps
    and then rises linearly to ``fidelity``.

    Attributes:
        bits: length of the message.
        strength: bound of the residual, of [0, 1] pixels.
        fidelity: final weight of the squared change.
        secret_only: share of the training without it, in [0, 1).
        width: channels of encoder and decoder, a multiple of 4.
        schedule: of the training; there is no classifier in it.
    """

    bits: int = 20
    strength: float = 0.1
    fidelity: float = 10.0
    secret_only: float = 0.3
    width: int = 16
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        require(1 <= self.bits <= 256, "bits", "1 to 256", self.bits)
        require(0 < self.strength <= 1, "strength", "in (0, 1]", self.strength)
        require(self.fidelity >= 0, "fidelity", "0 or more", self.fidelity)
        require(0 <= self.secret_only < 1, "secret_only", "in [0, 1)", self.secret_only)
        require_width(self.width, multiple=4)


class Steganography(nn.Module):
    """Encoder, decoder and the layer that spreads a message over the image plane."""

    def __init__(self, channels: int, bits: int, width: int) -> None:
        super().__init__()
        self.spread = nn.Linear(bits, _PLANES * _GRID * _GRID)
        self.encoder = UNet(channels + _PLANES, channels, width)
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1), nn.GroupNorm(4, 2 * width), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * width, bits),
        )  # fmt: skip

    def planes(self, messages: Tensor, height: int, width: int) -> Tensor:
        """Messages of 0 and 1, (N, bits), as (N, 4, H, W)."""
        grid = self.spread(messages * 2 - 1).view(-1, _PLANES, _GRID, _GRID)
        return F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)


def learn_ssba(
    config: SsbaTraining,
    surrogate: nn.Module,
    data: CleanSet,
    wanted: Wanted,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, Tensor]:
    """Encoder and message; arguments as :data:`defense_core.attacks.joint.Learn`, the surrogate unused."""
    channels, height, width = data.images.shape[1:]
    network = seeded_network(lambda: Steganography(channels, config.bits, config.width), seed, device)
    steps = config.schedule.steps(len(data))
    done = 0

    def loss_of(batch: Batch) -> Tensor:
        nonlocal done
        done += 1
        ramp = max(0.0, (done / steps - config.secret_only) / (1 - config.secret_only))
        messages = torch.randint(0, 2, (len(batch.images), config.bits), generator=batch.generator).float().to(device)
        changed = hidden(network.encoder, batch.images, network.planes(messages, height, width), config.strength)
        read = F.binary_cross_entropy_with_logits(network.decoder(changed), messages)
        return read + min(ramp, 1.0) * config.fidelity * (changed - batch.images).square().mean()

    train_generator(
        network, loss_of, data, wanted, surrogate=None, schedule=config.schedule, task=task, seed=seed,
        device=device, progress=progress, name="learn the encoder",
    )  # fmt: skip
    secret = torch.randint(0, 2, (1, config.bits), generator=seeded_generator(seed)).float().to(device)
    with torch.no_grad():
        message = network.planes(secret, height, width)[0]
    return {"message": message, **prefixed("encoder", network.encoder)}


def hidden(encoder: nn.Module, images: Tensor, planes: Tensor, strength: float) -> Tensor:
    """``clip(x + strength * tanh E(x, m))`` for ``x`` in [0, 1]."""
    residual: Tensor = encoder(torch.cat([images, planes], dim=1)).float().tanh()
    return (images + strength * residual).clamp(0, 1)
