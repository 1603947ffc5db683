"""TSBD's first stage (Lin et al., NeurIPS 2024, arXiv 2405.20291): unlearn on a copy, and zero what moved most.

The ascent stops halfway to chance: the ranking is as good there as at chance, at a fraction of the cost, and chance
depends on the number of classes. The neuron ratio ``n`` has a rule that reads the *select* split only; the reference
code has none. ``docs/methods.md`` gives the measurements behind both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.inference import Precision, accuracy, correct
from defense_core.layers import Scope, unit_layers
from defense_core.loop import HistoryRow, Tuning, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.choice import chooser, choosers, strongest_within
from defense_core.purify.zeroing import Variant, set_weights, weight_changes, zero, zero_masks
from defense_core.task import Task


@dataclass(frozen=True)
class StageOneConfig:
    """Settings of the first stage. Symbols are the paper's.

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
        batch_size: samples per step.
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
    batch_size: int = 128
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.n is None or 0 <= self.n < 1, "n", "in [0, 1), or null", self.n)
        require(bool(self.n_grid) and all(0 <= n < 1 for n in self.n_grid), "n_grid", "ratios in [0, 1)", self.n_grid)
        require(0 < self.stage1_keep <= 1, "stage1_keep", "in (0, 1]", self.stage1_keep)
        require(0 < self.m <= 1, "m", "in (0, 1]", self.m)
        require(self.unlearn_lr > 0, "unlearn_lr", "a positive rate", self.unlearn_lr)
        require(0 < self.unlearn_depth <= 1, "unlearn_depth", "in (0, 1]", self.unlearn_depth)
        require(self.unlearn_epochs >= 1, "unlearn_epochs", "1 or more", self.unlearn_epochs)


@dataclass(frozen=True, eq=False)
class StageOne:
    """What unlearning told, and the neuron ratio that the *select* split permits.

    Attributes:
        model: a copy of the given model, eval mode, on the device.
        changes: how far unlearning moved each weight, one tensor a layer.
        history: of the unlearning.
        n, trials: the ratio chosen, and what was tried.
        before: which images of the *select* split the given model labels as stated.
        correct: the same for any network.
        config: of the zeroing.
    """

    model: nn.Module
    changes: list[Tensor]
    history: list[HistoryRow]
    n: float
    trials: list[dict[str, float | None]]
    before: Tensor
    correct: Callable[[nn.Module], Tensor]
    config: StageOneConfig

    @property
    def accuracy(self) -> float:
        """Of the given model, on the *select* split."""
        return float(self.before.float().mean())

    def zeroed(self, n: float) -> tuple[nn.Module, list[Tensor]]:
        """A copy of the model zeroed at ratio ``n``, and which weights that were."""
        pruned = working_copy(self.model, next(self.model.parameters()).device)
        layers = unit_layers(pruned, scope=self.config.scope)
        masks = zero_masks(layers, self.changes, n=n, m=self.config.m, variant=self.config.variant)
        zero(layers, masks)
        return pruned, masks

    def counts(self, masks: list[Tensor]) -> dict[str, dict[str, int]]:
        """By layer: units touched, weights zeroed and units there are."""
        layers = unit_layers(self.model, scope=self.config.scope)
        pairs = list(zip(layers, masks, strict=True))
        return {
            "units": {layer.name: int(mask.flatten(1).any(1).sum()) for layer, mask in pairs},
            "zeroed": {layer.name: int(mask.sum()) for layer, mask in pairs},
            "unit_totals": {layer.name: layer.units for layer in layers},
        }


def stage_one(
    model: nn.Module,
    clean: Splits,
    config: StageOneConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> StageOne:
    """Unlearn on a copy, measure how far each weight moved, and choose ``n``."""

    def right(network: nn.Module) -> Tensor:
        return correct(network, chooser(clean), task=task, device=device, precision=config.precision)

    unlearned = working_copy(model, device)
    history = unlearn(unlearned, clean.fit, config, task=task, seed=seed, device=device, progress=progress)
    pruned = working_copy(model, device)
    layers = unit_layers(pruned, scope=config.scope)
    changes = weight_changes(layers, dict(unlearned.named_parameters()))
    del unlearned
    before = right(pruned)
    reference = float(before.float().mean())
    original = [layer.weight.detach().clone() for layer in layers]

    def attempt_ratio(n: float) -> tuple[float, None]:
        set_weights(layers, original)
        zero(layers, zero_masks(layers, changes, n=n, m=config.m, variant=config.variant))
        choosing.advance()
        return float(right(pruned).float().mean()), None

    ratios = config.n_grid if config.n is None else (config.n,)
    with progress.phase("choose n", total=len(ratios)) as choosing:
        n, _, trials = strongest_within(
            ratios,
            attempt_ratio,
            reference=reference,
            max_drop=(1 - config.stage1_keep) * reference,
            images=choosers(clean),
        )
    given = working_copy(model, device).eval()
    return StageOne(given, changes, history, n, trials, before, right, config)


def unlearn(
    model: nn.Module,
    data: CleanSet,
    config: StageOneConfig,
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
