"""Plain fine-tuning on the clean set: the control that every purifier is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from defense_core.config import require
from defense_core.data import Splits
from defense_core.gradient_steps import Step, plain_step
from defense_core.inference import Precision, accuracy
from defense_core.loop import HistoryRow, Schedule, Tuning, finished, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, strongest_training
from defense_core.task import Task


@dataclass(frozen=True)
class FineTuningConfig:
    """Settings of plain fine-tuning; baselines that end in tuning extend them.

    Attributes:
        lr: learning rate, or ``None`` to choose it from ``lr_grid`` by
            :func:`~defense_core.purify.choice.strongest_within`, the rule that every method uses.
        lr_grid: candidates.
        max_drop: permitted drop of accuracy on the *select* split, in [0, 1].
        epochs: passes over the fit split.
        batch_size: samples per step.
        weight_decay: L2 penalty.
        schedule: learning-rate schedule.
        precision: see :class:`defense_core.loop.Tuning`.
    """

    lr: float | None = None
    lr_grid: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    max_drop: float = 0.02
    epochs: int = 20
    batch_size: int = 128
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.lr is None or self.lr > 0, "lr", "a positive rate, or null", self.lr)
        require(bool(self.lr_grid) and min(self.lr_grid) > 0, "lr_grid", "positive rates", self.lr_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)


def purify(
    model: nn.Module,
    clean: Splits,
    config: FineTuningConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Minimise the cross-entropy on the fit split by SGD, all parameters, BatchNorm in training mode."""
    tuned, rows, facts = tune_within(
        model, clean, config, task=task, seed=seed, device=device, progress=progress, name="fine-tune"
    )
    return Purified(finished(tuned, "fine_tuning"), tuple(rows), facts)


def tune_within(
    model: nn.Module,
    clean: Splits,
    config: FineTuningConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    name: str,
    reference: float | None = None,
    step: Step = plain_step,
    holding: Callable[[nn.Module], Callable[[], None]] | None = None,
) -> tuple[nn.Module, list[HistoryRow], dict[str, Any]]:
    """Tune copies of ``model`` at the rates of ``config`` and keep the one that the rule takes.

    Args:
        config: rates and schedule.
        reference: accuracy on the *select* split to measure drops against; the model's own by
            default.
        step: the gradient; see :func:`defense_core.loop.tune`.
        holding: from a copy to what is called after each of its steps (masks held at zero).

    Returns:
        The tuned copy, on ``device``, its history, and the facts ``lr`` and ``lr_trials``.
    """

    def attempt(lr: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        tuned = working_copy(model, device)
        tuning = Tuning(
            config.epochs,
            config.batch_size,
            lr,
            weight_decay=config.weight_decay,
            schedule=config.schedule,
            precision=config.precision,
        )
        rows = tune(
            tuned,
            clean.fit,
            task=task,
            tuning=tuning,
            seed=seed,
            device=device,
            progress=progress,
            name=f"{name} lr={lr:g}",
            step=step,
            after_step=holding(tuned) if holding is not None else None,
        )
        return select_accuracy(tuned), (tuned, rows)

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device, precision=config.precision)

    rates = (config.lr,) if config.lr is not None else config.lr_grid
    lr, (purified, history), trials = strongest_training(
        rates if config.epochs else (min(rates),),  # without steps every rate gives the same model
        attempt,
        clean=clean,
        reference=select_accuracy(working_copy(model, device)) if reference is None else reference,
        max_drop=config.max_drop,
    )
    return purified, history, {"lr": lr, "lr_trials": trials}


METHOD = Method(
    name="fine_tuning",
    config=FineTuningConfig,
    function=purify,
    summary="plain fine-tuning on the clean set, the control",
    zero_steps={"epochs": 0},
    control=True,
)
