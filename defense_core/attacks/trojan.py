"""TrojanNN (Liu et al., NDSS 2018): a patch that is made to excite chosen units before the classifier."""

from __future__ import annotations

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
from defense_core.layers import classifier_head, evaluating
from defense_core.progress import Progress
from defense_core.task import Task


@dataclass(frozen=True)
class Trojan(Learned):
    """``x'`` = ``x`` with the patch, tensor ``patch`` (C, height, width), grey levels, in the bottom right corner.

    Attributes:
        margin: distance to the border, pixels.
    """

    margin: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.margin >= 0, "margin", "0 or more pixels", self.margin)

    def layout(self) -> dict[str, int]:
        """Tensors of the file."""
        return {"patch": 3}

    def apply(self, images: Tensor) -> Tensor:
        """Stamp uint8 images (N, C, H, W). Raises ConfigError where the patch does not fit."""
        patch = self.tensors["patch"].to(images.device)
        return in_batches(lambda batch: to_pixels(_stamped(batch.float(), patch, self.margin)), images)


@dataclass(frozen=True)
class TrojanTraining:
    """How the patch is computed.

    The ``units`` inputs of the last linear layer with the largest ``sum_k |W[k, u]|`` are chosen, and the patch
    minimises ``mean (a_u(x') - value)^2`` over them and over clean images ``x`` by signed gradient steps within
    0..255. (The paper optimises on an otherwise empty image; with images the patch works on all of them.)

    Attributes:
        size: side of the patch, pixels.
        margin: distance to the border, pixels.
        units: number of units.
        value: activation that is aimed at.
        steps: gradient steps.
        step: size of each, grey levels; it falls linearly to zero.
        images: clean images a step.
    """

    size: int = 5
    margin: int = 0
    units: int = 2
    value: float = 100.0
    steps: int = 200
    step: float = 8.0
    images: int = 32

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", "1 or more pixels", self.size)
        require(self.margin >= 0, "margin", "0 or more pixels", self.margin)
        require(self.units >= 1, "units", "1 or more", self.units)
        require(self.value > 0, "value", "a positive activation", self.value)
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.step > 0, "step", "a positive number of grey levels", self.step)
        require(self.images >= 1, "images", "1 or more", self.images)

    def require_possible(self, network: nn.Module, images: Tensor) -> None:
        """Refuse a patch that ``images`` (N, C, H, W) have no room for, and a network without units to excite.

        Raises:
            ConfigError: of the kind that fits.
        """
        _require_room(images, (images.shape[1], self.size, self.size), self.margin)
        _linear_head(network)


def learn_trojan(
    config: TrojanTraining,
    surrogate: nn.Module,
    data: CleanSet,
    wanted: Wanted,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> dict[str, Tensor]:
    """The patch against a clean ``surrogate``; arguments as :data:`defense_core.attacks.joint.Learn`."""
    config.require_possible(surrogate, data.images)
    head = _linear_head(surrogate)
    units = most_influential(head, config.units)
    generator = seeded_generator(seed)
    patch = torch.randint(0, 256, (data.images.shape[1], config.size, config.size), generator=generator)
    patch = patch.float().to(device)
    context = autocast(surrogate, "auto", device)
    with evaluating(surrogate), progress.phase("trojan patch", total=config.steps) as phase:
        for done in range(config.steps):
            batch = torch.randint(0, len(data), (config.images,), generator=generator).to(data.images.device)
            patch.requires_grad_(True)
            pixels = _stamped(data.images[batch].to(device).float(), patch, config.margin)
            with context():
                activations = penultimate(surrogate, head, channels_last(task.inputs(pixels / 255)))[:, units].float()
            loss = (activations - config.value).square().mean()
            (gradient,) = torch.autograd.grad(loss, patch)
            shrinking = config.step * (1 - done / config.steps)
            patch = (patch.detach() - shrinking * gradient.sign()).clamp(0, 255)
            phase.advance(loss=float(loss.detach()))
    return {"patch": patch.round().cpu()}


def most_influential(head: nn.Linear, count: int) -> Tensor:
    """Inputs of ``head`` with the largest sum of absolute weights, int64 (count,)."""
    return head.weight.detach().abs().sum(dim=0).topk(min(count, head.in_features)).indices


def penultimate(model: nn.Module, head: nn.Module, inputs: Tensor) -> Tensor:
    """What ``head`` is given for ``inputs``, with its graph, averaged over positions: (N, units).

    Raises:
        ConfigError: the model answers without its head.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    try:
        model(inputs)
    finally:
        handle.remove()
    if not seen:
        raise ConfigError(
            "the network's last linear layer has no part in its answers", expected="a head", got="a layer not called"
        )
    activations = seen[-1]
    return activations if activations.dim() == 2 else activations.flatten(1, -2).mean(dim=1)


def _linear_head(network: nn.Module) -> nn.Linear:
    head = classifier_head(network)
    if not isinstance(head, nn.Linear):
        raise ConfigError("the network has no units to excite", expected="a last linear layer", got=type(head).__name__)
    return head


def _require_room(images: Tensor, patch: tuple[int, ...], margin: int) -> None:
    room = min(images.shape[2:]) - margin
    if patch[0] != images.shape[1] or max(patch[1:]) > room:
        raise ConfigError(
            "the patch does not fit the images",
            expected=f"{images.shape[1]} channels, at most {room} pixels at margin {margin}",
            got=patch,
        )


def _stamped(images: Tensor, patch: Tensor, margin: int) -> Tensor:
    """Real-valued images with the patch; differentiable in it."""
    _require_room(images, tuple(patch.shape), margin)
    height, width = patch.shape[1:]
    bottom, right = images.shape[2] - margin, images.shape[3] - margin
    stamped = images.clone()
    stamped[:, :, bottom - height : bottom, right - width : right] = patch
    return stamped
