"""Fast FIP (Karim et al., arXiv 2409.00863, section on efficient purification).

FIP's objective over the shifts of the singular values of convolution and linear weights alone:
``D(delta) + eta_F Tr F(delta) + (eta_r / 2) sum_i Fbar_ii delta_i^2``, ``W = U diag(relu(s + delta)) V^T``.
A network has a few thousand shifts, whose per-sample gradients are exact and cheap
(:mod:`defense_core.singular`), so neither ``Tr F`` nor ``Fbar`` is estimated. The shifts are
folded back into ordinary weights at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.curvature import random_sign_trace
from defense_core.data import CleanSet, Splits
from defense_core.inference import channels_last
from defense_core.loop import finished, working_copy
from defense_core.per_sample import TRIED, samples_apart, samples_at_once, squared_gradients
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.fisher_guided import FisherGuidedConfig, Objective, measured_samples, minimise
from defense_core.purify.fisher_terms import TraceTerm
from defense_core.singular import ShiftLayer, fold, parametrise, ruled_layers, shift_gradients, shift_layers
from defense_core.task import Task


@dataclass(frozen=True)
class FastFIPConfig(FisherGuidedConfig):
    """Settings of Fast FIP. Symbols are the paper's.

    Shifts move along fixed directions only, and want larger rates than weights.

    Attributes:
        norms: whether BatchNorm scales and offsets train too.
        start, n_factors, taught_lr, eta_f, trace_share, eta_r, retain, trace_every, trace_batch, retain_images: see
            :class:`~defense_core.purify.fisher_guided.FisherGuidedConfig`.
        lr, lr_grid, max_drop, epochs, min_steps, batch_size, weight_decay: see there.
        max_trace_norm, precision: see there.
    """

    norms: bool = True
    trace_every: int = 5
    retain_images: int = 128
    taught_lr: float = 0.02
    lr_grid: tuple[float, ...] = (0.1, 0.5)
    weight_decay: float = 0.0
    max_trace_norm: float = 1.0


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
    """Tune the shifts. The Fisher terms are taken with BatchNorm in eval mode.

    Returns:
        The purified model, an ordinary one. ``facts`` holds what :func:`defense_core.purify.fip.purify` says, with the
        trace of what is trained, the numbers trained (``trained``), of them those with an exact trace (``exact``),
        and the singular values that ended at zero (``removed``).

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    inputs, targets = measured_samples(clean.fit, config, task=task, seed=seed, device=device)

    def objective(start: nn.Module) -> Objective:
        ordinary = working_copy(start, device)
        layers = shift_layers(start)
        parametrise(start, layers)
        trained = train_only_shifts(start, layers, norms=config.norms)
        with progress.phase("fisher") as phase:
            ruled = ruled_layers(start, layers, inputs[:TRIED], targets[:TRIED], losses=task.losses)
            phase.advance()
            fisher = diagonal(start, ruled, trained, inputs, targets, task=task, after_chunk=phase.advance)

        def folded() -> tuple[nn.Module, dict[str, Any]]:
            fold(start, layers, ordinary)
            return ordinary, {
                "trained": sum(value.numel() for value in fisher.values()),
                "exact": sum(fisher[layer.shift_name].numel() for layer in ruled),
                "removed": removed_values(start, layers),
            }

        return Objective(
            start,
            fisher,
            term=lambda generator: exact_trace_term(
                clean.fit, ruled, config, task=task, generator=generator, device=device
            ),
            folded=folded,
        )

    tuned, history, facts = minimise(
        model, clean, config, objective, task=task, seed=seed, device=device, progress=progress, name="fast fip"
    )
    return Purified(finished(tuned, "fast_fip"), tuple(history), facts)


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
    after_chunk: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Diagonal of the empirical Fisher matrix of what is trained, exact."""
    exact = [layer.shift_name for layer in ruled]
    sums = {name: torch.zeros_like(model.get_parameter(name)) for name in exact}
    chunk = samples_at_once(inputs)
    for some, labels in zip(inputs.split(chunk), targets.split(chunk), strict=True):
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
            after_chunk=after_chunk,
        )
    return {name: sums[name] / len(inputs) for name in trained}


def exact_trace_term(
    data: CleanSet,
    ruled: Sequence[ShiftLayer],
    config: FastFIPConfig,
    *,
    task: Task,
    generator: torch.Generator,
    device: torch.device | str,
) -> TraceTerm:
    """Tr F on augmented samples, drawn freshly from ``generator``: exact for the layers with a rule, by
    random signs for what else is trained. The trace has no cross terms, so the two simply add up."""
    data = data.to(device)
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
    summary="as fip, over shifts of singular values alone, with exact Fisher terms (Fast FIP)",
    zero_steps={"epochs": 0},
    baseline=True,
)
