"""Masks: where they stand, that folding equals the masked network, and the depth schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense_core.architectures import build
from defense_core.data import Splits
from defense_core.errors import ConfigError
from defense_core.loop import Tuning, tune, working_copy
from defense_core.progress import NullProgress
from defense_core.purify.masks import attach_masks, fold_masks, mask_sites
from defense_core.purify.nft import purify
from defense_core.purify.nft_masks import NFTConfig, depth_schedule
from defense_core.purify.statistics import renew_statistics
from defense_core.task import ImageClassification, Mixed
from tests.oracle.networks import clean_set, small_cnn

TASK = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,))


def preact() -> nn.Module:
    return build("preact_resnet18", {"width": 4, "in_channels": 1, "num_classes": 4})


def vit() -> nn.Module:
    size = {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "in_channels": 1, "num_classes": 4}
    return build("vit_tiny", size)


def inputs() -> Tensor:
    return TASK.inputs(clean_set().images)


@pytest.mark.parametrize("granularity", ["unit", "kernel"])
@pytest.mark.parametrize("make", [small_cnn, preact, vit])
def test_folded_equals_masked(make: object, granularity: str) -> None:
    model = make()  # type: ignore[operator]
    masked = working_copy(model, "cpu")
    sites = mask_sites(masked, inputs(), sites="all", granularity=granularity)  # type: ignore[arg-type]
    masks = attach_masks(masked, sites)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mask in masks:
            mask.values.copy_(torch.rand(mask.values.shape, generator=generator))
    folded = working_copy(model, "cpu")
    fold_masks(folded, sites, [mask.values.detach() for mask in masks])
    torch.testing.assert_close(folded.eval()(inputs()), masked.eval()(inputs()), atol=1e-6, rtol=1e-5)
    assert folded.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(folded(inputs()), model(inputs()))


def test_only_masks_train() -> None:
    masked = working_copy(preact(), "cpu")
    masks = attach_masks(masked, mask_sites(masked, inputs()))
    trainable = [parameter for parameter in masked.parameters() if parameter.requires_grad]
    assert {id(parameter) for parameter in trainable} == {id(mask.values) for mask in masks}


def test_mask_of_a_unit_by_hand() -> None:
    layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3, 2)).eval()
    sites = mask_sites(layer, torch.zeros(1, 2, 3, 3), sites="all", granularity="kernel")
    assert [(site.name, site.shape, site.kind) for site in sites] == [("0.weight", (3, 2), "unit")]
    before = layer[0].weight.detach().clone()
    values = torch.arange(6.0).view(3, 2)
    fold_masks(layer, sites, [values])
    for unit in range(3):
        for channel in range(2):
            expected = before[unit, channel] * values[unit, channel]
            assert torch.equal(layer[0].weight[unit, channel].detach(), expected)


def test_sites_of_a_preactivation_network() -> None:
    model = preact()
    norm = {site.name for site in mask_sites(model, inputs(), sites="norm")}
    auto = {site.name for site in mask_sites(model, inputs(), sites="auto")}
    every = {site.name for site in mask_sites(model, inputs(), sites="all")}
    assert norm == {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert norm < auto < every
    # conv1 of a block feeds bn2 directly; conv2 feeds a sum, and the last one no norm at all.
    assert "layer4.1.conv2.weight" in auto
    assert "layer4.1.conv1.weight" not in auto
    assert "layer4.1.conv1.weight" in every
    assert not [name for name in every if "shortcut" in name or name.startswith("linear")]


def test_sites_of_a_transformer_are_scales_attention_and_perceptrons() -> None:
    names = {site.name for site in mask_sites(vit(), inputs(), sites="auto")}
    assert {"blocks.0.norm1.weight", "blocks.1.attn.qkv.weight", "blocks.1.mlp.fc2.weight", "norm.weight"} <= names
    assert "head.weight" not in names


def test_a_network_without_norms_has_no_scales_to_mask() -> None:
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4)).eval()
    with pytest.raises(ConfigError, match="nothing to mask"):
        mask_sites(plain, inputs(), sites="norm")
    assert [site.name for site in mask_sites(plain, inputs(), sites="auto")] == ["0.weight"]


def test_finding_sites_leaves_no_hook_behind() -> None:
    model = preact()
    mask_sites(model, inputs(), sites="auto")
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_depth_schedule_at_the_papers_depth() -> None:
    floors = depth_schedule(19, alpha=0.8, beta=0.5)
    assert floors == pytest.approx([0.8 * math.exp(-0.5 * layer) for layer in range(1, 20)])
    assert floors[:8] == pytest.approx([0.485, 0.294, 0.179, 0.108, 0.066, 0.040, 0.024, 0.015], abs=6e-4)


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_depth_schedule_of_other_depths_starts_and_ends_alike(count: int) -> None:
    floors = depth_schedule(count, alpha=0.8, beta=0.5)
    assert len(floors) == count
    assert floors[0] == pytest.approx(0.8 * math.exp(-0.5))
    assert floors == sorted(floors, reverse=True)
    if count > 1:
        assert floors[-1] == pytest.approx(0.8 * math.exp(-0.5 * 19))


def test_renewed_statistics_are_the_mean_over_batches() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 4)).eval()
    renew_statistics(model, clean_set(), task=TASK, batch_size=8, seed=0, device="cpu", progress=NullProgress())
    plain = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,), augment="none")
    assert model[0].momentum == 0.1
    assert not model.training
    renew_statistics(model, clean_set(), task=plain, batch_size=8, seed=0, device="cpu", progress=NullProgress())
    # 24 samples in three batches of 8: the mean of the batch means is the mean.
    torch.testing.assert_close(model[0].running_mean, inputs().mean((0, 2, 3)))


def test_statistics_of_some_layers_are_measured_as_the_others_will_normalise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 4))
    first = model[0]
    first.running_mean.fill_(0.3)
    first.running_var.fill_(2.0)
    plain = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,), augment="none")
    shared = {"task": plain, "batch_size": 8, "seed": 0, "device": "cpu", "progress": NullProgress()}
    renew_statistics(model, clean_set(), **shared, only={"2"})
    assert not any(module.training for module in model.modules())
    assert (first.running_mean.item(), first.running_var.item()) == (pytest.approx(0.3), pytest.approx(2.0))
    with torch.no_grad():
        given = model[1](first(inputs()))
    torch.testing.assert_close(model[2].running_mean, given.mean((0, 2, 3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    renew_statistics(model.train(), clean_set(), **shared, only=set())
    assert not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def run(**settings: object) -> tuple[nn.Module, nn.Module, dict[str, object]]:
    model = small_cnn()
    data = clean_set()
    config = NFTConfig(
        **{"epochs": 2, "min_steps": 0, "sparsity": 0.0, "ratio": 0.0, "mixup": 1.0, "batch_size": 8, "taught_lr": 0.0}
        | settings  # type: ignore[arg-type]
    )
    splits = Splits(data, data, data)
    done = purify(model, splits, config, task=TASK, seed=0, device="cpu", progress=NullProgress())
    return model, done.model, done.facts


def test_masks_respect_the_clamp_and_biases_stay() -> None:
    model, purified, facts = run(sparsity=1e3, lr=1.0)
    before, after = model.state_dict(), purified.state_dict()
    assert set(facts["closed"].values()) == {1.0}  # type: ignore[attr-defined]
    for name, floor in facts["floors"].items():  # type: ignore[attr-defined]
        torch.testing.assert_close(after[name], before[name] * floor)
    for name in before.keys() - facts["floors"].keys():  # type: ignore[attr-defined]
        if "running" not in name and "tracked" not in name:
            assert torch.equal(after[name], before[name])


def test_masks_on_scales_alone_close_nothing_and_search_for_nothing() -> None:
    _, _, facts = run(sites="norm", ratio=None, taught_lr=0.1, sparsity=1e-3)
    assert (facts["ratio"], facts["ratio_trials"]) == (0.0, [])
    assert len(facts["factor_trials"]) == 1  # type: ignore[arg-type]


def test_a_ratio_that_was_asked_for_is_taken_as_it_is() -> None:
    _, _, facts = run(ratio=0.1, factors=(2.0, 4.0), taught_lr=0.1)
    assert facts["ratio"] == 0.1


def test_a_scale_that_two_normalisations_share_carries_no_mask() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.own = nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.BatchNorm2d(1)
            self.other.weight = self.one.weight

        def forward(self, images: Tensor) -> Tensor:
            return self.own(self.other(self.one(images))).mean((2, 3))

    assert [site.name for site in mask_sites(Shared(), inputs(), sites="norm")] == ["own.weight"]


def test_masks_beyond_one_are_pulled_back() -> None:
    # Without a loss that holds them, masks end at 1 from either side, whatever the ceiling.
    means = [
        run(ceiling=3.0, lr=0.05, momentum=0.0, eta=1e3, ratio=0.0, epochs=40)[2]["means"],
        run(ceiling=1.0, lr=0.05, momentum=0.0, eta=1e3, ratio=0.0, epochs=40)[2]["means"],
    ]
    for found in means:
        assert max(abs(mean - 1) for mean in found.values()) < 0.2  # type: ignore[attr-defined]


def test_pull_towards_one_grows_as_data_shrink() -> None:
    # 24 samples of 4 classes: N_c = 6, so eta = 6e3 pulls with 1e3; sparsity 1e3 cancels it exactly.
    _, _, facts = run(eta=6e3, sparsity=0.0)
    assert set(facts["means"].values()) == {1.0}  # type: ignore[attr-defined]
    _, balanced, _ = run(eta=6e3, sparsity=1e3)
    _, plain, _ = run(eta=0.0, sparsity=0.0)
    for one, other in zip(balanced.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("statistics", "moved"), [("batch", True), ("running", False)])
def test_policy_for_running_statistics(statistics: str, moved: bool) -> None:
    model, purified, _ = run(statistics=statistics)
    assert torch.equal(model.bn1.running_mean, purified.bn1.running_mean) != moved


def test_mixup_is_the_equation_and_follows_its_generator() -> None:
    images, labels = inputs(), clean_set().labels
    mixed = TASK.mixup(images, labels, 1.0, torch.Generator().manual_seed(3))
    again = TASK.mixup(images, labels, 1.0, torch.Generator().manual_seed(3))
    assert mixed.weight == again.weight
    assert torch.equal(mixed.inputs, again.inputs)
    assert torch.equal(mixed.targets, labels)
    assert torch.equal(mixed.partners.sort().values, labels.sort().values)
    generator = torch.Generator().manual_seed(3)
    torch.randint(2**63 - 1, (), generator=generator)
    order = torch.randperm(len(images), generator=generator)
    torch.testing.assert_close(mixed.inputs, mixed.weight * images + (1 - mixed.weight) * images[order])
    assert torch.equal(mixed.partners, labels[order])


def test_mixup_weights_follow_the_beta_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    one, label = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.int64)
    for alpha in (0.2, 1.0, 4.0):
        weights = torch.tensor([TASK.mixup(one, label, alpha, generator).weight for _ in range(2000)])
        assert float(weights.mean()) == pytest.approx(0.5, abs=0.05)
        assert float(weights.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)


def test_mixup_loss_in_the_loop_is_the_weighted_sum() -> None:
    seen: list[Mixed] = []

    class Remembering(ImageClassification):
        def mixup(self, inputs: Tensor, targets: Tensor, alpha: float, generator: torch.Generator) -> Mixed:
            seen.append(super().mixup(inputs, targets, alpha, generator))
            return seen[-1]

    task, twin = Remembering((1, 8, 8), 4, mean=(0.5,), std=(0.5,)), working_copy(small_cnn(), "cpu").train()
    (row,) = tune(
        working_copy(small_cnn(), "cpu"), clean_set(), task=task, seed=0, device="cpu", progress=NullProgress(),
        tuning=Tuning(1, batch_size=24, lr=1e-9, precision="fp32"), name="mixed", mixup=1.0,
    )  # fmt: skip
    (mixed,) = seen
    assert 0.05 < mixed.weight < 0.95
    outputs = twin(mixed.inputs)
    own, partners = (float(F.cross_entropy(outputs, labels)) for labels in (mixed.targets, mixed.partners))
    assert abs(own - partners) > 1e-3
    assert row["loss"] == pytest.approx(mixed.weight * own + (1 - mixed.weight) * partners, rel=1e-5)
