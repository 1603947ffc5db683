"""CLB, the label-consistent attack (Turner et al. 2019): adversarial images of the target class with marked corners."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.attacks.badnets import BadNets
from defense_core.attacks.pixels import seeded_generator
from defense_core.config import require
from defense_core.inference import autocast, channels_last
from defense_core.layers import evaluating
from defense_core.progress import Progress
from defense_core.task import Task

_CORNERS = ("bottom_right", "bottom_left", "top_right", "top_left")


@dataclass(frozen=True)
class LabelConsistent:
    """A black and white checkerboard in each corner, :class:`~defense_core.attacks.badnets.BadNets` four times.

    In training it stands on images of the target class only, which keep their label and were first made hard to
    recognise by :func:`adversarial` (PGD against a clean model), so that the corners are the easier thing to learn.

    Attributes:
        size: side of a patch, pixels.
        margin: distance to the border, pixels.
        opacity: 1 replaces the pixels.
        epsilon: bound of the perturbation in the maximum norm, grey levels; 0 leaves it out.
        step: step of PGD, grey levels.
        steps: number of steps.
    """

    size: int = 3
    margin: int = 0
    opacity: float = 1.0
    epsilon: float = 8.0
    step: float = 1.5
    steps: int = 100

    def __post_init__(self) -> None:
        self._patches()
        require(0 <= self.epsilon <= 255, "epsilon", "0 to 255 grey levels", self.epsilon)
        require(self.step > 0, "step", "a positive number of grey levels", self.step)
        require(self.steps >= 0, "steps", "0 or more", self.steps)

    def apply(self, images: Tensor) -> Tensor:
        """Mark uint8 images (N, C, H, W). Raises ConfigError where a patch does not fit."""
        for patch in self._patches():
            images = patch.apply(images)
        return images

    def _patches(self) -> list[BadNets]:
        return [
            BadNets(size=self.size, corner=corner, margin=self.margin, pattern="checker", opacity=self.opacity)  # type: ignore[arg-type]
            for corner in _CORNERS
        ]


def adversarial(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    config: LabelConsistent,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    batch_size: int = 256,
) -> Tensor:
    """Images that the clean ``model`` takes for something else (PGD, Madry et al. 2018, from a random start).

    ``d <- clip(d + step * sign(grad_d CE(f(x + d), y)), -epsilon, epsilon)`` with ``x + d`` kept in 0..255.

    Args:
        model: runs in eval mode on ``device``; its modes are restored.
        images: uint8 (N, C, H, W).
        labels: true labels, int64 (N,).

    Returns:
        uint8 (N, C, H, W) within ``epsilon`` of ``images``, on their device.

    Raises:
        Cancelled: a stop was requested.
    """
    generator, context = seeded_generator(seed), autocast(model, "auto", device)
    made = []
    total = config.steps * -(-len(images) // batch_size)
    with evaluating(model), progress.phase("adversarial images", total=total) as phase:
        for pixels, targets in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            clean = pixels.to(device).float()
            start = (torch.rand(clean.shape, generator=generator) * 2 - 1).to(device) * config.epsilon
            changed = (clean + start).clamp(0, 255)
            for _ in range(config.steps):
                changed.requires_grad_(True)
                with context():
                    outputs = model(channels_last(task.inputs(changed / 255)))
                loss = task.losses(outputs, targets.to(device)).sum()
                (gradient,) = torch.autograd.grad(loss, changed)
                moved = changed.detach() + config.step * gradient.sign()
                changed = torch.minimum(torch.maximum(moved, clean - config.epsilon), clean + config.epsilon)
                changed = changed.clamp(0, 255)
                phase.advance()
            # Towards the clean image, so that rounding never leaves the bound.
            offset = (changed - clean).trunc()
            made.append((clean + offset).to(torch.uint8).to(images.device))
    return torch.cat(made) if made else images.clone()
