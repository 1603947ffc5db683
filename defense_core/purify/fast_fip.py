"""Fast FIP (Karim et al., arXiv 2409.00863, section on efficient purification).

FIP's objective over the shifts of the singular values of convolution and linear weights alone:
``CE(delta) + eta_F Tr F(delta) + (eta_r / 2) sum_i Fbar_ii delta_i^2``, ``W = U diag(relu(s + delta)) V^T``.
A network has a few thousand shifts, whose per-sample gradients are exact and cheap
(:mod:`defense_core.singular`), so neither ``Tr F`` nor ``Fbar`` is estimated. The shifts are
folded back into ordinary weights at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.config import require
from defense_core.curvature import random_sign_trace
from defense_core.data import CleanSet, Splits
from defense_core.loop import HistoryRow, Precision, Tuning, accuracy, channels_last, finished, tune, working_copy
from defense_core.per_sample import samples_apart, squared_gradients
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified, chooser, strongest_within
from defense_core.purify.fip import TraceTerm, epochs_for, finite_trace, regularised_step, retainer
from defense_core.singular import ShiftLayer, fold, parametrise, ruled_layers, shift_gradients, shift_layers
from defense_core.task import Task


@dataclass(frozen=True)
class FastFIPConfig:
    """Settings of Fast FIP. Symbols are the paper's.

    Attributes:
        eta_f: weight of the Fisher trace of the shifts, or ``None`` for
            ``trace_share / Tr F(0)``, at which the term starts at ``trace_share`` nats.
        trace_share: see ``eta_f``.
        eta_r: weight of the retainer, or ``None`` for ``retain K / N``: the fewer samples a class
            has, the closer the shifts stay to zero.
        retain: see ``eta_r``.
        norms: whether BatchNorm scales and offsets train too.
        trace_every: the trace is taken every so many steps, and weighted by as many.
        trace_batch: samples that it is taken on.
        retain_images: samples behind ``Fbar``, at most.
        lr: learning rate, or ``None`` to choose it from ``lr_grid`` by
            :func:`~defense_core.purify.base.strongest_within`. Shifts move along fixed
            directions only, and want a larger rate than weights.
        lr_grid: candidates.
        max_drop: permitted drop of accuracy on the *select* split, in [0, 1].
        epochs: passes over the fit split.
        min_steps: at least so many steps are taken: more passes on small sets. Nothing is
            trained where ``epochs`` is 0.
        batch_size: samples per step.
        max_trace_norm: the gradient of the trace term is clipped to this L2 norm; that of the
            cross-entropy is left alone, so that a few steep samples cannot drown it.
        precision: of the cross-entropy, see :class:`defense_core.loop.Tuning`; the Fisher terms
            are always full precision.
    """

    eta_f: float | None = None
    trace_share: float = 0.1
    eta_r: float | None = None
    retain: float = 2.0
    norms: bool = True
    trace_every: int = 4
    trace_batch: int = 32
    retain_images: int = 500
    lr: float | None = None
    lr_grid: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    max_drop: float = 0.02
    epochs: int = 10
    min_steps: int = 70
    batch_size: int = 128
    max_trace_norm: float = 1.0
    precision: Precision = "auto"

    def __post_init__(self) -> None:
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
        require(self.max_trace_norm > 0, "max_trace_norm", "a positive norm", self.max_trace_norm)


def purify(
    model: nn.Module,
    clean: Splits,
    config: FastFIPConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Tune the shifts, BatchNorm in training mode for the cross-entropy, in eval mode for the Fisher.

    Returns:
        The purified model, an ordinary one. ``facts`` holds ``lr``, its trials, ``eta_f``,
        ``eta_r``, the accuracy on the *select* split before, ``Tr F(0)`` (``trace_before``), the
        numbers trained (``trained``), of them those with an exact trace (``exact``), and the
        singular values that ended at zero (``removed``).

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device, precision=config.precision)

    start = working_copy(model, device)
    reference = select_accuracy(start)
    layers = shift_layers(start)
    parametrise(start, layers)
    trained = train_only_shifts(start, layers, norms=config.norms)
    order = torch.randperm(len(clean.fit), generator=torch.Generator().manual_seed(seed))
    measured = clean.fit.subset(order[: config.retain_images])
    inputs, targets = task.inputs(measured.images.to(device)), measured.labels.to(device)
    with progress.phase("fisher") as phase:
        ruled = ruled_layers(start, layers, inputs[:8], targets[:8], losses=task.losses)
        phase.advance()
        fisher = diagonal(start, ruled, trained, inputs, targets, task=task, after_chunk=phase.advance)
    trace = finite_trace(fisher)
    eta_f = config.trace_share / max(trace, 1e-12) if config.eta_f is None else config.eta_f
    eta_r = config.retain * task.num_classes / len(clean.fit) if config.eta_r is None else config.eta_r
    anchors = {name: value.detach().clone() for name, value in start.named_parameters() if name in fisher}

    def attempt(lr: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        tuned = copy.deepcopy(start)
        rows = tune(
            tuned,
            clean.fit,
            task=task,
            tuning=Tuning(
                epochs_for(len(clean.fit), config.epochs, config.min_steps, config.batch_size),
                config.batch_size,
                lr,
                schedule="cosine",
                precision=config.precision,
            ),
            seed=seed,
            device=device,
            progress=progress,
            name=f"fast fip lr={lr:g}",
            step=regularised_step(
                eta_f,
                exact_trace_term(clean.fit, ruled, config, task=task, seed=seed, device=device),
                every=config.trace_every,
                max_norm=config.max_trace_norm,
                retain=retainer(anchors, fisher, eta_r=eta_r, lr=lr),
            ),
        )
        return select_accuracy(tuned), (tuned, rows)

    lr, (tuned, history), trials = strongest_within(
        config.lr_grid if config.lr is None else (config.lr,),
        attempt,
        reference=reference,
        max_drop=config.max_drop,
        images=len(chooser(clean)),
        patience=2,
    )
    purified = working_copy(model, device)
    fold(tuned, layers, purified)
    facts: dict[str, Any] = {
        "lr": lr,
        "lr_trials": trials,
        "accuracy_before": reference,
        "eta_f": eta_f,
        "eta_r": eta_r,
        "trace_before": trace,
        "trained": sum(value.numel() for value in fisher.values()),
        "exact": sum(fisher[layer.shift_name].numel() for layer in ruled),
        "removed": removed_values(tuned, layers),
    }
    return Purified(finished(purified, "fast_fip"), tuple(history), facts)


def train_only_shifts(model: nn.Module, layers: Sequence[ShiftLayer], *, norms: bool) -> list[str]:
    """Freeze everything but the shifts, and the affine parameters of BatchNorm where asked; their names."""
    wanted = {layer.shift_name for layer in layers}
    if norms:
        for path, module in model.named_modules():
            if isinstance(module, _BatchNorm):
                wanted |= {f"{path}.{part}".lstrip(".") for part, _ in module.named_parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    return [name for name, _ in model.named_parameters() if name in wanted]


def diagonal(
    model: nn.Module,
    ruled: Sequence[ShiftLayer],
    trained: Sequence[str],
    inputs: Tensor,
    targets: Tensor,
    *,
    task: Task,
    chunk_size: int = 32,
    after_chunk: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix of what is trained, exact."""
    exact = [layer.shift_name for layer in ruled]
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in exact}
    for some, labels in zip(inputs.split(chunk_size), targets.split(chunk_size), strict=True):
        for name, rows in shift_gradients(model, ruled, some, labels, losses=task.losses).items():
            sums[name] += rows.square().sum(0)
        after_chunk()
    others = [name for name in trained if name not in sums]
    if others:
        sums |= squared_gradients(
            model,
            inputs,
            targets,
            losses=task.losses,
            names=others,
            chunk_size=chunk_size,
            after_chunk=after_chunk,
        )
    return {name: sums[name] / len(inputs) for name in trained}


