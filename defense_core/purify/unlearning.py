"""Short clean unlearning: which units a backdoor lives in, told by clean images alone.

Ascending the clean loss moves the weights of backdoored units most (Lin et al., NeurIPS 2024,
arXiv 2405.20291). One or two passes rank them; nothing else of the ascent is kept. BatchNorm
normalises by the batch meanwhile: under the running statistics, which the poisoned samples
shaped, the ranking fails (``docs/methods-nft-ngf.md``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from defense_core.data import CleanSet
from defense_core.layers import UnitLayer, unit_layers
from defense_core.loop import Precision, Tuning, batch_indices, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import strongest_within
from defense_core.purify.tsbd import set_weights, weight_changes, zero, zero_masks
from defense_core.task import Task

SHARE = 0.7
"""Share of the chosen units' weights that closes: the weights that moved most, as in TSBD."""

MIN_STEPS = 14
"""Steps that the ascent takes on however small a set: two passes over 800 images in batches of 128."""


def unlearning_changes(
    model: nn.Module,
    data: CleanSet,
    *,
    epochs: int,
    lr: float,
    batch_size: int,
    precision: Precision,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    min_steps: int = MIN_STEPS,
) -> list[Tensor]:
    """How far each weight of :func:`~defense_core.layers.unit_layers` moves; the model stays.

    Args:
        epochs: passes over ``data``, more where they are fewer than ``min_steps`` steps.

    Raises:
        MethodDiverged: the loss became NaN or Inf.
        Cancelled: a stop was requested.
    """
    moved = working_copy(model, device)
    each = len(batch_indices(len(data), batch_size, torch.Generator()))
    epochs = max(epochs, math.ceil(min_steps / each))
    tune(
        moved,
        data,
        task=task,
        tuning=Tuning(epochs, batch_size, lr, precision=precision),
        seed=seed,
        device=device,
        progress=progress,
        name="unlearn",
        sign=-1.0,
    )
    return weight_changes(unit_layers(model), dict(moved.named_parameters()))


def closed_weights(
    layers: list[UnitLayer], changes: list[Tensor], *, ratio: float, granularity: Literal["weight", "kernel"]
) -> list[Tensor]:
    """What closes when the ``ratio`` of units that moved most is chosen, bool.

    Args:
        changes: of :func:`unlearning_changes`, shaped like the layers' weights.
        granularity: ``"weight"``: each weight by itself; ``"kernel"``: a unit's kernels, one an
            input channel, as wholes. For linear layers both are the same.

    Returns:
        One tensor a layer: shaped like its weight, or (units, input channels).
    """
    if granularity == "kernel":
        changes = [change.flatten(2).sum(2) if change.dim() > 2 else change for change in changes]
        layers = [replace(layer, weight=change) for layer, change in zip(layers, changes, strict=True)]
    return zero_masks(layers, changes, n=ratio, m=SHARE)


def choose_ratio(
    model: nn.Module,
    changes: list[Tensor],
    ratios: tuple[float, ...],
    select_accuracy: Callable[[nn.Module], float],
    *,
    granularity: Literal["weight", "kernel"],
    reference: float,
    max_drop: float,
    images: int,
    progress: Progress,
) -> tuple[float, list[Tensor], list[dict[str, float | None]]]:
    """Close ever more units of ``model`` while its accuracy on the *select* split permits.

    A trial is one pass over that split. ``model`` is left with the chosen weights at zero.

    Returns:
        The ratio, what is closed (see :func:`closed_weights`) and the trials.
    """
    layers = unit_layers(model)
    original = [layer.weight.detach().clone() for layer in layers]

    def close(closed: list[Tensor]) -> None:
        set_weights(layers, original)
        wide = [
            c.view(*c.shape, *[1] * (layer.weight.dim() - c.dim())).expand_as(layer.weight)
            for c, layer in zip(closed, layers, strict=True)
        ]
        zero(layers, wide)

    def attempt(ratio: float) -> tuple[float, list[Tensor]]:
        closed = closed_weights(layers, changes, ratio=ratio, granularity=granularity)
        close(closed)
        reached = select_accuracy(model)
        phase.advance()
        return reached, closed

    with progress.phase("choose ratio", total=len(ratios)) as phase:
        ratio, closed, trials = strongest_within(ratios, attempt, reference=reference, max_drop=max_drop, images=images)
    close(closed)
    return ratio, closed, trials
