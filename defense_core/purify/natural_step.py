"""Damped natural-gradient steps ``(F + damping I)^-1 r``, exact, for the shapes that NGF meets.

The empirical Fisher matrix of N samples is ``F = (1/N) sum_n g_n g_n^T``, of rank N at most, so
by Woodbury a step costs one N x N solve with the Gram matrix ``G G^T`` of the sample gradients:
``(F + damping I)^-1 gbar = (1/N) G^T (G G^T / N + damping I)^-1 1``, for ``gbar = G^T 1 / N``.
Everything is solved in float64, since the damping is small beside the leading eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Damping:
    """How much is added to F's diagonal: a multiple of the mean of F's nonzero eigenvalues.

    Not less than at the first batch. As the loss goes to 0 so does F, and steps that were damped by F alone would grow
    without bound.

    Args:
        relative: the multiple, positive.

    Attributes:
        first: the first batch's mean eigenvalue, float64 scalar on the CPU, 0 before it; what a checkpoint keeps.
    """

    def __init__(self, relative: float) -> None:
        self.relative = relative
        self.first = torch.zeros((), dtype=torch.float64)

    def ridge(self, trace: Tensor, rank: int) -> Tensor:
        """What is added to a matrix of this trace and rank: float64 scalar, never quite 0."""
        mean = trace.detach().double() / rank
        if not self.first:
            self.first.copy_(mean)
        return self.relative * torch.maximum(mean, self.first.to(mean.device)) + 1e-12


def sample_weights(gram: Tensor, *, damping: Damping) -> Tensor:
    """Weights ``a`` with which sample gradients add up to the natural step: ``step = sum_n a_n g_n``.

    Args:
        gram: ``G G^T``, (N, N).
        damping: of F's N leading eigenvalues, whose mean is ``tr(G G^T) / N^2``.

    Returns:
        (N,), ``(1/N) (G G^T / N + damping I)^-1 1``, dtype of ``gram``.
    """
    count = len(gram)
    scaled = gram.double() / count
    ridge = damping.ridge(scaled.diagonal().sum(), count)
    matrix = scaled + ridge * torch.eye(count, dtype=torch.float64, device=gram.device)
    ones = torch.ones(count, 1, dtype=torch.float64, device=gram.device)
    return (torch.cholesky_solve(ones, torch.linalg.cholesky(matrix)).squeeze(1) / count).to(gram)


def head_step(
    features: Tensor,
    errors: Tensor,
    *,
    damping: Damping,
    curvature: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Natural step of a linear classifier under the empirical Fisher.

    The gradient of sample n is ``e_n h_n^T``, so the Gram matrix is ``(E E^T) * (H H^T)``. With a
    regulariser of diagonal curvature ``C`` the step is ``(F + C + lambda I)^-1 (gbar + residual)``;
    without ``C`` in the solve it would be unstable as soon as the loss, and with it F, is small.

    Args:
        features: H, (N, D), a last column of ones where the classifier has a bias.
        errors: E, (N, K): gradient of each sample's loss at the logits.
        damping: as for :func:`sample_weights`.
        curvature: C, (K, D), 0 or more.
        residual: (K, D), the regulariser's gradient; given with ``curvature``.

    Returns:
        (K, D), float64.
    """
    H, E = features.double(), errors.double()
    gram = (E @ E.T) * (H @ H.T)
    if curvature is None or residual is None:
        return (E * sample_weights(gram, damping=damping).unsqueeze(1)).T @ H
    count = len(H)
    ridge = damping.ridge(gram.diagonal().sum() / count, count)
    inverse = 1 / (curvature.double() + ridge)
    matrix = count * torch.eye(count, dtype=torch.float64, device=H.device)
    for column, weights in zip(E.T, inverse, strict=True):
        matrix += torch.outer(column, column) * ((H * weights) @ H.T)
    first = inverse * (E.T @ H / count + residual.double())
    along = ((E @ first) * H).sum(1, keepdim=True)
    return first - inverse * ((E * torch.cholesky_solve(along, torch.linalg.cholesky(matrix))).T @ H)


def true_head_step(
    features: Tensor,
    probabilities: Tensor,
    gradient: Tensor,
    *,
    damping: Damping,
    curvature: Tensor | None = None,
    iterations: int = 50,
) -> Tensor:
    """Natural step of a softmax classifier under the true Fisher, by conjugate gradients.

    ``F v = (1/N) sum_n (diag(p_n) - p_n p_n^T) (V h_n) h_n^T``: the model's own labels instead
    of the given ones.

    Args:
        features: H, (N, D).
        probabilities: softmax outputs, (N, K).
        gradient: (K, D), any right-hand side.
        damping: of the mean eigenvalue ``tr F / min(N K, D K)``.
        curvature: (K, D), added to F; see :func:`head_step`.
        iterations: at most so many products; ends at a relative residual of 1e-10.

    Returns:
        (K, D), float64.
    """
    H, p, right = features.double(), probabilities.double(), gradient.double()
    count = len(H)
    trace = ((p * (1 - p)).sum(1) * H.square().sum(1)).sum() / count
    ridge = damping.ridge(trace, min(count * p.shape[1], right.numel()))

    diagonal = ridge if curvature is None else ridge + curvature.double()

    def product(vector: Tensor) -> Tensor:
        along = H @ vector.T
        curved = p * along - p * (p * along).sum(1, keepdim=True)
        return curved.T @ H / count + diagonal * vector

    solution = torch.zeros_like(right)
    left = right.clone()
    direction = left.clone()
    size = left.square().sum()
    stop = 1e-20 * size
    for _ in range(iterations):
        if not size > stop:  # also where the right-hand side is 0
            break
        image = product(direction)
        length = size / (direction * image).sum()
        solution += length * direction
        left -= length * image
        size, before = left.square().sum(), size
        direction = left + size / before * direction
    return solution
