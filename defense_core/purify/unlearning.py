"""Short clean unlearning: which units a backdoor lives in, told by clean images alone.

Ascending the clean loss moves the weights of backdoored units most (Lin et al., NeurIPS 2024,
arXiv 2405.20291). One or two passes rank them; nothing else of the ascent is kept. BatchNorm
normalises by the batch meanwhile: under the running statistics, which the poisoned samples
shaped, the ranking fails (``docs/methods-nft-ngf.md``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.errors import MethodDiverged
from defense_core.inference import Precision
from defense_core.layers import UnitLayer, is_finite, unit_layers
from defense_core.loop import Tuning, epochs_for, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.choice import choosers, strongest_within
from defense_core.purify.zeroing import set_weights, weight_changes, zero, zero_masks
from defense_core.task import Task

SHARE = 0.7
"""Share of the chosen units' weights that closes: the weights that moved most, as in TSBD."""

CLIPPED = 5.0
"""Gradient norm of an ascent that diverged without a bound; networks with BatchNorm stay below it by themselves."""
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
    epochs = epochs_for(len(data), epochs, min_steps, batch_size)

    def ascended(name: str, *, max_grad_norm: float) -> nn.Module:
        moved = working_copy(model, device)
        tune(
            moved,
            data,
            task=task,
            tuning=Tuning(epochs, batch_size, lr, precision=precision, max_grad_norm=max_grad_norm),
            seed=seed,
            device=device,
            progress=progress,
            name=name,
            sign=-1.0,
        )
        if not is_finite(moved):
            raise MethodDiverged(
                f"{name} diverged", expected="finite weights", got="NaN or Inf", hint="Lower unlearn_lr"
            )
        return moved

    def changes(moved: nn.Module) -> list[Tensor]:
        return weight_changes(unit_layers(model), dict(moved.named_parameters()))

    try:
        return changes(ascended("unlearn", max_grad_norm=0.0))
    except MethodDiverged:
        # Nothing bounds the ascent of a network without normalisation.
        found = changes(ascended("unlearn, clipped", max_grad_norm=CLIPPED))
        if not any(bool(change.any()) for change in found):  # a gradient of infinite norm is clipped to nothing
            raise
        return found


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


class ClosingConfig(Protocol):
    """What a method's configuration says about closing units; NFT's and NGF's explain the fields."""

    @property
    def ratio(self) -> float | None: ...
    @property
    def ratio_grid(self) -> tuple[float, ...]: ...
    @property
    def start_keep(self) -> float: ...
    @property
    def unlearn_lr(self) -> float: ...
    @property
    def unlearn_epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def precision(self) -> Precision: ...


def require_closing(config: ClosingConfig) -> None:
    """Raises ConfigError where a setting is out of range."""
    require(config.ratio is None or 0 <= config.ratio < 1, "ratio", "in [0, 1), or null", config.ratio)
    ratios_fit = bool(config.ratio_grid) and all(0 <= ratio < 1 for ratio in config.ratio_grid)
    require(ratios_fit, "ratio_grid", "shares in [0, 1)", config.ratio_grid)
    require(0 < config.start_keep <= 1, "start_keep", "in (0, 1]", config.start_keep)
    require(config.unlearn_lr > 0, "unlearn_lr", "a positive rate", config.unlearn_lr)
    require(config.unlearn_epochs >= 1, "unlearn_epochs", "1 or more", config.unlearn_epochs)


def close_most_moved(
    model: nn.Module,
    clean: Splits,
    config: ClosingConfig,
    *,
    granularity: Literal["weight", "kernel"],
    select_accuracy: Callable[[nn.Module], float],
    reference: float,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> tuple[float, list[Tensor], list[dict[str, float | None]], list[Tensor]]:
    """Rank ``model``'s units by a short clean unlearning and close, in place, as many as accuracy permits.

    Args:
        reference: ``select_accuracy(model)``.

    Returns:
        As :func:`choose_ratio`, and the ranking: :func:`unlearning_changes`.

    Raises:
        MethodDiverged: the loss became NaN or Inf.
        Cancelled: a stop was requested.
    """
    changes = unlearning_changes(
        model,
        clean.fit,
        epochs=config.unlearn_epochs,
        lr=config.unlearn_lr,
        batch_size=config.batch_size,
        precision=config.precision,
        task=task,
        seed=seed,
        device=device,
        progress=progress,
    )
    chosen = choose_ratio(
        model,
        changes,
        config.ratio_grid if config.ratio is None else (config.ratio,),
        select_accuracy,
        granularity=granularity,
        reference=reference,
        max_drop=(1 - config.start_keep) * reference,
        images=choosers(clean),
        progress=progress,
    )
    return *chosen, changes


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
