"""What FIP and Fast FIP share: settings, the point they start from, the objective, the search for its strength."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.distillation import Teacher
from defense_core.inference import Precision, accuracy
from defense_core.layers import has_batch_norm
from defense_core.loop import HistoryRow, Tuning, epochs_for, tune, working_copy
from defense_core.progress import Progress
from defense_core.purify.choice import (
    chooser,
    expected_drop,
    require_factors,
    strongest_by_halving,
    strongest_expected,
)
from defense_core.purify.fisher_terms import TraceTerm, finite_trace, regularised_step, retainer
from defense_core.purify.stage_one import StageOneConfig, stage_one
from defense_core.task import Task

Start = Literal["zeroed", "given"]
WITHOUT_NORM = 10.0
"""Networks without BatchNorm learn the given model's answers at so many times the rate."""


@dataclass(frozen=True)
class FisherGuidedConfig:
    """Settings of the objective ``D + eta_F Tr F + (eta_r / 2) sum_i Fbar_ii (theta_i - thetabar_i)^2``.

    It is minimised twice: first with the given model's answers to mixed clean images in the data term ``D``, under the
    BatchNorm statistics as they are, which brings accuracy back and leaves the backdoor behind (see
    :mod:`defense_core.purify.distil`); then, where accuracy is left to spend, with the labels and BatchNorm in
    training mode, which is the paper's.

    Attributes:
        start: where the descent begins. ``zeroed``: what clean unlearning moves most is set to
            zero first, which is stage 1 of TSBD at its own settings; ``given``: the model as it
            is, as in the paper. ``thetabar`` and ``Fbar`` are those of each descent's own beginning.
        n_factors: candidates by which the neuron ratio that stage 1 permits is multiplied, 1 or more: the
            strongest by :func:`~defense_core.purify.choice.strongest_by_halving` on the
            :func:`~defense_core.purify.choice.expected_drop` after the first descent.
        taught_lr: rate of the first descent, in networks without BatchNorm ten times as much; 0: there is none, as in
            the paper.
        eta_f: weight of the Fisher trace, or ``None`` for ``trace_share / Tr F(thetabar)``, at
            which the term starts at ``trace_share`` nats whatever the network's scale.
        trace_share: see ``eta_f``.
        eta_r: weight of the retainer, or ``None`` for ``retain K / N``: the fewer samples a class
            has, the less they say, and the closer the weights stay to the starting point.
        retain: see ``eta_r``.
        trace_every: the trace is taken every so many steps, and weighted by as many.
        trace_batch: samples that it is taken on.
        retain_images: samples behind ``Fbar``, at most.
        lr: rate of the second descent, 0 for none, or ``None`` for the largest of ``lr_grid`` by the same rule; no
            such descent where the first one leaves room for none.
        lr_grid: candidates.
        max_drop: permitted drop of accuracy, estimated on the *select* split, in [0, 1].
        epochs: passes over the fit split, of each descent.
        min_steps: at least so many steps are taken: more passes on small sets. Nothing is
            done at all where ``epochs`` is 0.
        batch_size: samples per step.
        weight_decay: L2 penalty.
        max_trace_norm: the gradient of the trace term is clipped to this L2 norm; that of the
            data term is left alone, so that a few steep samples cannot drown it.
        precision: of the data term, see :class:`defense_core.loop.Tuning`; the Fisher terms
            are always full precision.
    """

    start: Start = "zeroed"
    n_factors: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5)
    taught_lr: float = 0.002
    eta_f: float | None = None
    trace_share: float = 0.1
    eta_r: float | None = None
    retain: float = 2.0
    trace_every: int = 4
    trace_batch: int = 32
    retain_images: int = 500
    lr: float | None = None
    lr_grid: tuple[float, ...] = (0.01, 0.05, 0.2)
    max_drop: float = 0.03
    epochs: int = 10
    min_steps: int = 70
    batch_size: int = 128
    weight_decay: float = 5e-4
    max_trace_norm: float = 2.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.start in ("zeroed", "given"), "start", "zeroed or given", self.start)
        require_factors(self.n_factors, "n_factors")
        require(self.taught_lr >= 0, "taught_lr", "0 or more", self.taught_lr)
        require(self.eta_f is None or self.eta_f >= 0, "eta_f", "0 or more, or null", self.eta_f)
        require(self.trace_share >= 0, "trace_share", "0 or more", self.trace_share)
        require(self.eta_r is None or self.eta_r >= 0, "eta_r", "0 or more, or null", self.eta_r)
        require(self.retain >= 0, "retain", "0 or more", self.retain)
        require(self.trace_every >= 1, "trace_every", "1 or more", self.trace_every)
        require(self.trace_batch >= 1, "trace_batch", "1 or more", self.trace_batch)
        require(self.retain_images >= 1, "retain_images", "1 or more", self.retain_images)
        require(self.lr is None or self.lr >= 0, "lr", "0 or more, or null", self.lr)
        require(bool(self.taught_lr) or self.lr != 0, "lr", "positive where taught_lr is 0, or null", self.lr)
        require(bool(self.lr_grid) and min(self.lr_grid) > 0, "lr_grid", "positive rates", self.lr_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        require(self.max_trace_norm > 0, "max_trace_norm", "a positive norm", self.max_trace_norm)


@dataclass(frozen=True, eq=False)
class Objective:
    """The objective at one starting point.

    Attributes:
        network: the starting point, whose parameters that require a gradient are trained in place.
        fisher: ``Fbar`` there, by parameter name.
        term: makes the trace term from the generator that it draws from.
        folded: the tuned network as an ordinary one, and facts about it.
    """

    network: nn.Module
    fisher: Mapping[str, Tensor]
    term: Callable[[torch.Generator], TraceTerm]
    folded: Callable[[], tuple[nn.Module, dict[str, Any]]]


def measured_samples(
    data: CleanSet, config: FisherGuidedConfig, *, task: Task, seed: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Inputs and labels behind ``Fbar``: at most ``retain_images`` of ``data``, at random."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    measured = data.subset(order[: config.retain_images])
    return task.inputs(measured.images.to(device)), measured.labels.to(device)


def minimise(
    model: nn.Module,
    clean: Splits,
    config: FisherGuidedConfig,
    objective: Callable[[nn.Module], Objective],
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    name: str,
) -> tuple[nn.Module, list[HistoryRow], dict[str, Any]]:
    """Minimise the objective, by the given model's answers and by labels, at the strengths that the rule takes.

    Args:
        model: the unpurified model.
        objective: the objective at a starting point, a copy of its own.

    Returns:
        The tuned network, its history, and the facts ``lr`` (0: nothing was learnt from labels), ``lr_trials`` and
        ``factor_trials``, whose ``accuracy`` is the expected change, ``accuracy_before``, of the last descent
        ``eta_f``, ``eta_r``, ``trace_before`` and what the folding told, and where the start is zeroed ``n``,
        ``n_trials`` and what was zeroed.
    """
    shared: dict[str, Any] = {"task": task, "seed": seed, "device": device, "progress": progress}
    given = working_copy(model, device).eval()
    teacher = Teacher(given)
    first = None
    if config.start == "zeroed" and config.epochs:
        zeroing = StageOneConfig(batch_size=config.batch_size, precision=config.precision)
        first = stage_one(model, clean, zeroing, **shared)

    def descended(start: nn.Module, lr: float, phase: str, *, taught: bool) -> _Descent:
        aim = objective(start)
        trace = finite_trace(aim.fisher)
        eta_f = config.trace_share / max(trace, 1e-12) if config.eta_f is None else config.eta_f
        eta_r = config.retain * task.num_classes / len(clean.fit) if config.eta_r is None else config.eta_r
        anchors = {key: value.detach().clone() for key, value in aim.network.named_parameters() if key in aim.fisher}
        generator, taken = torch.Generator().manual_seed(seed), torch.zeros((), dtype=torch.int64)
        tuning = Tuning(
            epochs_for(len(clean.fit), config.epochs, config.min_steps, config.batch_size),
            config.batch_size,
            lr,
            weight_decay=config.weight_decay,
            schedule="cosine",
            precision=config.precision,
        )
        rows = tune(
            aim.network,
            clean.fit,
            tuning=tuning,
            name=f"{name} {phase}",
            mixup=1.0 if taught else 0.0,
            teacher=teacher if taught else None,
            fixed_statistics=taught,
            step=regularised_step(
                eta_f,
                aim.term(generator),
                every=config.trace_every,
                max_norm=config.max_trace_norm,
                retain=retainer(anchors, aim.fisher, eta_r=eta_r, lr=lr),
                taken=taken,
            ),
            kept={"generator": generator, "taken": taken},
            **shared,
        )
        network, more = aim.folded()
        change = -expected_drop(given, network, chooser(clean), precision=config.precision, **shared)
        return _Descent(network, change, rows, {"eta_f": eta_f, "eta_r": eta_r, "trace_before": trace, **more})

    def begun(factor: float) -> tuple[float, _Descent]:
        start, found = working_copy(given, device), dict[str, Any]()
        if first is not None:
            start, masks = first.zeroed(min(first.n * factor, 1.0))
            found = {"n": min(first.n * factor, 1.0), "n_trials": first.trials, **first.counts(masks)}
        if not config.epochs or (first is None and not config.taught_lr):
            return 0.0, _Descent(start, 0.0, [], found)
        if not config.taught_lr:
            change = -expected_drop(given, start, chooser(clean), precision=config.precision, **shared)
            return change, _Descent(start, change, [], found)
        rate = config.taught_lr * (1.0 if has_batch_norm(given) else WITHOUT_NORM)
        made = descended(start, rate, f"factor={factor:g}", taught=True)
        return made.change, replace(made, facts=found | made.facts)

    def ended(lr: float) -> tuple[float, _Descent]:
        if not lr:
            return beginning.change, beginning
        made = descended(working_copy(beginning.network, device), lr, f"lr={lr:g}", taught=False)
        return made.change, replace(made, rows=beginning.rows + made.rows, facts=beginning.facts | made.facts)

    bound: dict[str, Any] = {"clean": clean, "max_drop": config.max_drop}
    # With nothing zeroed or learnt every candidate is the same.
    factors = config.n_factors if first is not None and config.taught_lr else (1.0,)
    _, beginning, factor_trials = strongest_by_halving(factors, begun, **bound)
    rates = config.lr_grid if config.lr is None else (config.lr,)
    if config.taught_lr and config.lr is None:
        rates = (0.0, *rates)
    # Without steps every rate gives the same model.
    lr, ending, lr_trials = strongest_expected(rates if config.epochs else (min(rates),), ended, **bound)
    before = accuracy(given, chooser(clean), task=task, device=device, precision=config.precision)
    facts = {"lr": lr, "lr_trials": lr_trials, "factor_trials": factor_trials, "accuracy_before": before}
    return ending.network, ending.rows, facts | ending.facts


@dataclass(frozen=True, eq=False)
class _Descent:
    network: nn.Module
    change: float
    rows: list[HistoryRow]
    facts: dict[str, Any]
