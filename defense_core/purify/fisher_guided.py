"""What FIP and Fast FIP share: settings, the point they start from, the objective, the search for the rate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.errors import MethodDiverged
from defense_core.loop import (
    HistoryRow,
    LossOf,
    Precision,
    Step,
    Tuning,
    epochs_for,
    plain_step,
    predictions,
    tune,
    working_copy,
)
from defense_core.progress import Progress
from defense_core.purify import tsbd
from defense_core.purify.base import cautious_accuracy, chooser, strongest_within
from defense_core.task import Task

Start = Literal["zeroed", "given"]
TraceTerm = Callable[[nn.Module], Tensor]
Penalty = Callable[[nn.Module], None]


@dataclass(frozen=True)
class FisherGuidedConfig:
    """Settings of the objective ``CE + eta_F Tr F + (eta_r / 2) sum_i Fbar_ii (theta_i - thetabar_i)^2``.

    Attributes:
        start: where the descent begins. ``zeroed``: what clean unlearning moves most is set to
            zero first, which is stage 1 of TSBD at its own settings; ``given``: the model as it
            is, as in the paper. ``thetabar`` and ``Fbar`` are those of the starting point.
        eta_f: weight of the Fisher trace, or ``None`` for ``trace_share / Tr F(thetabar)``, at
            which the term starts at ``trace_share`` nats whatever the network's scale.
        trace_share: see ``eta_f``.
        eta_r: weight of the retainer, or ``None`` for ``retain K / N``: the fewer samples a class
            has, the less they say, and the closer the weights stay to the starting point.
        retain: see ``eta_r``.
        trace_every: the trace is taken every so many steps, and weighted by as many.
        trace_batch: samples that it is taken on.
        retain_images: samples behind ``Fbar``, at most.
        lr: learning rate, or ``None`` to choose it from ``lr_grid`` by
            :func:`~defense_core.purify.base.strongest_within` on the
            :func:`~defense_core.purify.base.cautious_accuracy`.
        lr_grid: candidates.
        max_drop: permitted drop of that accuracy on the *select* split, in [0, 1].
        epochs: passes over the fit split.
        min_steps: at least so many steps are taken: more passes on small sets. Nothing is
            done at all where ``epochs`` is 0.
        batch_size: samples per step.
        weight_decay: L2 penalty.
        max_trace_norm: the gradient of the trace term is clipped to this L2 norm; that of the
            cross-entropy is left alone, so that a few steep samples cannot drown it.
        precision: of the cross-entropy, see :class:`defense_core.loop.Tuning`; the Fisher terms
            are always full precision.
    """

    start: Start = "zeroed"
    eta_f: float | None = None
    trace_share: float = 0.1
    eta_r: float | None = None
    retain: float = 2.0
    trace_every: int = 2
    trace_batch: int = 32
    retain_images: int = 500
    lr: float | None = None
    lr_grid: tuple[float, ...] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    max_drop: float = 0.01
    epochs: int = 10
    min_steps: int = 70
    batch_size: int = 128
    weight_decay: float = 5e-4
    max_trace_norm: float = 2.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.start in ("zeroed", "given"), "start", "zeroed or given", self.start)
        require(self.eta_f is None or self.eta_f >= 0, "eta_f", "0 or more, or null", self.eta_f)
        require(self.trace_share >= 0, "trace_share", "0 or more", self.trace_share)
        require(self.eta_r is None or self.eta_r >= 0, "eta_r", "0 or more, or null", self.eta_r)
        require(self.retain >= 0, "retain", "0 or more", self.retain)
        require(self.trace_every >= 1, "trace_every", "1 or more", self.trace_every)
        require(self.trace_batch >= 1, "trace_batch", "1 or more", self.trace_batch)
        require(self.retain_images >= 1, "retain_images", "1 or more", self.retain_images)
        require(self.lr is None or self.lr > 0, "lr", "a positive rate, or null", self.lr)
        require(bool(self.lr_grid) and min(self.lr_grid) > 0, "lr_grid", "positive rates", self.lr_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        require(self.max_trace_norm > 0, "max_trace_norm", "a positive norm", self.max_trace_norm)


def starting_point(
    model: nn.Module,
    clean: Splits,
    config: FisherGuidedConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> tuple[nn.Module, dict[str, Any]]:
    """A copy of ``model`` on ``device``, zeroed first where ``config.start`` says so, and facts about it."""
    if config.start == "given" or config.epochs == 0:
        return working_copy(model, device), {}
    zeroing = tsbd.TSBDConfig(epochs=0, lr=1.0, batch_size=config.batch_size, precision=config.precision)
    zeroed = tsbd.purify(model, clean, zeroing, task=task, seed=seed, device=device, progress=progress)
    facts = {key: zeroed.facts[key] for key in ("n", "n_trials", "accuracy_after_stage1", "zeroed")}
    return working_copy(zeroed.model, device), facts


def measured_samples(
    data: CleanSet, config: FisherGuidedConfig, *, task: Task, seed: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Inputs and labels behind ``Fbar``: at most ``retain_images`` of ``data``, at random."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    measured = data.subset(order[: config.retain_images])
    return task.inputs(measured.images.to(device)), measured.labels.to(device)


def minimise(
    original: nn.Module,
    start: nn.Module,
    clean: Splits,
    config: FisherGuidedConfig,
    *,
    fisher: Mapping[str, Tensor],
    term: Callable[[torch.Generator], TraceTerm],
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    name: str,
) -> tuple[nn.Module, list[HistoryRow], dict[str, Any]]:
    """Minimise the objective from ``start``, at the rate that the rule takes.

    Args:
        original: the unpurified model, whose accuracy is the reference.
        start: the starting point; what requires a gradient is trained, on copies.
        fisher: ``Fbar`` at ``start`` by parameter name.
        term: makes the trace term, anew for each rate, from the generator that it draws from.

    Returns:
        The tuned copy, its history, and the facts ``lr``, ``lr_trials``, ``accuracy_before``,
        ``eta_f``, ``eta_r`` and ``trace_before``.
    """

    def correct(network: nn.Module) -> Tensor:
        answers = predictions(network, chooser(clean), task=task, device=device, precision=config.precision)
        return answers == chooser(clean).labels.cpu()

    trace = finite_trace(fisher)
    eta_f = config.trace_share / max(trace, 1e-12) if config.eta_f is None else config.eta_f
    eta_r = config.retain * task.num_classes / len(clean.fit) if config.eta_r is None else config.eta_r
    anchors = {key: value.detach().clone() for key, value in start.named_parameters() if key in fisher}
    before = correct(working_copy(original, device))
    reference = float(before.float().mean())

    def attempt(lr: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        tuned = copy.deepcopy(start)
        generator = torch.Generator().manual_seed(seed)
        taken = torch.zeros((), dtype=torch.int64)
        tuning = Tuning(
            epochs_for(len(clean.fit), config.epochs, config.min_steps, config.batch_size),
            config.batch_size,
            lr,
            weight_decay=config.weight_decay,
            schedule="cosine",
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
            step=regularised_step(
                eta_f,
                term(generator),
                every=config.trace_every,
                max_norm=config.max_trace_norm,
                retain=retainer(anchors, fisher, eta_r=eta_r, lr=lr),
                taken=taken,
            ),
            kept={"generator": generator, "taken": taken},
        )
        return cautious_accuracy(before, correct(tuned)), (tuned, rows)

    rates = config.lr_grid if config.lr is None else (config.lr,)
    lr, (tuned, history), trials = strongest_within(
        rates if config.epochs else (min(rates),),  # without steps every rate gives the same model
        attempt,
        reference=reference,
        max_drop=config.max_drop,
        images=len(before),
    )
    facts: dict[str, Any] = {
        "lr": lr,
        "lr_trials": trials,
        "accuracy_before": reference,
        "eta_f": eta_f,
        "eta_r": eta_r,
        "trace_before": trace,
    }
    return tuned, history, facts


def finite_trace(diagonal: Mapping[str, Tensor]) -> float:
    """Sum of a Fisher diagonal.

    Raises:
        MethodDiverged: it is NaN or Inf.
    """
    trace = float(sum(value.sum(dtype=torch.float64) for value in diagonal.values()))
    if not math.isfinite(trace):
        raise MethodDiverged("the Fisher trace is not finite", expected="finite weights, inputs and losses", got=trace)
    return trace


def regularised_step(
    eta_f: float, term: TraceTerm, *, every: int, max_norm: float, retain: Penalty, taken: Tensor
) -> Step:
    """Gradient of the whole objective: the batch's cross-entropy as the loop runs it, the trace
    on its own samples every ``every`` steps, weighted by as many and clipped to ``max_norm``,
    and the retainer.

    The loss that is reported is the cross-entropy. ``taken``, an int64 scalar, counts the steps in place.
    """

    def step(model: nn.Module, loss_of: LossOf) -> Tensor:
        loss = plain_step(model, loss_of)
        if eta_f and int(taken) % every == 0:
            add_clipped(model, eta_f * every * term(model), max_norm=max_norm)
        taken.add_(1)
        retain(model)
        return loss

    return step


def add_clipped(model: nn.Module, term: Tensor, *, max_norm: float) -> None:
    """Add the gradient of ``term``, clipped to the global L2 norm ``max_norm``, to every gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(term, parameters, allow_unused=True)
    pairs = [(p, g) for p, g in zip(parameters, found, strict=True) if g is not None]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(gradient) for _, gradient in pairs]))
    factor = (max_norm / norm.clamp_min(1e-12)).clamp(max=1.0)
    for parameter, gradient in pairs:
        scaled = gradient * factor
        parameter.grad = scaled if parameter.grad is None else parameter.grad.add_(scaled)


def retainer(anchors: Mapping[str, Tensor], fisher: Mapping[str, Tensor], *, eta_r: float, lr: float) -> Penalty:
    """Adds ``eta_r Fbar_ii (theta_i - thetabar_i)`` to the gradient of every parameter in ``fisher``.

    The stiffness ``eta_r Fbar_ii`` is capped at ``1 / lr``: a stiffer spring cannot hold a weight
    closer at that rate, it makes gradient descent oscillate.
    """
    stiffness = {name: (eta_r * value).clamp(max=1 / lr) for name, value in fisher.items()}

    @torch.no_grad()
    def penalty(model: nn.Module) -> None:
        if eta_r == 0:
            return
        for name, parameter in model.named_parameters():
            if name not in stiffness:
                continue
            pull = stiffness[name] * (parameter - anchors[name])
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)

    return penalty
