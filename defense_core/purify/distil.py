"""Zero more, and learn it back from the given model: TSBD with a self-distillation between its stages. Ours.

TSBD's limit is accuracy: what its first stage may zero is little, because labels of few clean images do not bring the
accuracy back, and what tuning in batches does bring back are the BatchNorm statistics under which a closed backdoor
works again. On clean images, though, the given model is right and knows more than labels say. So the zeroed network
learns the given model's answers to mixed clean images (Hinton et al. 2015; MixUp, Zhang et al. 2018), its BatchNorm
statistics as they were, and far more can be zeroed for the same accuracy. The given model sees no trigger meanwhile and
cannot teach one. TSBD's second stage follows, where accuracy is left to spend. ``docs/methods.md`` has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import Splits
from defense_core.distillation import Teacher
from defense_core.layers import has_batch_norm
from defense_core.loop import HistoryRow, Tuning, epochs_for, finished, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, expected_drop, strongest_by_halving, strongest_expected
from defense_core.purify.stage_one import stage_one
from defense_core.purify.tsbd import TSBDConfig, repair
from defense_core.task import Task

LONGER = 2
"""The distillation takes so many times the passes of the repair."""
WITHOUT_NORM = 30.0
"""Networks without BatchNorm are distilled at so many times the rate: no statistics amplify a small step there."""


@dataclass(frozen=True)
class DistilConfig(TSBDConfig):
    """Settings beside those of TSBD.

    Attributes:
        n: neuron ratio; ``None``: TSBD's, times the largest of ``n_factors`` after whose distillation the accuracy
            holds (:func:`~defense_core.purify.choice.expected_drop` on the *select* split, ``max_drop``).
        n_factors: candidates, 1 or more.
        distil_lr: rate of the distillation, which takes twice the passes of ``epochs``; in networks without BatchNorm
            thirty times as much is taken.
        lr: rate of the repair that follows; ``None``: the largest of ``lr_grid`` by the same bound, or no repair.
        max_drop: permitted drop, in [0, 1].
        n_grid, stage1_keep, m, variant, scope, unlearn_lr, unlearn_depth, unlearn_epochs, lr_grid, epochs, min_steps,
            batch_size, weight_decay, r, alpha, normalisation, precision: as TSBD's.
    """

    n_factors: tuple[float, ...] = (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
    distil_lr: float = 0.001
    lr_grid: tuple[float, ...] = (0.01, 0.05, 0.2)
    max_drop: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.distil_lr > 0, "distil_lr", "a positive rate", self.distil_lr)


def purify(
    model: nn.Module,
    clean: Splits,
    config: DistilConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Zero, distil, repair.

    Returns:
        The purified model. ``facts`` holds ``n``, ``lr`` (0: no repair), the trials behind them, whose ``accuracy`` is
        the expected change, and per layer what was zeroed, as TSBD's do.

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    first = stage_one(model, clean, config, task=task, seed=seed, device=device, progress=progress)
    shared: dict[str, Any] = {"task": task, "seed": seed, "device": device, "progress": progress}
    teacher = Teacher(first.model)

    def change(network: nn.Module) -> float:
        return -expected_drop(first.model, network, chooser(clean), precision=config.precision, **shared)

    def distilled(factor: float) -> tuple[float, tuple[float, nn.Module, list[HistoryRow], list[Tensor]]]:
        ratio = min(first.n * factor, 1.0)
        student, masks = first.zeroed(ratio)
        tuning = Tuning(
            LONGER * epochs_for(len(clean.fit), config.epochs, config.min_steps, config.batch_size),
            config.batch_size,
            config.distil_lr * (1.0 if has_batch_norm(model) else WITHOUT_NORM),
            weight_decay=config.weight_decay,
            schedule="cosine",
            precision=config.precision,
        )
        rows = tune(
            student,
            clean.fit,
            tuning=tuning,
            name=f"distil n={ratio:g}",
            mixup=1.0,
            teacher=teacher,
            fixed_statistics=True,
            **shared,
        )
        reached = change(student)
        return reached, (reached, student, rows, masks)

    def repaired(lr: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        if not lr:
            return reached, (student, [])
        network = working_copy(student, device)
        rows = repair(network, clean.fit, config, lr=lr, name=f"repair lr={lr:g}", **shared)
        return change(network), (network, rows)

    bound: dict[str, Any] = {"clean": clean, "max_drop": config.max_drop}
    factors = config.n_factors if config.n is None and config.epochs else (1.0,)
    factor, (reached, student, rows, masks), n_trials = strongest_by_halving(factors, distilled, **bound)
    rates = (config.lr,) if config.lr is not None else (0.0, *config.lr_grid) if config.epochs else (0.0,)
    lr, (final, more), lr_trials = strongest_expected(rates, repaired, **bound)
    facts: dict[str, Any] = {
        "n": min(first.n * factor, 1.0),
        "n_trials": first.trials,
        "factor_trials": n_trials,
        "lr": lr,
        "lr_trials": lr_trials,
        "accuracy_before": first.accuracy,
        "unlearn_epochs": len(first.history),
        **first.counts(masks),
    }
    return Purified(finished(final, "distil"), tuple(first.history + rows + more), facts)


METHOD = Method(
    name="distil",
    config=DistilConfig,
    function=purify,
    summary="zero as TSBD does, but more, and learn the given model's answers to clean images back",
    zero_steps={"n": 0.0, "epochs": 0},
)
