"""The gradient-norm step against its equation, by automatic differentiation and by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.gradient_steps import LossOf, gradient_norm_step, plain_step


def smooth_network() -> nn.Module:
    """A tiny double-precision network with three derivatives everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def normalised_network() -> nn.Module:
    """The same idea with BatchNorm, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        layers = (nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
        return nn.Sequential(*layers).double().train()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(12, 5, generator=generator, dtype=torch.float64), torch.randint(0, 3, (12,), generator=generator)


def loss_of(model: nn.Module) -> LossOf:
    inputs, targets = batch()
    return lambda: F.cross_entropy(model(inputs), targets)


def stepped(model: nn.Module, **settings: object) -> list[Tensor]:
    """Gradients that the step leaves in the parameters."""
    gradient_norm_step(**settings)(model, loss_of(model))  # type: ignore[arg-type]
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def exact_gradient(model: nn.Module, penalty: float, *, per_tensor: bool) -> list[Tensor]:
    """``g + penalty * H u`` with ``u = g / ||g||``, by a Hessian-vector product."""
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss_of(model)(), parameters, create_graph=True)
    fixed = [each.detach() for each in gradient]
    norm = torch.sqrt(sum((each**2).sum() for each in fixed))  # type: ignore[call-overload]
    direction = [each / (each.norm() if per_tensor else norm) for each in fixed]
    product = torch.autograd.grad(gradient, parameters, grad_outputs=direction)
    return [g + penalty * h for g, h in zip(fixed, product, strict=True)]


@pytest.mark.parametrize("normalisation", ["global", "per_tensor"])
@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
def test_finite_difference_tends_to_the_hessian_vector_product(alpha: float, normalisation: str) -> None:
    errors = []
    for radius in (1e-2, 1e-3, 1e-4):
        model = smooth_network()
        # alpha = lambda / r, so the penalty that belongs to this step is alpha * r.
        exact = flat(exact_gradient(model, alpha * radius, per_tensor=normalisation == "per_tensor"))
        plain = flat(exact_gradient(model, 0.0, per_tensor=False))
        stepped_to = flat(stepped(model, radius=radius, alpha=alpha, normalisation=normalisation))
        errors.append(float((stepped_to - exact).norm() / (exact - plain).norm()))
    # A forward difference: the relative error of the added term falls in proportion to r.
    assert errors[-1] < 1e-3
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.2)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.2)


def test_the_added_term_is_the_gradient_of_the_gradient_norm() -> None:
    model = smooth_network()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(loss_of(model)(), parameters, create_graph=True)
    norm = torch.sqrt(sum((each**2).sum() for each in gradient))  # type: ignore[call-overload]
    of_norm = flat(list(torch.autograd.grad(norm, parameters)))
    radius, alpha = 1e-4, 0.7
    added = flat(stepped(model, radius=radius, alpha=alpha, normalisation="global")) - flat(
        [each.detach() for each in gradient]
    )
    assert torch.allclose(added / (alpha * radius), of_norm, rtol=1e-3, atol=1e-5)


def hand_written_sam(model: nn.Module, radius: float) -> list[Tensor]:
    """Foret et al. 2021, eq. 2-3: the gradient at ``w + radius * g / ||g||``."""
    twin = copy.deepcopy(model)
    parameters = list(twin.parameters())
    gradient = torch.autograd.grad(loss_of(twin)(), parameters)
    norm = torch.linalg.vector_norm(torch.stack([each.norm() for each in gradient]))
    with torch.no_grad():
        for parameter, each in zip(parameters, gradient, strict=True):
            parameter.add_(each * (radius / norm))
    return list(torch.autograd.grad(loss_of(twin)(), parameters))


@pytest.mark.parametrize("make", [smooth_network, normalised_network])
@pytest.mark.parametrize("radius", [0.05, 0.5, 2.0])
def test_alpha_one_is_sam(make: Callable[[], nn.Module], radius: float) -> None:
    model = make()
    expected = hand_written_sam(model, radius)
    got = stepped(model, radius=radius, alpha=1.0, normalisation="global")
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("make", [smooth_network, normalised_network])
@pytest.mark.parametrize("normalisation", ["global", "per_tensor"])
def test_alpha_zero_is_the_plain_step(make: Callable[[], nn.Module], normalisation: str) -> None:
    model, twin = make(), make()
    got = stepped(model, radius=0.5, alpha=0.0, normalisation=normalisation)
    plain_step(twin, loss_of(twin))
    for one, other in zip(got, twin.parameters(), strict=True):
        assert other.grad is not None
        assert torch.equal(one, other.grad)


def test_alpha_mixes_the_two_gradients() -> None:
    first = stepped(smooth_network(), radius=0.5, alpha=0.0, normalisation="global")
    second = stepped(smooth_network(), radius=0.5, alpha=1.0, normalisation="global")
    mixed = stepped(smooth_network(), radius=0.5, alpha=0.3, normalisation="global")
    for one, other, both in zip(first, second, mixed, strict=True):
        assert torch.allclose(both, 0.7 * one + 0.3 * other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("normalisation", ["global", "per_tensor"])
@pytest.mark.parametrize("make", [smooth_network, normalised_network])
def test_weights_are_back_bit_for_bit(make: Callable[[], nn.Module], normalisation: str) -> None:
    model = make().float()
    inputs, targets = batch()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = gradient_norm_step(radius=0.37, alpha=0.7, normalisation=normalisation)  # type: ignore[arg-type]
    step(model, lambda: F.cross_entropy(model(inputs.float()), targets))
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert parameter.detach().numpy().tobytes() == old.numpy().tobytes()


@pytest.mark.parametrize(("normalisation", "expected"), [("global", 0.5), ("per_tensor", 0.5 * 6**0.5)])
def test_length_of_the_ascent(normalisation: str, expected: float) -> None:
    """Global: the whole step is ``radius`` long. Per tensor: each of the six tensors moves by ``radius``."""
    model = smooth_network()
    before = flat([parameter.detach().clone() for parameter in model.parameters()])
    seen: list[Tensor] = []
    inner = loss_of(model)

    def watched() -> Tensor:
        seen.append(flat([parameter.detach().clone() for parameter in model.parameters()]))
        return inner()

    gradient_norm_step(radius=0.5, alpha=0.7, normalisation=normalisation)(model, watched)  # type: ignore[arg-type]
    assert len(seen) == 2
    assert torch.equal(seen[0], before)
    assert float((seen[1] - before).norm()) == pytest.approx(expected, rel=1e-9)


def test_running_statistics_follow_the_unperturbed_pass_once() -> None:
    model, twin = normalised_network(), normalised_network()
    stepped(model, radius=5.0, alpha=0.7, normalisation="global")
    plain_step(twin, loss_of(twin))
    assert int(model[1].num_batches_tracked) == 1  # type: ignore[index]
    assert torch.equal(model[1].running_mean, twin[1].running_mean)  # type: ignore[index]
    assert torch.equal(model[1].running_var, twin[1].running_var)  # type: ignore[index]
    assert model[1].track_running_stats  # type: ignore[index]


def test_the_perturbed_pass_normalises_by_the_batch() -> None:
    # With running statistics in the second pass the gradient would differ from SAM's on the batch.
    model = normalised_network()
    model[1].running_mean.fill_(100.0)  # type: ignore[index]
    twin = normalised_network()
    got = stepped(model, radius=0.5, alpha=1.0, normalisation="global")
    for one, other in zip(got, hand_written_sam(twin, 0.5), strict=True):
        assert torch.equal(one, other)


def test_the_reported_loss_is_the_unperturbed_one() -> None:
    model = smooth_network()
    expected = loss_of(model)().detach()
    reported = gradient_norm_step(radius=2.0, alpha=0.7, normalisation="global")(model, loss_of(model))
    assert torch.equal(reported, expected)
    assert not reported.requires_grad


def test_a_layer_without_gradient_stays_where_it_is() -> None:
    """A fully zeroed layer has a gradient of zero: nothing is divided by it."""
    model = smooth_network()
    with torch.no_grad():
        model[4].weight.zero_()  # type: ignore[index]
        model[2].weight.zero_()  # type: ignore[index]
    for normalisation in ("global", "per_tensor"):
        assert all(bool(g.isfinite().all()) for g in stepped(model, radius=0.5, alpha=0.7, normalisation=normalisation))
        for parameter in model.parameters():
            parameter.grad = None


def test_parameters_that_do_not_take_part_have_no_gradient() -> None:
    model = smooth_network()
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    stepped(model, radius=0.5, alpha=0.7, normalisation="global")
    assert model[0].weight.grad is None  # type: ignore[index]
