"""Fisher, Hessian and natural gradient against loops over samples, dense matrices and curvlinops."""

from __future__ import annotations

import itertools
import warnings

import numpy
import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.curvature import fisher_diagonal, fisher_rows, fisher_trace, natural_gradient, random_sign_trace
from defense_core.errors import ConfigError
from defense_core.per_sample import samples_apart, samples_at_once
from defense_core.spectrum import hessian, hutchinson_trace, top_eigenvalue
from defense_core.task import ImageClassification

CLASSES = 3
losses = ImageClassification((1, 8, 8), CLASSES, (0.5,), (0.5,)).losses


class Branched(nn.Module):
    """Everything that a layer rule can get wrong: groups, stride, dilation, in-place, tied and unnamed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=2, dilation=2)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.grouped = nn.Conv2d(4, 4, (3, 1), groups=2, bias=False)
        self.same = nn.Conv2d(4, 4, (3, 2), padding="same", dilation=2)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))
        self.tied = nn.Linear(4, 4)
        self.hidden = nn.Linear(4, 4)
        self.hidden.weight = self.tied.weight
        self.functional = nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.same(self.grouped(self.relu(self.norm(self.first(images)))))
        x = self.mirrored(x).mean((2, 3)) * self.scale
        x = self.hidden(torch.tanh(self.tied(self.twice(torch.tanh(self.twice(x))))))
        return self.functional(x) + nn.functional.linear(x, self.functional.weight)


def network(kind: str) -> nn.Module:
    """A small network with statistics and weights that are nobody's defaults."""
    torch.manual_seed(0)
    if kind == "cnn":
        model = build("small_cnn", {"width": 2, "in_channels": 1, "num_classes": CLASSES})
    elif kind == "vit":
        arguments = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2, "num_classes": CLASSES}
        model = build("vit_tiny", {**arguments, "in_channels": 1})
    else:
        model = Branched()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(generator=generator)
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0, generator=generator)
    return model.train()


