"""TSBD, Two-Stage Backdoor Defense (Lin et al., NeurIPS 2024, arXiv 2405.20291).

Stage 1 unlearns the clean set by gradient ascent on a copy, measures how far each weight
moved (neuron weight change, NWC), and zeroes the most-moved sub-weights of the most-moved
units of the original. Stage 2 repairs the rest by activeness-aware fine-tuning, which
penalises the gradient norm.

What is ours in the first stage, :mod:`defense_core.purify.stage_one` says. How much is zeroed and at
which rate it is repaired have a rule that reads the *select* split only, after the repair; the
reference code has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.gradient_steps import gradient_norm_step
from defense_core.layers import has_batch_norm
from defense_core.loop import HistoryRow, Tuning, epochs_for, finished, tune
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, expected_drop, require_factors, strongest_by_halving, strongest_expected
from defense_core.purify.stage_one import StageOneConfig, stage_one
from defense_core.purify.zeroing import CLOSE_FACTORS
from defense_core.task import Task

GENTLER = (0.25, 0.5)
"""Further factors of the neuron ratio in networks without BatchNorm, whose layers bear less."""
WITHOUT_NORM = 0.2
"""Share of the repair's rates that they are repaired at: no statistics bound a step there."""


@dataclass(frozen=True)
class TSBDConfig(StageOneConfig):
    """Settings of TSBD. Symbols are the paper's.

    Attributes:
        n: neuron ratio; ``None``: the first stage's, times the largest of ``n_factors`` after whose repair at the
            smallest rate the accuracy holds (:func:`~defense_core.purify.choice.expected_drop` on the *select* split,
            ``max_drop``).
        n_factors: candidates, 1 or more; where they are several, a quarter and a half too in networks without
            BatchNorm.
        lr: repair rate; ``None``: the largest of ``lr_grid`` by the same bound.
        lr_grid: candidates; in networks without BatchNorm a fifth of them.
        max_drop: permitted drop, in [0, 1]; that of the test accuracy is about half a point to two less, because the
            estimate credits no mistake that labels mend.
        n_grid, stage1_keep, m, variant, scope, unlearn_lr, unlearn_depth, unlearn_epochs: as in
            :class:`~defense_core.purify.stage_one.StageOneConfig`.
        epochs: passes of the repair.
        min_steps: the repair takes at least so many steps: more passes on small sets. Nothing
            is trained where ``epochs`` is 0.
        weight_decay: L2 penalty of the repair.
        r: length of the step along the gradient at which the second gradient is taken.
        alpha: weight of that gradient; ``lambda = alpha * r``. 0 is plain tuning, 1 is SAM.
        normalisation: of the step's direction: by the gradient's ``global`` norm, which is
            the equation, or ``per_tensor``, which is what the reference code does.
        batch_size, precision: see :class:`defense_core.loop.Tuning`.
    """

    n_factors: tuple[float, ...] = CLOSE_FACTORS
    lr: float | None = None
    lr_grid: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    max_drop: float = 0.05
    epochs: int = 10
    min_steps: int = 70
    weight_decay: float = 5e-4
    r: float = 0.5
    alpha: float = 0.7
    normalisation: Literal["global", "per_tensor"] = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_factors(self.n_factors, "n_factors")
        require(self.lr is None or self.lr > 0, "lr", "a positive rate, or null", self.lr)
        require(bool(self.lr_grid) and min(self.lr_grid) > 0, "lr_grid", "positive rates", self.lr_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
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
        The purified model. ``facts`` holds ``n``, ``lr``, the trials behind them, of which those after a repair
        (``factor_trials``, ``lr_trials``) have the expected change as ``accuracy``, the accuracy on the *select* split
        before and after stage 1, and per layer the number of units touched (``units``, of ``unit_totals``) and of
        weights zeroed (``zeroed``).

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    shared: dict[str, Any] = {"task": task, "seed": seed, "device": device, "progress": progress}
    first = stage_one(model, clean, config, **shared)
    gentle = not has_batch_norm(model)
    rates = [lr * (WITHOUT_NORM if gentle else 1.0) for lr in config.lr_grid] if config.lr is None else [config.lr]
    weakest, *stronger = sorted(rates)

    def repaired(ratio: float, lr: float) -> tuple[float, _Repaired]:
        network, masks = first.zeroed(ratio)
        rows = repair(network, clean.fit, config, lr=lr, name=f"repair n={ratio:g} lr={lr:g}", **shared)
        change = -expected_drop(first.model, network, chooser(clean), precision=config.precision, **shared)
        return change, _Repaired(network, change, rows, masks)

    bound: dict[str, Any] = {"clean": clean, "max_drop": config.max_drop}
    factors = config.n_factors if config.n is None and config.epochs else (1.0,)
    if gentle and len(factors) > 1:
        factors = (*GENTLER, *factors)
    factor, begun, factor_trials = strongest_by_halving(
        factors, lambda factor: repaired(min(first.n * factor, 1.0), weakest), **bound
    )
    ratio = min(first.n * factor, 1.0)
    # Without steps every rate gives the same model.
    lr, made, lr_trials = strongest_expected(
        (weakest, *stronger) if config.epochs else (weakest,),
        lambda lr: (begun.change, begun) if lr == weakest else repaired(ratio, lr),
        **bound,
    )
    facts: dict[str, Any] = {
        "n": ratio,
        "n_trials": first.trials,
        "factor_trials": factor_trials,
        "lr": lr,
        "lr_trials": lr_trials,
        "accuracy_before": first.accuracy,
        "accuracy_after_stage1": float(first.correct(first.zeroed(ratio)[0]).float().mean()),
        "unlearn_epochs": len(first.history),
        **first.counts(made.masks),
    }
    return Purified(finished(made.network, "tsbd"), tuple(first.history + made.rows), facts)


@dataclass(frozen=True, eq=False)
class _Repaired:
    network: nn.Module
    change: float
    rows: list[HistoryRow]
    masks: list[Tensor]


def repair(
    model: nn.Module,
    data: CleanSet,
    config: TSBDConfig,
    *,
    lr: float,
    name: str,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> list[HistoryRow]:
    """Stage 2, in place: activeness-aware fine-tuning. Zeroed weights train freely. ``name`` is shown meanwhile."""
    epochs = epochs_for(len(data), config.epochs, config.min_steps, config.batch_size)
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
        name=name,
        step=gradient_norm_step(radius=config.r, alpha=config.alpha, normalisation=config.normalisation),
    )


METHOD = Method(
    name="tsbd",
    config=TSBDConfig,
    function=purify,
    summary="zero what clean unlearning moves most, then repair with a gradient-norm penalty (TSBD)",
    zero_steps={"n": 0.0, "epochs": 0},
)