def exact_trace_term(
    data: CleanSet,
    ruled: Sequence[ShiftLayer],
    config: FastFIPConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
) -> TraceTerm:
    """Tr F on freshly drawn, augmented samples: exact for the layers with a rule, by random signs
    for what else is trained. The trace has no cross terms, so the two simply add up."""
    data = data.to(device)
    generator = torch.Generator().manual_seed(seed)
    exact = {layer.shift_name for layer in ruled}

    def term(model: nn.Module) -> Tensor:
        drawn = torch.randint(len(data), (min(config.trace_batch, len(data)),), generator=generator).to(device)
        inputs = channels_last(task.inputs(task.augmented(data.images[drawn], generator)))
        targets = data.labels[drawn]
        rows = shift_gradients(model, ruled, inputs, targets, losses=task.losses, create_graph=True)
        total = sum((row.square().sum() for row in rows.values()), torch.zeros((), device=inputs.device))
        trace = total / len(inputs)
        others = [value for name, value in model.named_parameters() if value.requires_grad and name not in exact]
        if others:
            with samples_apart(model):
                losses = task.losses(model(inputs), targets)
            trace = trace + random_sign_trace(losses, others, generator=generator)
        return trace

    return term


@torch.no_grad()
def removed_values(model: nn.Module, layers: Sequence[ShiftLayer]) -> int:
    """Singular values that the shifts have brought from above zero to zero."""
    count = 0
    for layer in layers:
        values = layer.spectrum(model).values
        count += int(((values > 0) & (values + model.get_parameter(layer.shift_name) <= 0)).sum())
    return count


METHOD = Method(
    name="fast_fip",
    config=FastFIPConfig,
    function=purify,
    summary="FIP over shifts of the weights' singular values, with exact Fisher terms (Fast FIP)",
    zero_steps={"epochs": 0},
)
