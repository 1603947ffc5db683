"""Fisher information of a loss in weight space, and the natural gradient.

BatchNorm is in eval mode in every function here, set and restored by the function itself, and
all arithmetic is full precision: squares of gradients underflow in half precision. Samples are
assumed to be classified with the cross-entropy, ``loss = -log p(target | input)``.

Two Fisher matrices, both ``(1/N) sum_n E_y[grad log p(y|x_n) grad log p(y|x_n)^T]``:

``empirical``
    the expectation is replaced by the given label.
``true``
    the expectation is over the model's own prediction, summed exactly over all classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.per_sample import (
    Losses,
    per_sample_gradients,
    samples_apart,
    samples_at_once,
    squared_gradients,
)

Kind = Literal["empirical", "true"]


def fisher_diagonal(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    losses: Losses,
    kind: Kind = "empirical",
    num_classes: int = 0,
    names: Sequence[str] | None = None,
    chunk_size: int | None = None,
    by_layer: bool = True,
    after_chunk: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Diagonal of the Fisher matrix, exact.

    Args:
        inputs: (N, ...), as the model wants them.
        targets: (N,) int64; ignored by the true Fisher.
        losses: per-sample cross-entropy.
        num_classes: K, needed by the true Fisher, which costs K backward passes.
        names: parameters, or ``None`` for all.
        chunk_size: samples at once, or ``None`` for :func:`defense_core.per_sample.samples_at_once`.
        by_layer, after_chunk: see :func:`defense_core.per_sample.squared_gradients`.

    Returns:
        Parameter name to a non-negative tensor shaped like the parameter.

    Raises:
        ConfigError: no samples, no class count, an unknown name.
        MethodNotApplicable: BatchNorm without running statistics.
    """
    require(len(inputs) > 0, "inputs", "at least one sample", len(inputs))
    chosen, chunk_size = _names(model, names), chunk_size or samples_at_once(inputs)
    sums: dict[str, Tensor] = {}
    for labels, weights in _label_draws(
        model, inputs, targets, losses=losses, kind=kind, num_classes=num_classes, chunk_size=chunk_size
    ):
        squares = squared_gradients(
            model,
            inputs,
            labels,
            losses=losses,
            names=chosen,
            weights=weights,
            chunk_size=chunk_size,
            by_layer=by_layer,
            after_chunk=after_chunk,
        )
        sums = {name: value + sums[name] if sums else value for name, value in squares.items()}
    return {name: value / len(inputs) for name, value in sums.items()}


def fisher_trace(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    losses: Losses,
    kind: Kind = "empirical",
    num_classes: int = 0,
    names: Sequence[str] | None = None,
    chunk_size: int | None = None,
    after_chunk: Callable[[], None] | None = None,
) -> float:
    """``Tr F = (1/N) sum_n E_y ||grad log p(y|x_n)||^2``, exact; arguments as :func:`fisher_diagonal`."""
    diagonal = fisher_diagonal(
        model,
        inputs,
        targets,
        losses=losses,
        kind=kind,
        num_classes=num_classes,
        names=names,
        chunk_size=chunk_size,
        after_chunk=after_chunk,
    )
    return float(sum(value.sum(dtype=torch.float64) for value in diagonal.values()))


def fisher_rows(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    losses: Losses,
    kind: Kind = "empirical",
    num_classes: int = 0,
    names: Sequence[str] | None = None,
    chunk_size: int = 32,
) -> Tensor:
    """A factor ``R`` of the Fisher matrix, ``F = R^T R``, for few parameters or few samples.

    Returns:
        (N, P) for the empirical Fisher, (N K, P) for the true one; columns follow ``names``.
    """
    chosen = _names(model, names)
    blocks = [
        per_sample_gradients(model, inputs, labels, losses=losses, names=chosen, weights=weights, chunk_size=chunk_size)
        for labels, weights in _label_draws(
            model, inputs, targets, losses=losses, kind=kind, num_classes=num_classes, chunk_size=chunk_size
        )
    ]
    return torch.cat(blocks) / math.sqrt(len(inputs))


