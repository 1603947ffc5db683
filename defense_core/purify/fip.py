"""FIP, Fisher-information-guided purification (Karim et al., arXiv 2409.00863).

Minimises ``CE(theta) + eta_F Tr F(theta) + (eta_r / 2) sum_i Fbar_ii (theta_i - thetabar_i)^2`` over
every parameter. ``Tr F``, the mean squared norm of per-sample gradients, pulls the weights out of
the sharp minimum that a backdoor sits in; the last term keeps what the clean task relies on,
``thetabar`` and ``Fbar`` being the given model's weights and Fisher diagonal on the clean set.

The released code computes other quantities under these names; ``docs/methods-fip.md`` lists them.
Here the trace is the unbiased random-sign estimate and the diagonal is exact, per sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.curvature import Kind, fisher_diagonal, random_sign_trace
from defense_core.data import CleanSet, Splits
from defense_core.errors import MethodDiverged
from defense_core.loop import (
    HistoryRow,
    LossOf,
    Precision,
    Step,
    Tuning,
    accuracy,
    batch_indices,
    channels_last,
    finished,
    plain_step,
    tune,
    working_copy,
)
from defense_core.per_sample import samples_apart
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified, chooser, strongest_within
from defense_core.task import Task


@dataclass(frozen=True)
class FIPConfig:
    """Settings of FIP. Symbols are the paper's.

    Attributes:
        eta_f: weight of the Fisher trace, or ``None`` for ``trace_share / Tr F(thetabar)``, at
            which the term starts at ``trace_share`` nats whatever the network's scale.
        trace_share: see ``eta_f``.
        eta_r: weight of the retainer, or ``None`` for ``retain K / N``: the fewer samples a class
            has, the less they say, and the closer the weights stay to the given ones.
        retain: see ``eta_r``.
        fisher: whose labels the trace takes: the given ones (``empirical``), or labels drawn
            from the model's own prediction (``true``).
        trace_every: the trace is taken every so many steps, and weighted by as many.
        trace_batch: samples that it is estimated on.
        trace_draws: random-sign estimates averaged each time.
        retain_images: samples behind ``Fbar``, at most.
        lr: learning rate, or ``None`` to choose it from ``lr_grid`` by
            :func:`~defense_core.purify.base.strongest_within`.
        lr_grid: candidates.
        max_drop: permitted drop of accuracy on the *select* split, in [0, 1].
        epochs: passes over the fit split.
        min_steps: at least so many steps are taken: more passes on small sets. Nothing is
            trained where ``epochs`` is 0.
        batch_size: samples per step.
        weight_decay: L2 penalty.
        max_trace_norm: the gradient of the trace term is clipped to this L2 norm; that of the
            cross-entropy is left alone, so that a few steep samples cannot drown it.
        precision: of the cross-entropy, see :class:`defense_core.loop.Tuning`; the Fisher terms
            are always full precision.
    """

    eta_f: float | None = None
    trace_share: float = 0.1
    eta_r: float | None = None
    retain: float = 2.0
    fisher: Kind = "empirical"
    trace_every: int = 2
    trace_batch: int = 32
    trace_draws: int = 1
    retain_images: int = 500
    lr: float | None = None
    lr_grid: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2)
    max_drop: float = 0.02
    epochs: int = 20
    min_steps: int = 100
    batch_size: int = 128
    weight_decay: float = 5e-4
    max_trace_norm: float = 2.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
        require(self.eta_f is None or self.eta_f >= 0, "eta_f", "0 or more, or null", self.eta_f)
        require(self.trace_share >= 0, "trace_share", "0 or more", self.trace_share)
        require(self.eta_r is None or self.eta_r >= 0, "eta_r", "0 or more, or null", self.eta_r)
        require(self.retain >= 0, "retain", "0 or more", self.retain)
        require(self.fisher in ("empirical", "true"), "fisher", "empirical or true", self.fisher)
        require(self.trace_every >= 1, "trace_every", "1 or more", self.trace_every)
        require(self.trace_batch >= 1, "trace_batch", "1 or more", self.trace_batch)
        require(self.trace_draws >= 1, "trace_draws", "1 or more", self.trace_draws)
        require(self.retain_images >= 1, "retain_images", "1 or more", self.retain_images)
        require(self.lr is None or self.lr > 0, "lr", "a positive rate, or null", self.lr)
        require(bool(self.lr_grid) and min(self.lr_grid) > 0, "lr_grid", "positive rates", self.lr_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)
        require(self.max_trace_norm > 0, "max_trace_norm", "a positive norm", self.max_trace_norm)


def purify(
    model: nn.Module,
    clean: Splits,
    config: FIPConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Tune every parameter, BatchNorm in training mode for the cross-entropy, in eval mode for the Fisher.

    Returns:
        The purified model. ``facts`` holds ``lr``, its trials, ``eta_f``, ``eta_r``, the accuracy on the *select* split
        before, and the exact trace on the retainer's samples before and after.

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device, precision=config.precision)

    start = working_copy(model, device)
    chosen = torch.randperm(len(clean.fit), generator=torch.Generator().manual_seed(seed))
    measured = clean.fit.subset(chosen[: config.retain_images])
    inputs, targets = task.inputs(measured.images.to(device)), measured.labels.to(device)
    with progress.phase("fisher") as phase:
        retained = fisher_diagonal(start, inputs, targets, losses=task.losses, after_chunk=phase.advance)
    anchors = {name: value.detach().clone() for name, value in start.named_parameters()}
    trace_before = finite_trace(retained)
    eta_f = config.trace_share / max(trace_before, 1e-12) if config.eta_f is None else config.eta_f
    eta_r = config.retain * task.num_classes / len(clean.fit) if config.eta_r is None else config.eta_r

    def attempt(lr: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        tuned = working_copy(model, device)
        penalty = retainer(anchors, retained, eta_r=eta_r, lr=lr)
        term = trace_term(clean.fit, config, task=task, seed=seed, device=device)
        rows = tune(
            tuned,
            clean.fit,
            task=task,
            tuning=Tuning(
                epochs_for(len(clean.fit), config.epochs, config.min_steps, config.batch_size),
                config.batch_size,
                lr,
                weight_decay=config.weight_decay,
                schedule="cosine",
                precision=config.precision,
            ),
            seed=seed,
            device=device,
            progress=progress,
            name=f"fip lr={lr:g}",
            step=regularised_step(
                eta_f, term, every=config.trace_every, max_norm=config.max_trace_norm, retain=penalty
            ),
        )
        return select_accuracy(tuned), (tuned, rows)

    reference = select_accuracy(start)
    lr, (tuned, history), trials = strongest_within(
        config.lr_grid if config.lr is None else (config.lr,),
        attempt,
        reference=reference,
        max_drop=config.max_drop,
        images=len(chooser(clean)),
        patience=2,
    )
    with progress.phase("fisher after") as phase:
        after = fisher_diagonal(tuned, inputs, targets, losses=task.losses, after_chunk=phase.advance)
    facts: dict[str, Any] = {
        "lr": lr,
        "lr_trials": trials,
        "accuracy_before": reference,
        "eta_f": eta_f,
        "eta_r": eta_r,
        "trace_before": trace_before,
        "trace_after": finite_trace(after),
    }
    return Purified(finished(tuned, "fip"), tuple(history), facts)


def finite_trace(diagonal: Mapping[str, Tensor]) -> float:
    """Sum of a Fisher diagonal.

    Raises:
        MethodDiverged: it is NaN or Inf.
    """
    trace = float(sum(value.sum(dtype=torch.float64) for value in diagonal.values()))
    if not math.isfinite(trace):
        raise MethodDiverged("the Fisher trace is not finite", expected="finite weights, inputs and losses", got=trace)
    return trace


def epochs_for(images: int, epochs: int, min_steps: int, batch_size: int) -> int:
    """``epochs``, or as many more as ``min_steps`` optimiser steps take; 0 stays 0."""
    if epochs == 0:
        return 0
    return max(epochs, math.ceil(min_steps / len(batch_indices(images, batch_size, torch.Generator()))))


TraceTerm = Callable[[nn.Module], Tensor]
Penalty = Callable[[nn.Module], None]


def regularised_step(eta_f: float, term: TraceTerm, *, every: int, max_norm: float, retain: Penalty) -> Step:
    """Gradient of the whole objective: the batch's cross-entropy as the loop runs it, the trace
    on its own samples every ``every`` steps, weighted by as many and clipped to ``max_norm``,
    and the retainer.

    The loss that is reported is the cross-entropy.
    """
    taken = 0

    def step(model: nn.Module, loss_of: LossOf) -> Tensor:
        nonlocal taken
        loss = plain_step(model, loss_of)
        if eta_f and taken % every == 0:
            add_clipped(model, eta_f * every * term(model), max_norm=max_norm)
        taken += 1
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


def trace_term(data: CleanSet, config: FIPConfig, *, task: Task, seed: int, device: torch.device | str) -> TraceTerm:
    """Differentiable estimate of Tr F on freshly drawn, augmented samples of ``data``."""
    data = data.to(device)
    generator = torch.Generator().manual_seed(seed)

    def term(model: nn.Module) -> Tensor:
        drawn = torch.randint(len(data), (min(config.trace_batch, len(data)),), generator=generator).to(device)
        inputs = channels_last(task.inputs(task.augmented(data.images[drawn], generator)))
        with samples_apart(model):
            outputs = model(inputs)
            targets = data.labels[drawn]
            if config.fisher == "true":
                targets = sampled_labels(outputs, task, generator)
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            return random_sign_trace(
                task.losses(outputs, targets), parameters, generator=generator, draws=config.trace_draws
            )

    return term


@torch.no_grad()
def sampled_labels(outputs: Tensor, task: Task, generator: torch.Generator) -> Tensor:
    """One label a sample from the model's prediction, ``p(k) = exp(-loss_k)``, int64 (N,)."""
    count = len(outputs)
    columns = [task.losses(outputs, torch.full((count,), k, device=outputs.device)) for k in range(task.num_classes)]
    probabilities = torch.exp(-torch.stack(columns, dim=1)).cpu()
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(outputs.device)


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


METHOD = Method(
    name="fip",
    config=FIPConfig,
    function=purify,
    summary="fine-tune under a Fisher-trace penalty, held by a Fisher-weighted anchor (FIP)",
    zero_steps={"epochs": 0},
)
