"""FIP's objective and Fast FIP's parametrisation against their equations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.curvature import fisher_diagonal
from defense_core.data import CleanSet, Splits, split_clean_set
from defense_core.errors import ConfigError, MethodDiverged, MethodNotApplicable
from defense_core.layers import frozen_statistics
from defense_core.per_sample import per_sample_gradients, samples_apart
from defense_core.progress import NullProgress
from defense_core.purify import Purified, fast_fip, fip, fisher_guided, fisher_terms, tsbd
from defense_core.singular import fold, parametrise, ruled_layers, shift_gradients, shift_layers
from defense_core.task import ImageClassification

METHODS = {row.METHOD.name: row.METHOD for row in (fip, fast_fip)}
TASK = ImageClassification((1, 8, 8), 3, (0.5,), (0.5,), augment="none")
VIT = {
    "image_size": 8,
    "patch_size": 4,
    "dim": 8,
    "depth": 1,
    "heads": 2,
    "num_classes": 3,
    "in_channels": 1,
}


def network(kind: str = "cnn") -> nn.Module:
    torch.manual_seed(0)
    model = build("vit_tiny", VIT) if kind == "vit" else build("small_cnn", {"width": 4, "num_classes": 3})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def clean_set(count: int = 48) -> CleanSet:
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    return CleanSet(images, torch.arange(count) % 3, 3)


def splits(count: int = 48) -> Splits:
    return split_clean_set(clean_set(count), seed=0, select=0.2, report=0.0)


def run(method: str, model: nn.Module, **settings: object) -> Purified:
    row = METHODS[method]
    return row.function(
        model, splits(), row.config(**settings), task=TASK, seed=0, device="cpu", progress=NullProgress()
    )


def test_gradient_of_a_step_is_that_of_the_objective() -> None:
    """The mean over many random signs is the gradient of CE + eta_F k Tr F + retainer."""
    model = network().double().train()
    data = clean_set(6)
    inputs, targets = TASK.inputs(data.images).double(), data.labels
    named = dict(model.named_parameters())
    anchors = {name: value.detach() + 0.1 for name, value in named.items()}
    fisher = {name: torch.rand(value.shape, dtype=torch.float64) for name, value in named.items()}
    eta_f, eta_r, every = 0.02, 0.7, 3

    def losses(outputs: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def trace(network: nn.Module) -> Tensor:
        """Exact, sample by sample."""
        with samples_apart(network):
            rows = [torch.autograd.grad(one, list(named.values()), create_graph=True) for one in losses(model(inputs))]
        return sum(gradient.square().sum() for row in rows for gradient in row) / len(rows)

    def loss_of() -> Tensor:
        with frozen_statistics(model):
            return losses(model(inputs)).mean()

    pull = sum((fisher[name] * (value - anchors[name]).square()).sum() for name, value in named.items())
    for parameter in model.parameters():
        parameter.grad = None
    objective = loss_of() + eta_f * every * trace(model) + eta_r / 2 * pull
    want = torch.autograd.grad(objective, list(named.values()))
    without = torch.autograd.grad(
        loss_of()
        + eta_r / 2 * sum((fisher[name] * (value - anchors[name]).square()).sum() for name, value in named.items()),
        list(named.values()),
    )
    step = fisher_terms.regularised_step(
        eta_f,
        trace,
        every=every,
        max_norm=1e9,
        retain=fisher_terms.retainer(anchors, fisher, eta_r=eta_r, lr=0.01),
        taken=torch.zeros((), dtype=torch.int64),
    )
    for expected in (want, without, without, want):
        model.zero_grad()
        loss = step(model, loss_of)
        torch.testing.assert_close(loss, loss_of().detach())
        for parameter, gradient in zip(named.values(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-10)


def test_trace_gradient_is_clipped_and_the_rest_is_not() -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[100.0, 0.0]])
    fisher_terms.add_clipped(model, (model.weight * torch.tensor([[30.0, 40.0]])).sum(), max_norm=5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[103.0, 4.0]]))
    fisher_terms.add_clipped(model, (model.weight * torch.tensor([[0.3, 0.4]])).sum(), max_norm=5.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[103.3, 4.4]]))


def test_trace_term_estimates_the_exact_trace_of_its_samples() -> None:
    model, data = network().train(), clean_set(12)
    for kind in ("empirical", "true"):
        config = fip.FIPConfig(trace_batch=12, fisher=kind)
        term = fip.trace_term(data, config, task=TASK, generator=torch.Generator().manual_seed(0), device="cpu")
        draws = torch.stack([term(model).detach() for _ in range(200)])
        diagonal = fisher_diagonal(
            model, TASK.inputs(data.images), data.labels, losses=TASK.losses, kind=kind, num_classes=3
        )
        exact = float(sum(value.sum() for value in diagonal.values()))
        error = float(draws.std() / 200**0.5)
        assert abs(float(draws.mean()) - exact) < 4 * error
        assert error < 0.15 * exact
    assert model.training


def test_stiffness_is_capped_at_what_the_rate_can_follow() -> None:
    model = nn.Linear(2, 1, bias=False)
    anchors = {"weight": model.weight.detach() - 1}
    penalty = fisher_terms.retainer(anchors, {"weight": torch.tensor([[1e6, 2.0]])}, eta_r=1.0, lr=0.1)
    penalty(model)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[10.0, 2.0]]))


def test_derived_weights_follow_trace_and_samples_per_class() -> None:
    model = network()
    facts = run("fip", model, start="given", taught_lr=0.0, epochs=1, min_steps=0, lr=0.01, trace_share=0.3).facts
    fit = splits().fit
    diagonal = fisher_diagonal(model, TASK.inputs(fit.images), fit.labels, losses=TASK.losses)
    exact = float(sum(value.sum() for value in diagonal.values()))
    assert facts["trace_before"] == pytest.approx(exact, rel=1e-4)
    assert facts["eta_f"] == pytest.approx(0.3 / exact, rel=1e-4)
    assert facts["eta_r"] == pytest.approx(2.0 * 3 / len(fit))
    given = run("fast_fip", model, epochs=1, min_steps=0, lr=0.01, eta_f=0.5, eta_r=0.25).facts
    assert (given["eta_f"], given["eta_r"]) == (0.5, 0.25)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_shifted_weights_are_the_decomposition(kind: str) -> None:
    """W(delta) = U diag(relu(s + delta)) V^T; zero shifts give the original bytes."""
    original = network(kind)
    model = copy.deepcopy(original)
    layers = shift_layers(model)
    expected = {
        f"{name}.weight" for name, module in original.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    assert {layer.weight_name for layer in layers} == expected
    parametrise(model, layers)
    named = dict(original.named_parameters())
    generator = torch.Generator().manual_seed(3)
    for layer in layers:
        module, weight = model.get_submodule(layer.path), named[layer.weight_name]
        assert torch.equal(getattr(module, layer.part), weight)
        left, values, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        shift = torch.randn(values.shape, generator=generator)
        with torch.no_grad():
            model.get_parameter(layer.shift_name).copy_(shift)
        want = (left @ torch.diag(torch.relu(values + shift)) @ right).view_as(weight)
        torch.testing.assert_close(getattr(module, layer.part), want, rtol=1e-4, atol=1e-5)
        assert {"left", "values", "right"} <= {name for name, _ in layer.spectrum(model).named_buffers()}


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_folded_model_answers_like_the_parametrised_one(kind: str) -> None:
    original = network(kind)
    tuned, folded = copy.deepcopy(original), copy.deepcopy(original)
    layers = shift_layers(tuned)
    parametrise(tuned, layers)
    fold(tuned, layers, folded)
    assert all(torch.equal(value, folded.state_dict()[name]) for name, value in original.state_dict().items())
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        for buffer in (buffer for name, buffer in tuned.named_buffers() if "running_var" in name):
            buffer.mul_(2)
    fold(tuned, layers, folded)
    inputs = TASK.inputs(clean_set(5).images)
    torch.testing.assert_close(folded(inputs), tuned(inputs))
    assert list(folded.state_dict()) == list(original.state_dict())


def test_a_weight_of_negative_zeros_keeps_its_bytes() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight.fill_(-0.0)
    tuned = copy.deepcopy(model)
    layers = shift_layers(tuned)
    parametrise(tuned, layers)
    fold(tuned, layers, model)
    assert torch.signbit(model[1].weight).all()


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_exact_shift_gradients_are_those_of_vmap(kind: str) -> None:
    model = network(kind).train()
    layers = shift_layers(model)
    parametrise(model, layers)
    with torch.no_grad():
        for layer in layers:  # away from zero, some singular values clamped
            values = layer.spectrum(model).values
            model.get_parameter(layer.shift_name).copy_(-1.1 * values * (torch.arange(len(values)) % 3 == 0))
    data = clean_set(5)
    inputs = TASK.inputs(data.images)
    ruled = ruled_layers(model, layers, inputs, data.labels, losses=TASK.losses)
    assert ruled == layers
    rows = shift_gradients(model, ruled, inputs, data.labels, losses=TASK.losses)
    for name, row in rows.items():
        want = per_sample_gradients(model, inputs, data.labels, losses=TASK.losses, names=[name])
        torch.testing.assert_close(row, want, rtol=1e-3, atol=1e-4 * float(want.abs().max()) + 1e-9)
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_gradient_of_the_exact_trace_is_that_of_finite_differences() -> None:
    model = network().double()
    layers = shift_layers(model)
    parametrise(model, layers)
    data = clean_set(4)
    inputs = TASK.inputs(data.images).double()

    def losses(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    def trace() -> Tensor:
        rows = shift_gradients(model, layers, inputs, data.labels, losses=losses, create_graph=True)
        return sum(row.square().sum() for row in rows.values()) / len(inputs)

    shifts = [model.get_parameter(layer.shift_name) for layer in layers]
    gradients = torch.autograd.grad(trace(), shifts)
    for shift, gradient in zip(shifts, gradients, strict=True):
        index = int(gradient.abs().argmax())
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                shift[index] += sign * 1e-5
            values.append(float(trace()))
            with torch.no_grad():
                shift[index] -= sign * 1e-5
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[index]), rel=1e-3)


def test_layers_without_a_rule_fall_back_and_shared_weights_stay() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Conv2d(1, 2, 3, padding=1)
            self.depthwise = nn.Conv2d(2, 2, 3, groups=2)
            self.one, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.other.weight = self.one.weight
            self.twice = nn.Linear(2, 2)
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True)
            self.head = nn.Linear(2, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = torch.relu(self.depthwise(self.plain(images))).mean((2, 3))
            x = self.other(self.one(self.twice(self.twice(x)))).unsqueeze(1)
            return self.head(self.attention(x, x, x)[0].squeeze(1))

    torch.manual_seed(0)
    original = Odd()
    model = copy.deepcopy(original)
    layers = shift_layers(model)
    assert {layer.weight_name for layer in layers} == {
        "plain.weight",
        "depthwise.weight",
        "twice.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "head.weight",
    }
    parametrise(model, layers)
    data = clean_set(8)
    ruled = ruled_layers(model, layers, TASK.inputs(data.images), data.labels, losses=TASK.losses)
    assert [layer.path for layer in ruled] == ["plain", "head"]
    result = run("fast_fip", original, start="given", epochs=1, lr=0.01)
    assert 0 < result.facts["exact"] < result.facts["trained"]
    assert torch.equal(result.model.one.weight, original.one.weight)
    assert not torch.equal(result.model.depthwise.weight, original.depthwise.weight)


@pytest.mark.parametrize("norms", [True, False])
def test_only_shifts_and_norms_move(norms: bool) -> None:
    original = network()
    result = run("fast_fip", original, start="given", epochs=2, lr=0.05, norms=norms)
    after = result.model.state_dict()
    for name, value in original.named_parameters():
        is_norm, is_weight = name.startswith("bn"), name.endswith("weight") and not name.startswith("bn")
        assert torch.equal(value, after[name]) != (is_weight or (is_norm and norms))
    singular_vectors = torch.linalg.svd(original.linear.weight, full_matrices=False)
    turned = singular_vectors.U.T @ after["linear.weight"] @ singular_vectors.Vh.T
    assert float((turned - torch.diag(turned.diag())).abs().max()) < 1e-5
    assert list(after) == list(original.state_dict())
    assert result.facts["exact"] == 4 + 8 + 16 + 3
    assert result.facts["trained"] == 31 + (2 * (4 + 8 + 16) if norms else 0)


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
def test_zeroed_start_is_stage_one_of_tsbd_and_its_fisher_is_taken_there(method: str) -> None:
    model, parts = network(), splits(96)
    still = {"epochs": 1, "min_steps": 0, "taught_lr": 0.0, "lr": 1e-12, "n_factors": (1.0,)}
    config = METHODS[method].config(**still, **{"norms": False} if method == "fast_fip" else {"weight_decay": 0.0})
    result = METHODS[method].function(model, parts, config, task=TASK, seed=0, device="cpu", progress=NullProgress())
    stage_one = tsbd.purify(
        model,
        parts,
        tsbd.TSBDConfig(epochs=0, lr=1.0, batch_size=config.batch_size),
        task=TASK,
        seed=0,
        device="cpu",
        progress=NullProgress(),
    )
    assert any(stage_one.facts["zeroed"].values()), "nothing was zeroed, and nothing is tested"
    assert result.facts["zeroed"] == stage_one.facts["zeroed"]
    after = dict(result.model.named_parameters())
    for name, value in stage_one.model.named_parameters():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-7)
    if method == "fip":
        diagonal = fisher_diagonal(stage_one.model, TASK.inputs(parts.fit.images), parts.fit.labels, losses=TASK.losses)
        exact = float(sum(value.sum() for value in diagonal.values()))
        assert result.facts["trace_before"] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
def test_rate_is_the_largest_whose_expected_drop_is_permitted(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drops = iter([0.0, 0.02, 1.0, 0.0])
    monkeypatch.setattr(fisher_guided, "expected_drop", lambda *_, **__: next(drops))
    grid = (0.001, 0.002, 0.004, 0.008)
    facts = run(method, network(), start="given", taught_lr=0.0, epochs=1, min_steps=0, lr=None, lr_grid=grid).facts
    assert [row["strength"] for row in facts["lr_trials"]] == [0.001, 0.002, 0.004]
    assert facts["lr"] == 0.002


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
@pytest.mark.parametrize(
    ("drops", "factor", "lr"),
    [([0.0, 0.0], 2.0, 0.001), ([1.0, 0.0, 1.0], 1.0, 0.0), ([1.0, 1.0], 1.0, 0.0)],
)
def test_answers_are_learnt_first_and_labels_where_that_leaves_room(
    method: str, drops: list[float], factor: float, lr: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter(drops)
    monkeypatch.setattr(fisher_guided, "expected_drop", lambda *_, **__: next(remaining))
    done = run(method, network(), epochs=1, min_steps=0, n_factors=(1.0, 2.0), lr_grid=(0.001,))
    assert [row["strength"] for row in done.facts["factor_trials"]] == [2.0, 1.0][: 2 if drops[0] else 1]
    assert done.facts["lr"] == lr
    phases = {row["phase"].rsplit(" ", 1)[-1] for row in done.history}
    assert phases == {f"factor={factor:g}", *([f"lr={lr:g}"] if lr else [])}
    assert next(remaining, None) is None


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
@pytest.mark.parametrize(("kind", "times"), [("cnn", 1.0), ("vit", 10.0)])
def test_networks_without_batch_normalisation_learn_answers_ten_times_as_fast(
    method: str, kind: str, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(fisher_guided, "tune", lambda *_, tuning, **__: rates.append(tuning.lr) or [])
    monkeypatch.setattr(fisher_guided, "expected_drop", lambda *_, **__: 0.0)
    run(method, network(kind), epochs=1, min_steps=0, n_factors=(1.0,), lr_grid=(0.5,), taught_lr=0.003)
    assert rates == [pytest.approx(0.003 * times), 0.5]


def test_only_the_descent_by_labels_moves_the_statistics_of_batch_normalisation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fisher_guided, "expected_drop", lambda *_, **__: 1.0)
    original = network()
    taught = run("fip", original, epochs=1, min_steps=0).model
    labelled = run("fip", original, epochs=1, min_steps=0, taught_lr=0.0, lr=0.001).model
    assert torch.equal(taught.bn1.running_mean, original.bn1.running_mean)
    assert not torch.equal(labelled.bn1.running_mean, original.bn1.running_mean)


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_one_image_per_class_has_no_select_split(method: str, kind: str) -> None:
    few = split_clean_set(clean_set(3), seed=0, select=0.2, report=0.0)
    assert len(few.select) == 0
    row = METHODS[method]
    result = row.function(network(kind), few, row.config(), task=TASK, seed=0, device="cpu", progress=NullProgress())
    outputs = result.model(TASK.inputs(clean_set().images))
    assert torch.isfinite(outputs).all()
    assert len(result.history) >= row.config().min_steps


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
def test_zero_epochs_return_the_same_bytes_and_the_input_is_untouched(method: str) -> None:
    original = network()
    before = copy.deepcopy(original.state_dict())
    result = run(method, original, epochs=0)
    moved = run(method, original, epochs=1, lr=0.05)
    assert all(torch.equal(value, result.model.state_dict()[name]) for name, value in before.items())
    assert any(not torch.equal(value, moved.model.state_dict()[name]) for name, value in before.items())
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in before.items())
    assert not original.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in result.model.parameters())


@pytest.mark.parametrize("method", ["fip", "fast_fip"])
@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"eta_f": -1.0}, "eta_f"),
        ({"eta_r": -0.1}, "eta_r"),
        ({"trace_every": 0}, "trace_every"),
        ({"trace_batch": 0}, "trace_batch"),
        ({"lr": -0.1}, "lr"),
        ({"lr": 0.0, "taught_lr": 0.0}, "lr"),
        ({"lr_grid": ()}, "lr_grid"),
        ({"max_trace_norm": 0.0}, "max_trace_norm"),
        ({"epochs": -1}, "epochs"),
        ({"start": "pruned"}, "start"),
        ({"n_factors": (0.5,)}, "n_factors"),
        ({"taught_lr": -1.0}, "taught_lr"),
    ],
)
def test_bad_settings_are_refused(method: str, settings: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        METHODS[method].config(**settings)


def test_trace_of_what_is_trained_is_exact_plus_signs() -> None:
    model = network()
    layers = shift_layers(model)
    parametrise(model, layers)
    trained = fast_fip.train_only_shifts(model, layers, norms=True)
    data = clean_set(12)
    inputs = TASK.inputs(data.images)
    fisher = fast_fip.diagonal(model, layers, trained, inputs, data.labels, task=TASK)
    rows = per_sample_gradients(model, inputs, data.labels, losses=TASK.losses, names=trained)
    torch.testing.assert_close(
        torch.cat([fisher[name] for name in trained]), rows.square().mean(0), rtol=1e-3, atol=1e-6
    )
    term = fast_fip.exact_trace_term(
        data,
        layers,
        fast_fip.FastFIPConfig(trace_batch=12),
        task=TASK,
        generator=torch.Generator().manual_seed(0),
        device="cpu",
    )
    draws = torch.stack([term(model).detach() for _ in range(100)])
    exact = float(sum(value.sum() for value in fisher.values()))
    assert abs(float(draws.mean()) - exact) < 4 * float(draws.std()) / 10


def test_without_running_statistics_it_does_not_apply_and_other_methods_may() -> None:
    model = network()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_var = None
    with pytest.raises(MethodNotApplicable, match="curvature"):
        run("fip", model, epochs=1, min_steps=0)


def test_labels_of_a_network_that_left_the_finite_are_a_divergence() -> None:
    outputs = torch.tensor([[0.0, 1.0, 2.0], [0.0, math.nan, 0.0]])
    with pytest.raises(MethodDiverged, match="no label"):
        fip.sampled_labels(outputs, TASK, torch.Generator().manual_seed(0))


def test_what_zeroing_alone_costs_is_measured_and_no_factor_multiplies_it() -> None:
    model, parts = network(), splits(96)
    config = fip.FIPConfig(epochs=1, min_steps=0, taught_lr=0.0, lr=1e-12, n_factors=(2.0, 3.0))
    facts = fip.purify(model, parts, config, task=TASK, seed=0, device="cpu", progress=NullProgress()).facts
    (trial,) = facts["factor_trials"]
    assert trial["strength"] == 1.0
    assert trial["accuracy"] < 0, "zeroing changed answers"
    assert facts["n"] in [each["strength"] for each in facts["n_trials"]]