def random_sign_trace(
    sample_losses: Tensor, parameters: Sequence[Tensor], *, generator: torch.Generator, draws: int = 1
) -> Tensor:
    """Unbiased estimate of Tr F that a loss may contain: differentiable in the parameters.

    With signs ``r_n = +-1`` and ``g = grad sum_n r_n loss_n``, the cross terms of ``||g||^2``
    vanish in expectation and ``E[||g||^2 / N] = Tr F``. The samples must not interact: compute
    the losses inside :func:`defense_core.per_sample.samples_apart`.

    Args:
        sample_losses: (N,), with their graph; labels drawn from the model instead of the given
            ones make it the trace of the true Fisher.
        parameters: those the trace runs over.
        generator: a CPU generator.
        draws: estimates to average, each one backward pass.

    Returns:
        A scalar with a graph.
    """
    require(draws >= 1, "draws", "1 or more", draws)
    count = len(sample_losses)
    total = sample_losses.new_zeros(())
    for _ in range(draws):
        signs = torch.randint(0, 2, (count,), generator=generator).mul(2).sub(1).to(sample_losses)
        gradients = torch.autograd.grad(
            (signs * sample_losses).sum(), list(parameters), create_graph=True, allow_unused=True
        )
        total = total + sum(gradient.square().sum() for gradient in gradients if gradient is not None)
    return total / (draws * count)


def natural_gradient(rows: Tensor, gradient: Tensor, *, damping: float) -> Tensor:
    """``(R^T R + damping I)^-1 g``, exact, for the factor ``R`` of :func:`fisher_rows`.

    Solved in the smaller of the two spaces: by Woodbury in that of the rows, or directly in that
    of the parameters; in float64, since the damping is small beside the leading eigenvalues.

    Args:
        rows: (M, P).
        gradient: (P,) or (P, several).
        damping: positive, in units of the Fisher matrix's eigenvalues.

    Returns:
        Shape and dtype of ``gradient``.
    """
    require(damping > 0, "damping", "a positive number", damping)
    count, size = rows.shape
    factor, right = rows.double(), gradient.double()
    if size <= count:
        matrix = factor.T @ factor + damping * torch.eye(size, dtype=torch.float64, device=rows.device)
        return _solve(matrix, right).to(gradient)
    gram = factor @ factor.T + damping * torch.eye(count, dtype=torch.float64, device=rows.device)
    return ((right - factor.T @ _solve(gram, factor @ right)) / damping).to(gradient)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    columns = right if right.dim() == 2 else right.unsqueeze(1)
    return torch.cholesky_solve(columns, torch.linalg.cholesky(matrix)).view_as(right)


def _names(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    return [name for name, _ in model.named_parameters()] if names is None else list(names)


def _label_draws(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    losses: Losses,
    kind: Kind,
    num_classes: int,
    chunk_size: int,
) -> list[tuple[Tensor, Tensor | None]]:
    """Labels and factors on the loss whose squared gradients add up to the Fisher matrix."""
    require(kind in ("empirical", "true"), "kind", "empirical or true", kind)
    if kind == "empirical":
        return [(targets, None)]
    require(num_classes >= 2, "num_classes", "at least 2 classes for the true Fisher", num_classes)
    draws: list[tuple[Tensor, Tensor | None]] = []
    with samples_apart(model), torch.no_grad():
        outputs = torch.cat([model(part) for part in inputs.split(chunk_size)])
    for label in range(num_classes):
        labels = torch.full((len(inputs),), label, dtype=torch.int64, device=inputs.device)
        # exp(-loss) is the probability; its root, since gradients are squared afterwards.
        draws.append((labels, torch.exp(-0.5 * losses(outputs, labels))))
    return draws
