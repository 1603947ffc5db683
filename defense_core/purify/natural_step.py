"""Damped natural-gradient steps ``(F + damping I)^-1 r``, exact, for the shapes that NGF meets.

The empirical Fisher matrix of N samples is ``F = (1/N) sum_n g_n g_n^T``, of rank N at most, so
by Woodbury a step costs one N x N solve with the Gram matrix ``G G^T`` of the sample gradients:
``(F + damping I)^-1 gbar = (1/N) G^T (G G^T / N + damping I)^-1 1``, for ``gbar = G^T 1 / N``.
Everything is solved in float64, since the damping is small beside the leading eigenvalues.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_weights(gram: Tensor, *, damping: float) -> Tensor:
    """Weights ``a`` with which sample gradients add up to the natural step: ``step = sum_n a_n g_n``.

    Args:
        gram: ``G G^T``, (N, N).
        damping: relative to the mean of F's N leading eigenvalues, ``tr(G G^T) / N^2``.

    Returns:
        (N,), ``(1/N) (G G^T / N + damping I)^-1 1``, dtype of ``gram``.
    """
    count = len(gram)
    scaled = gram.double() / count
    ridge = absolute_damping(scaled.diagonal().sum(), count, damping)
    matrix = scaled + ridge * torch.eye(count, dtype=torch.float64, device=gram.device)
    ones = torch.ones(count, 1, dtype=torch.float64, device=gram.device)
    return (torch.cholesky_solve(ones, torch.linalg.cholesky(matrix)).squeeze(1) / count).to(gram)


def absolute_damping(trace: Tensor, rank: int, relative: float) -> Tensor:
    """``relative`` times the mean nonzero eigenvalue, and never quite 0."""
    return relative * trace.double() / rank + 1e-12


def head_step(
    features: Tensor,
    errors: Tensor,
    *,
    damping: float,
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
        damping: relative; see :func:`sample_weights`.
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
    ridge = absolute_damping(gram.diagonal().sum() / count, count, damping)
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
    damping: float,
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
        damping: relative to ``tr F / min(N K, D K)``.
        curvature: (K, D), added to F; see :func:`head_step`.
        iterations: at most so many products; ends at a relative residual of 1e-10.

    Returns:
        (K, D), float64.
    """
    H, p, right = features.double(), probabilities.double(), gradient.double()
    count = len(H)
    trace = ((p * (1 - p)).sum(1) * H.square().sum(1)).sum() / count
    ridge = absolute_damping(trace, min(count * p.shape[1], right.numel()), damping)

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