def samples(count: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.arange(count) % CLASSES


def looped_diagonal(model: nn.Module, inputs: Tensor, targets: Tensor, kind: str) -> dict[str, Tensor]:
    """Sample by sample, label by label, eval mode: the definition."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(value) for name, value in named.items()}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for sample, target in zip(inputs, targets, strict=True):
        log_p = model(sample.unsqueeze(0)).log_softmax(1)[0]
        labels = [int(target)] if kind == "empirical" else range(CLASSES)
        for label in labels:
            weight = 1.0 if kind == "empirical" else float(log_p[label].exp())
            gradients = torch.autograd.grad(log_p[label], list(named.values()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(named, gradients, strict=True):
                if gradient is not None:
                    total[name] += weight * gradient.square()
    for module, mode in modes:
        module.training = mode
    return {name: value / len(inputs) for name, value in total.items()}


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


@pytest.mark.parametrize(("kind", "by_layer"), itertools.product(("empirical", "true"), (True, False)))
@pytest.mark.parametrize("name", ["cnn", "vit", "branched"])
def test_diagonal_is_that_of_the_loop(name: str, kind: str, by_layer: bool) -> None:
    model, (inputs, targets) = network(name), samples()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    got = fisher_diagonal(
        model, inputs, targets, losses=losses, kind=kind, num_classes=CLASSES, chunk_size=4, by_layer=by_layer
    )
    want = looped_diagonal(model, inputs, targets, kind)
    assert list(got) == list(want)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=2e-4, atol=1e-6 * float(flat(want).max()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("allowed", [True, False])
def test_samples_apart_allows_no_tf32_and_gives_back_what_was_set(
    allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    with samples_apart(network("cnn")):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32 is allowed


def test_rules_cover_ordinary_layers_and_leave_out_what_they_cannot_see() -> None:
    from defense_core import per_sample

    inputs, targets = samples()
    for name, left_out in (("cnn", set()), ("vit", {"cls_token", "pos_embed"})):
        model = network(name)
        names = [key for key, _ in model.named_parameters()]
        owners = per_sample._owners(model, names)
        with samples_apart(model):
            kept = per_sample._trustworthy(model, owners, (inputs, targets, torch.ones(len(inputs))), losses)
        assert set(names) - set(kept) == left_out
    model = network("branched")
    owners = per_sample._owners(model, [key for key, _ in model.named_parameters()])
    with samples_apart(model):
        kept = per_sample._trustworthy(model, owners, (inputs, targets, torch.ones(len(inputs))), losses)
    ruled = {"first.weight", "first.bias", "norm.weight", "grouped.weight", "same.weight", "same.bias"}
    assert ruled | {"functional.bias"} <= set(kept)
    assert not {"twice.weight", "tied.weight", "functional.weight"} & set(kept)


@pytest.mark.parametrize("kind", ["empirical", "true"])
def test_trace_is_the_sum_of_the_diagonal_and_of_squared_row_norms(kind: str) -> None:
    model, (inputs, targets) = network("cnn"), samples()
    arguments = {"losses": losses, "kind": kind, "num_classes": CLASSES}
    want = float(flat(looped_diagonal(model, inputs, targets, kind)).sum())
    assert fisher_trace(model, inputs, targets, **arguments) == pytest.approx(want, rel=1e-4)
    rows = fisher_rows(model, inputs, targets, **arguments)
    assert float(rows.square().sum()) == pytest.approx(want, rel=1e-4)


def test_random_signs_are_unbiased_and_the_squared_mean_gradient_is_not() -> None:
    model, (inputs, targets) = network("cnn"), samples(6)
    parameters = list(model.parameters())
    with samples_apart(model):
        sample_losses = losses(model(inputs), targets)
    exact = fisher_trace(model, inputs, targets, losses=losses)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [random_sign_trace(sample_losses, parameters, generator=generator).detach() for _ in range(300)]
    )
    error = float(draws.std() / 300**0.5)
    assert abs(float(draws.mean()) - exact) < 4 * error
    assert error < 0.1 * exact  # otherwise the line above would accept anything
    mean_gradient = torch.autograd.grad(sample_losses.mean(), parameters)
    squared = float(sum(gradient.square().sum() for gradient in mean_gradient))
    assert abs(squared - exact) > 0.3 * exact


def test_every_sign_pattern_together_gives_the_trace_and_its_gradient_exactly() -> None:
    """The mean over all 2^N patterns is the expectation; its gradient is that of the exact trace."""
    model, (inputs, targets) = network("cnn").double(), samples(4)
    inputs = inputs.double()
    parameters = list(model.parameters())

    class Patterns:
        """Hands out one pattern after the other in place of a generator's draws."""

        def __init__(self) -> None:
            self.left = iter(itertools.product((0, 1), repeat=4))

        def __call__(self, *_: object, **__: object) -> Tensor:
            return torch.tensor(next(self.left))

    with samples_apart(model), pytest.MonkeyPatch.context() as patch:
        sample_losses = losses_in_double(model(inputs), targets)
        patch.setattr(torch, "randint", Patterns())
        trace = random_sign_trace(sample_losses, parameters, generator=torch.Generator(), draws=16)
    with samples_apart(model):
        separate = [torch.autograd.grad(loss, parameters, create_graph=True) for loss in sample_losses]
    exact = sum(gradient.square().sum() for row in separate for gradient in row) / len(inputs)
    torch.testing.assert_close(trace, exact, rtol=1e-9, atol=0)
    got, want = torch.autograd.grad(trace, parameters, retain_graph=True), torch.autograd.grad(exact, parameters)
    for left, right in zip(got, want, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-7, atol=1e-10)


def losses_in_double(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def dense_hessian(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())
    shapes = [value.shape for value in parameters.values()]

    def loss(vector: Tensor) -> Tensor:
        blocks = vector.split([shape.numel() for shape in shapes])
        named = {key: block.view(shape) for key, block, shape in zip(parameters, blocks, shapes, strict=True)}
        return losses_in_double(torch.func.functional_call(model, {**named, **buffers}, (inputs,)), targets).mean()

    with samples_apart(model):
        return torch.autograd.functional.hessian(loss, flat(parameters))


def test_hessian_products_eigenvalue_and_trace_are_those_of_the_dense_matrix() -> None:
    model, (inputs, targets) = network("cnn").double(), samples()
    inputs = inputs.double()
    matrix = dense_hessian(model, inputs, targets)
    product, size = hessian(model, inputs, targets, losses=losses_in_double)
    assert size == len(matrix)
    vector = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(product(vector), matrix @ vector, rtol=1e-8, atol=1e-10)
    generator = torch.Generator().manual_seed(4)
    top = top_eigenvalue(product, size, generator=generator, dtype=torch.float64, tolerance=1e-8)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    assert top.converged
    assert top.value == pytest.approx(largest, rel=1e-6)
    assert float((matrix @ top.vector - top.value * top.vector).norm()) == pytest.approx(top.residual, abs=1e-8)
    trace = hutchinson_trace(product, size, probes=200, generator=generator, dtype=torch.float64)
    assert abs(trace.value - float(matrix.trace())) < 4 * trace.standard_error
    assert trace.probes == 200


def test_lanczos_takes_the_largest_signed_eigenvalue_and_says_when_it_did_not_converge() -> None:
    diagonal = torch.cat([torch.tensor([-100.0, 7.0]), torch.linspace(0, 5, 98)])
    found = top_eigenvalue(lambda v: diagonal * v, 100, generator=torch.Generator().manual_seed(0))
    assert found.converged
    assert found.value == pytest.approx(7.0, rel=1e-3)
    hurried = top_eigenvalue(lambda v: diagonal * v, 100, generator=torch.Generator().manual_seed(0), max_iterations=3)
    assert not hurried.converged
    assert hurried.iterations == 3
    zero = top_eigenvalue(torch.zeros_like, 5, generator=torch.Generator().manual_seed(0))
    assert (zero.value, zero.converged, zero.iterations) == (0.0, True, 1)


def test_one_probe_has_no_standard_error() -> None:
    estimate = hutchinson_trace(lambda v: 2 * v, 5, probes=1, generator=torch.Generator())
    assert estimate.value == 10.0
    assert numpy.isnan(estimate.standard_error)


@pytest.mark.parametrize("kind", ["empirical", "true"])
@pytest.mark.parametrize("names", [None, ["linear.weight", "linear.bias"]])
def test_natural_gradient_solves_the_dense_system(kind: str, names: list[str] | None) -> None:
    """Both spaces: 9 rows against a whole network, and 27 rows against one layer."""
    model, (inputs, targets) = network("cnn"), samples()
    rows = fisher_rows(model, inputs, targets, losses=losses, kind=kind, num_classes=CLASSES, names=names).double()
    gradient = torch.randn(rows.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    for damping in (1e-6, 1e-1):
        dense = rows.T @ rows + damping * torch.eye(rows.shape[1], dtype=torch.float64)
        got = natural_gradient(rows, gradient, damping=damping)
        torch.testing.assert_close(got, torch.linalg.solve(dense, gradient), rtol=1e-6, atol=1e-9 / damping)
    pair = torch.stack([gradient, -gradient], dim=1)
    torch.testing.assert_close(natural_gradient(rows, pair, damping=0.1)[:, 1], -got)


def test_fisher_and_hessian_are_those_of_curvlinops() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import curvlinops
    model, (inputs, targets) = network("cnn").eval(), samples()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    data = [(inputs, targets)]
    loss = nn.CrossEntropyLoss()
    size = sum(parameter.numel() for parameter in parameters)
    identity = torch.eye(size)
    for kind, operator in (("empirical", curvlinops.EFLinearOperator), ("true", curvlinops.GGNLinearOperator)):
        rows = fisher_rows(model, inputs, targets, losses=losses, kind=kind, num_classes=CLASSES)
        matrix = operator(model, loss, parameters, data) @ identity
        torch.testing.assert_close(rows.T @ rows, matrix, rtol=1e-3, atol=1e-5 * float(matrix.abs().max()))
    product, _ = hessian(model, inputs, targets, losses=losses)
    vector = torch.randn(size, generator=torch.Generator().manual_seed(6))
    want = curvlinops.HessianLinearOperator(model, loss, parameters, data) @ vector
    torch.testing.assert_close(product(vector), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("shape", "count"), [((3, 32, 32), 32), ((1, 8, 8), 128), ((3, 224, 224), 8), ((7,), 128), ((), 128)]
)
def test_small_samples_come_in_large_chunks(shape: tuple[int, ...], count: int) -> None:
    assert samples_at_once(torch.zeros(2, *shape)) == count


def test_bad_inputs_are_refused() -> None:
    model, (inputs, targets) = network("cnn"), samples()
    with pytest.raises(ConfigError, match="at least 2 classes"):
        fisher_diagonal(model, inputs, targets, losses=losses, kind="true")
    with pytest.raises(ConfigError, match="unknown"):
        fisher_diagonal(model, inputs, targets, losses=losses, names=["conv9.weight"])
    with pytest.raises(ConfigError, match="at least one sample"):
        fisher_diagonal(model, inputs[:0], targets[:0], losses=losses)
    with pytest.raises(ConfigError, match="damping"):
        natural_gradient(torch.ones(2, 3), torch.ones(3), damping=0.0)
    stateless = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64, track_running_stats=False), nn.Linear(64, CLASSES))
    with pytest.raises(ConfigError, match="running statistics"):
        fisher_trace(stateless, inputs, targets, losses=losses)
    assert stateless.training


def test_modes_and_hooks_are_restored_when_the_network_fails() -> None:
    model = network("cnn")
    with pytest.raises(RuntimeError):
        fisher_diagonal(model, torch.randn(3, 7, 8, 8), torch.zeros(3, dtype=torch.int64), losses=losses)
    assert all(module.training and not module._forward_hooks for module in model.modules())
