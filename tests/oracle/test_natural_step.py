"""Natural-gradient steps against dense Fisher matrices built sample by sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense_core.purify.natural_step import Damping, head_step, sample_weights, true_head_step
from defense_core.purify.ngf_block import _gram


def problem(count: int = 7, features: int = 5, classes: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    H = torch.randn(count, features, generator=generator, dtype=torch.float64)
    H = F.pad(H, (0, 1), value=1.0)
    p = torch.randn(count, classes, generator=generator, dtype=torch.float64).softmax(1)
    Y = F.one_hot(torch.randint(0, classes, (count,), generator=generator), classes).double()
    return H, p, p - Y


def dense(gradients: list[Tensor]) -> Tensor:
    """(1/N) sum_n g_n g_n^T, by a loop."""
    size = gradients[0].numel()
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for gradient in gradients:
        matrix += torch.outer(gradient.flatten(), gradient.flatten())
    return matrix / len(gradients)


@pytest.mark.parametrize("damping", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_gram_identity_equals_the_dense_solve(count: int, damping: float) -> None:
    H, _, E = problem(count)
    gradients = [torch.outer(e, h) for e, h in zip(E, H, strict=True)]
    fisher = dense(gradients)
    ridge = Damping(damping).ridge(fisher.trace(), count)
    mean = torch.stack(gradients).mean(0)
    identity = torch.eye(len(fisher), dtype=torch.float64)
    expected = torch.linalg.solve(fisher + ridge * identity, mean.flatten()).view_as(mean)
    torch.testing.assert_close(head_step(H, E, damping=Damping(damping)), expected, atol=1e-9, rtol=1e-9)


def test_gram_identity_with_a_regulariser() -> None:
    H, _, E = problem()
    generator = torch.Generator().manual_seed(1)
    curvature = torch.rand(3, 6, generator=generator, dtype=torch.float64)
    residual = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    gradients = [torch.outer(e, h) for e, h in zip(E, H, strict=True)]
    fisher = dense(gradients)
    ridge = Damping(0.1).ridge(fisher.trace(), len(H))
    right = torch.stack(gradients).mean(0) + residual
    matrix = fisher + torch.diag(curvature.flatten()) + ridge * torch.eye(len(fisher), dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right.flatten()).view_as(right)
    got = head_step(H, E, damping=Damping(0.1), curvature=curvature, residual=residual)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=1e-10)


def test_regulariser_of_no_weight_changes_nothing() -> None:
    H, _, E = problem()
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    with_it = head_step(H, E, damping=Damping(0.1), curvature=zeros, residual=zeros)
    torch.testing.assert_close(with_it, head_step(H, E, damping=Damping(0.1)), atol=1e-10, rtol=1e-8)


def test_sample_weights_of_any_gradients() -> None:
    generator = torch.Generator().manual_seed(2)
    G = torch.randn(9, 30, generator=generator, dtype=torch.float64)
    weights = sample_weights(G @ G.T, damping=Damping(0.01))
    fisher = dense(list(G))
    ridge = Damping(0.01).ridge(fisher.trace(), 9)
    expected = torch.linalg.solve(fisher + ridge * torch.eye(30, dtype=torch.float64), G.mean(0))
    torch.testing.assert_close(G.T @ weights, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_inner_products_of_a_linear_layers_gradients(part: str) -> None:
    layer = nn.Linear(5, 3)
    inputs, slope = torch.randn(7, 5), torch.randn(7, 3)
    rows = [
        torch.autograd.grad((layer(x) * s).sum(), getattr(layer, part))[0] for x, s in zip(inputs, slope, strict=True)
    ]
    wanted = torch.stack([torch.stack([(one * other).sum() for other in rows]) for one in rows])
    torch.testing.assert_close(_gram(layer, part, inputs, slope), wanted)


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("settings", [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_inner_products_of_a_convolutions_gradients(part: str, settings: dict[str, int], even: bool) -> None:
    """Also where the slope is the same at every place, as in front of a mean over them."""
    layer = nn.Conv2d(4, 6, 3, **settings)
    inputs = torch.randn(5, 4, 8, 7)
    outputs = layer(inputs)
    slope = torch.randn_like(outputs)
    if even:
        slope = slope[:, :, :1, :1].expand_as(slope).contiguous()
    rows = [
        torch.autograd.grad((layer(x[None]) * s).sum(), getattr(layer, part))[0]
        for x, s in zip(inputs, slope, strict=True)
    ]
    wanted = torch.stack([torch.stack([(one * other).sum() for other in rows]) for one in rows])
    torch.testing.assert_close(_gram(layer, part, inputs, slope), wanted, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("regularised", [False, True])
def test_conjugate_gradients_solve_the_true_fisher(regularised: bool) -> None:
    H, p, E = problem()
    count, classes = p.shape
    fisher = torch.zeros(classes * 6, classes * 6, dtype=torch.float64)
    for row in range(count):  # E over the model's own labels of grad grad^T
        for label in range(classes):
            error = p[row] - F.one_hot(torch.tensor(label), classes)
            gradient = torch.outer(error, H[row]).flatten()
            fisher += p[row, label] * torch.outer(gradient, gradient) / count
    right = E.T @ H / count
    curvature = torch.full((3, 6), 0.3, dtype=torch.float64) if regularised else None
    ridge = Damping(0.1).ridge(fisher.trace(), min(count * classes, right.numel()))
    added = 0.3 if regularised else 0.0
    identity = torch.eye(len(fisher), dtype=torch.float64)
    expected = torch.linalg.solve(fisher + (ridge + added) * identity, right.flatten()).view_as(right)
    got = true_head_step(H, p, right, damping=Damping(0.1), curvature=curvature)
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-7)


def test_no_gradient_no_step() -> None:
    H, p, _ = problem()
    nothing = torch.zeros(3, 6, dtype=torch.float64)
    assert not true_head_step(H, p, nothing, damping=Damping(0.1)).any()
    assert not head_step(H, torch.zeros_like(p), damping=Damping(0.1)).any()


def test_large_damping_is_plain_gradient_descent() -> None:
    H, _, E = problem()
    step = head_step(H, E, damping=Damping(1e9))
    gradient = E.T @ H / len(H)
    torch.testing.assert_close(step / step.norm(), gradient / gradient.norm(), atol=1e-7, rtol=1e-7)


def test_damping_never_falls_below_the_first_batchs() -> None:
    damping = Damping(0.1)
    assert float(damping.ridge(torch.tensor(8.0), 4)) == pytest.approx(0.2)
    assert float(damping.ridge(torch.tensor(1e-9), 4)) == pytest.approx(0.2)
    assert float(damping.ridge(torch.tensor(80.0), 4)) == pytest.approx(2.0)
    assert float(damping.first) == 2.0


def test_steps_do_not_grow_where_the_loss_vanishes() -> None:
    H, _, E = problem()
    damping = Damping(0.1)
    first = head_step(H, E, damping=damping).norm()
    assert head_step(H, E * 1e-6, damping=damping).norm() < 1e-4 * first
    assert head_step(H, E * 1e-6, damping=Damping(0.1)).norm() > 1e4 * first
