"""The Hessian of a loss in weight space: products, its largest eigenvalue, its trace.

As in :mod:`defense_core.curvature`, BatchNorm is in eval mode, set and restored here, and all
arithmetic is full precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.per_sample import Losses, samples_apart

Operator = Callable[[Tensor], Tensor]
"""A symmetric matrix as its product with a flat vector."""


def hessian(
    model: nn.Module, inputs: Tensor, targets: Tensor, *, losses: Losses, names: Sequence[str] | None = None
) -> tuple[Operator, int]:
    """The Hessian of the mean loss as a Hessian-vector product, and its size P.

    The graph of the gradient is built once and kept, so the samples (a few hundred) have to fit
    in memory together. Vectors are flat, (P,), parameters in the order of ``names``.
    """
    named = dict(model.named_parameters())
    parameters = [named[name] for name in (named if names is None else names)]
    with samples_apart(model), torch.enable_grad():
        loss = losses(model(inputs), targets).mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    flat = torch.cat([_or_zero(g, p).reshape(-1) for g, p in zip(gradients, parameters, strict=True)])

    def product(vector: Tensor) -> Tensor:
        with samples_apart(model):
            columns = torch.autograd.grad(flat, parameters, vector, retain_graph=True, allow_unused=True)
        return torch.cat([_or_zero(c, p).reshape(-1) for c, p in zip(columns, parameters, strict=True)])

    return product, flat.numel()


@dataclass(frozen=True, eq=False)
class TopEigenvalue:
    """Largest eigenvalue of a symmetric matrix.

    Attributes:
        value: the eigenvalue.
        residual: ``||A v - value v||``: some eigenvalue is at most this far from ``value``.
        iterations: products spent.
        converged: whether the residual fell below the tolerance times ``|value|``.
        vector: the unit eigenvector, (P,).
    """

    value: float
    residual: float
    iterations: int
    converged: bool
    vector: Tensor


def top_eigenvalue(
    operator: Operator,
    size: int,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_iterations: int = 60,
    tolerance: float = 1e-3,
) -> TopEigenvalue:
    """Largest (signed) eigenvalue by Lanczos with full re-orthogonalisation.

    Power iteration finds the largest *absolute* eigenvalue and needs many more products where
    the spectrum has no gap; both share the cost of a product.

    Args:
        operator: the matrix.
        size: P.
        generator: a CPU generator, for the start vector.
        max_iterations: products at most.
        tolerance: relative residual at which to stop.
    """
    require(size >= 1, "size", "1 or more", size)
    vector = torch.randn(size, generator=generator, dtype=dtype).to(device)
    basis = [vector / vector.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    for iteration in range(1, min(max_iterations, size) + 1):
        image = operator(basis[-1])
        alphas.append(float(image @ basis[-1]))
        stacked = torch.stack(basis)
        for _ in range(2):  # twice is enough (Parlett 1998, section 6.9)
            image = image - stacked.T @ (stacked @ image)
        beta = float(image.norm())
        off_diagonal = torch.tensor(betas, dtype=torch.float64)
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            tridiagonal += torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1)
        values, vectors = torch.linalg.eigh(tridiagonal)
        value, residual = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        done = residual <= tolerance * abs(value) or beta == 0.0
        if done or iteration == min(max_iterations, size):
            top = stacked.T @ vectors[:, -1].to(stacked)
            return TopEigenvalue(value, residual, iteration, done, top / top.norm())
        betas.append(beta)
        basis.append(image / beta)
    raise AssertionError("unreachable: the last iteration returns")


@dataclass(frozen=True)
class TraceEstimate:
    """A trace by random probes.

    Attributes:
        value: mean over the probes.
        standard_error: of that mean; NaN for a single probe.
        probes: how many.
    """

    value: float
    standard_error: float
    probes: int


def hutchinson_trace(
    operator: Operator,
    size: int,
    *,
    probes: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> TraceEstimate:
    """``Tr A = E[z^T A z]`` over random signs z, a fixed number of probes.

    Stopping when the running mean rests for one probe, as is often done, can stop by luck.
    """
    require(probes >= 1, "probes", "1 or more", probes)
    samples = []
    for _ in range(probes):
        signs = torch.randint(0, 2, (size,), generator=generator).mul(2).sub(1).to(device=device, dtype=dtype)
        samples.append(float(signs @ operator(signs)))
    values = torch.tensor(samples, dtype=torch.float64)
    error = float(values.std() / math.sqrt(probes)) if probes > 1 else math.nan
    return TraceEstimate(float(values.mean()), error, probes)


def _or_zero(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor
