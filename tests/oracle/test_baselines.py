"""The baselines' formulas against loops and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense_core.architectures import build
from defense_core.data import Splits
from defense_core.layers import unit_layers
from defense_core.loop import working_copy
from defense_core.progress import NullProgress
from defense_core.purify import METHODS, purify
from defense_core.purify.anp import adversarial_noise, attach_perturbations
from defense_core.purify.clp import channel_bounds, outlying
from defense_core.purify.fine_pruning import mean_inputs
from defense_core.purify.ft_sam import adaptive_sam_step
from defense_core.purify.masks import following_norms, mask_sites
from defense_core.task import ImageClassification
from tests.oracle.networks import clean_set

TASK = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,), augment="none")


def network(name: str = "small_cnn") -> nn.Module:
    return build(name, {"width": 4, "in_channels": 1, "num_classes": 4})


def run(name: str, **settings: object) -> tuple[nn.Module, nn.Module, dict[str, object]]:
    model, data = network(), clean_set()
    config = METHODS[name].config(**{"batch_size": 8, **settings})
    splits = Splits(data, data, data)
    done = purify(model, splits, config, method=name, task=TASK, seed=0, device="cpu", progress=NullProgress())
    return model, done.model, done.facts


def test_baselines_are_marked() -> None:
    marked = {name for name, method in METHODS.items() if method.baseline}
    assert marked == {"fast_fip", "ft_sam", "fine_pruning", "anp", "clp"}
    assert not any(METHODS[name].control for name in marked)


# -- FT-SAM --------------------------------------------------------------------------------


def test_adaptive_sam_step_is_the_equation() -> None:
    # l(w) = sum_i c_i w_i^2 / 2, so g = c w and everything is known.
    model = nn.Linear(3, 1, bias=False)
    curvature = torch.tensor([1.0, 2.0, 5.0])
    weight = torch.tensor([0.5, -1.0, 0.25])
    with torch.no_grad():
        model.weight.copy_(weight)
    adaptive_sam_step(0.3)(model, lambda: (curvature * model.weight[0].square()).sum() / 2)
    gradient = curvature * weight
    eps = 0.3 * weight.square() * gradient / (weight.abs() * gradient).norm()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad[0], curvature * (weight + eps))
    assert torch.equal(model.weight[0].detach(), weight)


def test_sam_leaves_a_weight_of_zero_where_it_is_perturbed_from() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 1.0]]))
    adaptive_sam_step(1.0)(model, lambda: (model.weight[0] - 1).square().sum())
    assert model.weight.grad is not None
    assert float(model.weight.grad[0, 0]) == -2.0


# -- fine-pruning --------------------------------------------------------------------------


def test_mean_inputs_equal_a_loop() -> None:
    model, data = network().eval(), clean_set()
    head = model.linear
    got = mean_inputs(model, head, data, task=TASK, device="cpu")
    trunk = nn.Sequential(*[part for part in model.children() if part is not head])
    rows = [trunk(TASK.inputs(image.unsqueeze(0))).flatten() for image in data.images]
    torch.testing.assert_close(got.float(), torch.stack(rows).mean(0).detach(), atol=1e-5, rtol=1e-5)


def test_cut_inputs_are_the_least_active_and_stay_zero_through_tuning() -> None:
    model, purified, facts = run("fine_pruning", share=0.5, epochs=2, lr=0.05)
    order = mean_inputs(model, model.linear, clean_set(), task=TASK, device="cpu").argsort(stable=True)
    zero = (purified.linear.weight == 0).all(0).nonzero().flatten()
    assert set(zero.tolist()) == set(order[:8].tolist())
    assert facts["pruned"] == 8


# -- ANP -----------------------------------------------------------------------------------


def test_perturbed_network_equals_scales_and_shifts_by_hand() -> None:
    model = network()
    data = TASK.inputs(clean_set().images)
    masked = working_copy(model, "cpu").eval()
    sites = [site for site in mask_sites(masked, data) if site.kind == "norm"]
    masks, perturbed = attach_perturbations(masked, sites)
    assert (len(masks), len(perturbed)) == (3, 6)  # scales; scales and shifts
    generator = torch.Generator().manual_seed(1)
    for part in perturbed:
        part.noise = torch.rand(part.noise.shape, generator=generator) - 0.5
    by_hand = working_copy(model, "cpu").eval()
    with torch.no_grad():
        masks[1].values.fill_(0.5)
        for index, name in enumerate(("bn1", "bn2", "bn3")):
            layer = by_hand.get_submodule(name)
            layer.weight.mul_((0.5 if index == 1 else 1.0) + perturbed[2 * index].noise)
            layer.bias.mul_(1 + perturbed[2 * index + 1].noise)
    torch.testing.assert_close(masked(data), by_hand(data), atol=1e-6, rtol=1e-5)


def test_adversarial_noise_climbs_and_stays_within_eps() -> None:
    masked = working_copy(network(), "cpu").eval()
    data = clean_set()
    _, perturbed = attach_perturbations(masked, mask_sites(masked, TASK.inputs(data.images), sites="norm"))

    def loss_of() -> Tensor:
        return F.cross_entropy(masked(TASK.inputs(data.images)), data.labels)

    before = float(loss_of().detach())
    torch.manual_seed(0)
    adversarial_noise(loss_of, perturbed, eps=0.3)
    assert all(float(part.noise.abs().max()) <= 0.3 + 1e-6 for part in perturbed)
    assert float(loss_of().detach()) > before


def test_anp_cuts_exactly_the_units_below_the_threshold() -> None:
    model, purified, facts = run("anp", epochs=3, lr=2.0, threshold=0.6)
    cut = facts["pruned"]
    for name, count in cut.items():  # type: ignore[attr-defined]
        before, after = model.get_parameter(name), purified.get_parameter(name)
        gone = (after == 0) & (before != 0)
        assert int(gone.sum()) == count
        assert torch.equal(after[~gone], before[~gone])
    assert sum(cut.values()) > 0, "nothing was cut, and nothing tested"  # type: ignore[attr-defined]
    assert torch.equal(model.conv1.weight, purified.conv1.weight)


# -- CLP -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["small_cnn", "preact_resnet18"])
def test_channel_bounds_equal_a_loop_over_channels(name: str) -> None:
    model = network(name)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
    norms = following_norms(model, TASK.inputs(clean_set().images))
    for layer in unit_layers(model):
        norm = model.get_submodule(norms[layer.name]) if layer.name in norms else None
        for unit, got in enumerate(channel_bounds(layer, norm)):
            matrix = layer.weight[unit].detach().reshape(layer.weight.shape[1], -1)
            expected = torch.linalg.svdvals(matrix.double())[0]
            if norm is not None:
                expected = expected * norm.weight[unit].abs() / (norm.running_var[unit] + norm.eps).sqrt()
            assert float(got) == pytest.approx(float(expected), rel=1e-5)


def test_norms_are_paired_with_what_they_take() -> None:
    norms = following_norms(network("preact_resnet18"), TASK.inputs(clean_set().images))
    assert norms["layer2.0.conv1.weight"] == "layer2.0.bn2"
    # The norm after a down-sampling block takes a sum, not the shortcut that stands before it.
    assert "layer2.0.shortcut.0.weight" not in norms
    assert "layer4.1.conv2.weight" not in norms


def test_outlying_channels_by_hand() -> None:
    bounds = torch.tensor([1.0, 1.0, 1.0, 5.0])  # mean 2, standard deviation sqrt(3)
    assert outlying(bounds, 1.7).tolist() == [False, False, False, True]
    assert outlying(bounds, 1.8).tolist() == [False] * 4
    assert not outlying(torch.tensor([3.0]), 0.0).any()


def test_clp_cuts_a_planted_channel_and_nothing_else() -> None:
    model, data = network(), clean_set()
    with torch.no_grad():
        model.conv2.weight[3] *= 50
    config = METHODS["clp"].config(u=2.4)
    splits = Splits(data, data, data)
    done = purify(model, splits, config, method="clp", task=TASK, seed=0, device="cpu", progress=NullProgress())
    assert done.facts["pruned"] == {"conv1.weight": 0, "conv2.weight": 1, "conv3.weight": 0}
    assert float(done.model.bn2.weight[3]) == 0.0
    assert float(done.model.bn2.bias[3]) == 0.0
    assert torch.equal(done.model.conv2.weight, model.conv2.weight)
    assert float(model.bn2.weight[3]) != 0.0
