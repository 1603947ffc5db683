"""TSBD, Two-Stage Backdoor Defense (Lin et al., NeurIPS 2024, arXiv 2405.20291).

Stage 1 unlearns the clean set by gradient ascent on a copy, measures how far each weight
moved (neuron weight change, NWC), and zeroes the most-moved sub-weights of the most-moved
units of the original. Stage 2 repairs the rest by activeness-aware fine-tuning, which
penalises the gradient norm.

Two things are ours. The ascent stops halfway to chance: the ranking is as good there as at
chance, at a fraction of the cost, and chance depends on the number of classes. And the
neuron ratio ``n`` and the repair rate have a rule that reads the *select* split only; the
reference code has none. ``docs/methods.md`` gives the measurements behind both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.layers import Scope, UnitLayer, unit_layers
from defense_core.loop import (
    HistoryRow,
    Precision,
    Tuning,
    accuracy,
    batch_indices,
    finished,
    gradient_norm_step,
    predictions,
    tune,
    working_copy,
)
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified, cautious_accuracy, chooser, strongest_within
from defense_core.task import Task

Variant = Literal["v1", "v2", "v3"]


@dataclass(frozen=True)
class TSBDConfig:
    """Settings of TSBD. Symbols are the paper's.

    Attributes:
        n: neuron ratio, or ``None`` to choose it from ``n_grid``: the largest whose network
            keeps ``stage1_keep`` of the original accuracy on the *select* split after stage 1.
        n_grid: candidates.
        stage1_keep: share of the accuracy that zeroing must leave, in (0, 1].
        m: sub-weight ratio: share of the chosen units' weights that is zeroed.
        variant: ``v3``, the paper's scheme: the ``m`` largest changes pooled over all chosen
            units. Ablations: ``v1`` zeroes whole units; ``v2`` takes ``m`` within each unit.
        scope: which layers have units; see :func:`defense_core.layers.unit_layers`.
        unlearn_lr: rate of the ascent.
        unlearn_depth: the ascent ends when accuracy on the fit split has covered this share
            of the way down to chance, ``1 / K``.
        unlearn_epochs: cap on the ascent, passes.
        lr: repair rate, or ``None`` to choose it from ``lr_grid`` by
            :func:`~defense_core.purify.base.strongest_within` on the
            :func:`~defense_core.purify.base.cautious_accuracy`.
        lr_grid: candidates.
        max_drop: permitted drop of that accuracy on the *select* split, in [0, 1].
        epochs: passes of the repair.
        min_steps: the repair takes at least so many steps: more passes on small sets. Nothing
            is trained where ``epochs`` is 0.
        batch_size: samples per step.
        weight_decay: L2 penalty of the repair.
        r: length of the step along the gradient at which the second gradient is taken.
        alpha: weight of that gradient; ``lambda = alpha * r``. 0 is plain tuning, 1 is SAM.
        normalisation: of the step's direction: by the gradient's ``global`` norm, which is
            the equation, or ``per_tensor``, which is what the reference code does.
        precision: see :class:`defense_core.loop.Tuning`.
    """

    n: float | None = None
    n_grid: tuple[float, ...] = (0.02, 0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3)
    stage1_keep: float = 0.85
    m: float = 0.7
    variant: Variant = "v3"
    scope: Scope = "auto"
    unlearn_lr: float = 1e-3
    unlearn_depth: float = 0.5
    unlearn_epochs: int = 30
    lr: float | None = None
    lr_grid: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    max_drop: float = 0.01
    epochs: int = 10
    min_steps: int = 70
    batch_size: int = 128
    weight_decay: float = 5e-4
    r: float = 0.5
    alpha: float = 0.7
    normalisation: Literal["global", "per_tensor"] = "global"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.n is None or 0 <= self.n < 1, "n", "in [0, 1), or null", self.n)
        require(bool(self.n_grid) and all(0 <= n < 1 for n in self.n_grid), "n_grid", "ratios in [0, 1)", self.n_grid)
        require(0 < self.stage1_keep <= 1, "stage1_keep", "in (0, 1]", self.stage1_keep)
        require(0 < self.m <= 1, "m", "in (0, 1]", self.m)
        require(self.unlearn_lr > 0, "unlearn_lr", "a positive rate", self.unlearn_lr)
        require(0 < self.unlearn_depth <= 1, "unlearn_depth", "in (0, 1]", self.unlearn_depth)
        require(self.unlearn_epochs >= 1, "unlearn_epochs", "1 or more", self.unlearn_epochs)
        require(self.lr is None or self.lr > 0, "lr", "a positive rate, or null", self.lr)
        require(bool(self.lr_grid) and min(self.lr_grid) > 0, "lr_grid", "positive rates", self.lr_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.r > 0, "r", "a positive length", self.r)
        require(0 <= self.alpha <= 1, "alpha", "in [0, 1]", self.alpha)


def purify(
    model: nn.Module,
    clean: Splits,
    config: TSBDConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Both stages.

    Returns:
        The purified model. ``facts`` holds ``n``, ``lr``, the trials behind them, the
        accuracy on the *select* split before and after stage 1, and per layer the number of
        units touched (``units``, of ``unit_totals``) and of weights zeroed (``zeroed``).

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """

    def correct(network: nn.Module) -> Tensor:
        answers = predictions(network, chooser(clean), task=task, device=device, precision=config.precision)
        return answers == chooser(clean).labels.cpu()

    def select_accuracy(network: nn.Module) -> float:
        return float(correct(network).float().mean())

    unlearned = working_copy(model, device)
    history = unlearn(unlearned, clean.fit, config, task=task, seed=seed, device=device, progress=progress)
    pruned = working_copy(model, device)
    layers = unit_layers(pruned, scope=config.scope)
    changes = weight_changes(layers, dict(unlearned.named_parameters()))
    del unlearned
    before = correct(pruned)
    reference = float(before.float().mean())
    original = [layer.weight.detach().clone() for layer in layers]

    def attempt_ratio(n: float) -> tuple[float, list[Tensor]]:
        selected = zero_masks(layers, changes, n=n, m=config.m, variant=config.variant)
        set_weights(layers, original)
        zero(layers, selected)
        reached = select_accuracy(pruned)
        choosing.advance()
        return reached, selected

    def attempt_rate(lr: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        repaired = working_copy(pruned, device)
        rows = repair(repaired, clean.fit, config, lr=lr, task=task, seed=seed, device=device, progress=progress)
        return cautious_accuracy(before, correct(repaired)), (repaired, rows)

    images = len(chooser(clean))
    ratios = config.n_grid if config.n is None else (config.n,)
    with progress.phase("choose n", total=len(ratios)) as choosing:
        n, selected, n_trials = strongest_within(
            ratios,
            attempt_ratio,
            reference=reference,
            max_drop=(1 - config.stage1_keep) * reference,
            images=images,
        )
    set_weights(layers, original)
    zero(layers, selected)
    after_stage1 = select_accuracy(pruned)
    lr, (repaired, rows), lr_trials = strongest_within(
        config.lr_grid if config.lr is None else (config.lr,),
        attempt_rate,
        reference=reference,
        max_drop=config.max_drop,
        images=images,
    )
    facts: dict[str, Any] = {
        "n": n,
        "n_trials": n_trials,
        "lr": lr,
        "lr_trials": lr_trials,
        "accuracy_before": reference,
        "accuracy_after_stage1": after_stage1,
        "unlearn_epochs": len(history),
        "units": {layer.name: int(mask.flatten(1).any(1).sum()) for layer, mask in zip(layers, selected, strict=True)},
        "zeroed": {layer.name: int(mask.sum()) for layer, mask in zip(layers, selected, strict=True)},
        "unit_totals": {layer.name: layer.units for layer in layers},
    }
    return Purified(finished(repaired, "tsbd"), tuple(history + rows), facts)


def unlearn(
    model: nn.Module,
    data: CleanSet,
    config: TSBDConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> list[HistoryRow]:
    """Stage 1a, in place: ascend the cross-entropy until accuracy is partly lost.

    The stop rule ``a <= a0 - depth * (a0 - 1/K)`` scales with the number of classes, where
    the reference code stops at 0.10 for every data set.
    """

    def fit_accuracy() -> float:
        return accuracy(model, data, task=task, device=device, precision=config.precision)

    before = fit_accuracy()
    stop = before - config.unlearn_depth * (before - 1 / task.num_classes)
    trace = torch.zeros(config.unlearn_epochs, dtype=torch.float64)

    def deep_enough(epoch: int) -> bool:
        trace[epoch - 1] = reached = fit_accuracy()
        return reached <= stop

    history = tune(
        model,
        data,
        task=task,
        tuning=Tuning(config.unlearn_epochs, config.batch_size, config.unlearn_lr, precision=config.precision),
        seed=seed,
        device=device,
        progress=progress,
        name="unlearn",
        sign=-1.0,
        after_epoch=deep_enough,
        kept={"trace": trace},
    )
    return [{**row, "accuracy": value} for row, value in zip(history, trace.tolist(), strict=False)]


def repair(
    model: nn.Module,
    data: CleanSet,
    config: TSBDConfig,
    *,
    lr: float,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> list[HistoryRow]:
    """Stage 2, in place: activeness-aware fine-tuning. Zeroed weights train freely."""
    steps_per_epoch = len(batch_indices(len(data), config.batch_size, torch.Generator()))
    epochs = max(config.epochs, math.ceil(config.min_steps / steps_per_epoch)) if config.epochs else 0
    return tune(
        model,
        data,
        task=task,
        tuning=Tuning(
            epochs,
            config.batch_size,
            lr,
            weight_decay=config.weight_decay,
            schedule="cosine",
            precision=config.precision,
        ),
        seed=seed,
        device=device,
        progress=progress,
        name=f"repair lr={lr:g}",
        step=gradient_norm_step(radius=config.r, alpha=config.alpha, normalisation=config.normalisation),
    )


def weight_changes(layers: list[UnitLayer], moved: Mapping[str, Tensor]) -> list[Tensor]:
    """``d = |theta_ul - theta_bd|`` per weight, float32, shaped like each layer's weight."""
    return [(moved[layer.name].detach() - layer.weight.detach()).abs().float() for layer in layers]


def neuron_weight_change(layers: list[UnitLayer], changes: list[Tensor]) -> list[Tensor]:
    """``NWC[l, i] = sum_j d[l, i, j]``, one (units,) tensor a layer, never rounded."""
    return [layer.rows(change).sum(1) for layer, change in zip(layers, changes, strict=True)]


def zero_masks(
    layers: list[UnitLayer], changes: list[Tensor], *, n: float, m: float, variant: Variant = "v3"
) -> list[Tensor]:
    """Stage 1c: which weights are zeroed, bool, shaped like each layer's weight.

    The ``floor(n * units)`` units of largest NWC over all layers are chosen; ties at the
    threshold of the ``m`` largest changes are included.
    """
    scores = torch.cat(neuron_weight_change(layers, changes))
    count = math.floor(n * len(scores))
    if count == 0:
        return [torch.zeros_like(change, dtype=torch.bool) for change in changes]
    hit = torch.zeros_like(scores, dtype=torch.bool)
    hit[scores.topk(count).indices] = True
    chosen = hit.split([layer.units for layer in layers])
    rows = [layer.rows(change) for layer, change in zip(layers, changes, strict=True)]
    if variant == "v1":
        thresholds = [torch.zeros(layer.units, 1, device=row.device) for layer, row in zip(layers, rows, strict=True)]
    elif variant == "v2":
        thresholds = [_kept_from(row, m).unsqueeze(1) for row in rows]
    else:
        pool = torch.cat([row[part].flatten() for row, part in zip(rows, chosen, strict=True)])
        thresholds = [_kept_from(pool, m)] * len(rows)
    return [
        (part.unsqueeze(1) & (row >= threshold)).reshape(change.shape)
        for part, row, threshold, change in zip(chosen, rows, thresholds, changes, strict=True)
    ]


def _kept_from(values: Tensor, share: float) -> Tensor:
    """Smallest of the ``max(1, floor(share * size))`` largest values along the last dimension."""
    size = values.shape[-1]
    return values.kthvalue(size - max(1, math.floor(share * size)) + 1, dim=-1).values


@torch.no_grad()
def zero(layers: list[UnitLayer], selected: list[Tensor]) -> None:
    """Set the selected weights to zero, in place."""
    for layer, mask in zip(layers, selected, strict=True):
        layer.weight.masked_fill_(mask, 0.0)


@torch.no_grad()
def set_weights(layers: list[UnitLayer], weights: list[Tensor]) -> None:
    """Copy ``weights`` into the layers."""
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.copy_(weight)


METHOD = Method(
    name="tsbd",
    config=TSBDConfig,
    function=purify,
    summary="zero what clean unlearning moves most, then repair with a gradient-norm penalty (TSBD)",
    zero_steps={"n": 0.0, "epochs": 0},
)
