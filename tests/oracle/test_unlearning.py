"""Closing units by clean unlearning: what is ranked, what closes, what stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.data import Splits
from defense_core.errors import ConfigError
from defense_core.inference import channels_last
from defense_core.layers import unit_layers
from defense_core.loop import working_copy
from defense_core.progress import NullProgress
from defense_core.purify import METHODS, nft, ngf, ngf_head
from defense_core.purify.masks import attach_masks, mask_sites
from defense_core.purify.natural_step import head_step
from defense_core.purify.ngf_block import last_layers
from defense_core.purify.ngf_run import Run
from defense_core.purify.unlearning import SHARE, choose_ratio, closed_weights, unlearning_changes
from defense_core.task import ImageClassification
from tests.oracle.networks import clean_set, small_cnn

TASK = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,))
PLAIN = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,), augment="none")


def random_changes(model: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(layer.weight.shape, generator=generator) for layer in unit_layers(model)]


def run(name: str, **settings: Any) -> Any:
    model, data = small_cnn(), clean_set()
    cheap = {"epochs": 1, "min_steps": 0, "batch_size": 8, "unlearn_epochs": 1, **settings}
    config = METHODS[name].config(**cheap)
    splits = Splits(data, data, data)
    done = METHODS[name].function(model, splits, config, task=TASK, seed=0, device="cpu", progress=NullProgress())
    return model, done


def test_one_step_of_unlearning_moves_by_the_gradient() -> None:
    model, data = small_cnn(), clean_set()
    changes = unlearning_changes(
        model,
        data,
        epochs=1,
        lr=1e-2,
        batch_size=24,
        precision="fp32",
        task=PLAIN,
        seed=0,
        device="cpu",
        progress=NullProgress(),
        min_steps=1,
    )
    copy = working_copy(model, "cpu").train()  # batch statistics
    TASK.losses(copy(channels_last(TASK.inputs(data.images))), data.labels).mean().backward()
    for layer, change in zip(unit_layers(copy), changes, strict=True):
        assert layer.weight.grad is not None
        torch.testing.assert_close(change, 1e-2 * layer.weight.grad.abs(), atol=1e-6, rtol=1e-3)


def test_kernels_close_as_wholes_and_by_their_sum() -> None:
    layers = unit_layers(small_cnn())
    changes = random_changes(small_cnn())
    closed = closed_weights(layers, changes, ratio=0.3, granularity="kernel")
    assert [part.shape for part in closed] == [change.shape[:2] for change in changes]
    sums = [change.flatten(2).sum(2) for change in changes]
    ranked = torch.cat([each.sum(1) for each in sums])
    units = set(ranked.topk(int(0.3 * len(ranked))).indices.tolist())
    rows = [row for each in sums for row in each]
    pool = torch.cat([rows[unit] for unit in sorted(units)]).sort(descending=True).values
    bound = pool[int(SHARE * len(pool)) - 1]
    for unit, (row, got) in enumerate(zip(rows, [row for part in closed for row in part], strict=True)):
        assert torch.equal(got, (row >= bound) & (unit in units))


def test_the_ratio_goes_up_while_accuracy_permits_and_the_model_shows_the_choice() -> None:
    model = small_cnn()
    original = {layer.name: layer.weight.detach().clone() for layer in unit_layers(model)}
    answers = {0.1: 0.8, 0.3: 0.75, 0.5: 0.5, 0.7: 0.9}
    order = iter(answers.values())
    ratio, closed, trials = choose_ratio(
        model,
        random_changes(model),
        tuple(answers),
        lambda network: next(order),
        granularity="weight",
        reference=0.8,
        max_drop=0.1,
        images=1000,
        progress=NullProgress(),
    )
    assert ratio == 0.3
    assert [row["strength"] for row in trials] == [0.1, 0.3, 0.5]
    for layer, part in zip(unit_layers(model), closed, strict=True):
        torch.testing.assert_close(layer.weight.detach(), original[layer.name].masked_fill(part, 0.0))
    assert any(part.any() for part in closed)


def test_nothing_closes_at_ratio_zero() -> None:
    model = small_cnn()
    assert not any(
        part.any()
        for part in closed_weights(unit_layers(model), random_changes(model), ratio=0.0, granularity="kernel")
    )


def test_masks_start_where_they_are_told() -> None:
    model = working_copy(small_cnn(), "cpu")
    sites = mask_sites(model, TASK.inputs(clean_set().images), sites="all", granularity="kernel")
    starts = [torch.full(site.shape, 0.25) for site in sites]
    weights = [model.get_parameter(site.name).detach().clone() for site in sites]
    masks = attach_masks(model, sites, starts)
    assert all(bool((mask.values == 0.25).all()) for mask in masks)
    for site, weight in zip(sites, weights, strict=True):
        owner, _, name = site.name.rpartition(".")
        torch.testing.assert_close(getattr(model.get_submodule(owner), name), 0.25 * weight)
    masks[0].values.data.fill_(1.0)
    assert float(starts[0].max()) == 0.25, "masks and their starts share memory"


def test_nft_opens_from_low_starts_what_it_may() -> None:
    # At a vanishing rate masks stay where they start: closed kernels at the clamp, others at 1.
    _, done = run("nft", taught_lr=0.0, ratio=0.5, lr=1e-12, sparsity=0.0)
    assert any(share > 0 for share in done.facts["closed"].values())
    _, open_ = run("nft", taught_lr=0.0, ratio=0.0, lr=1e-12, sparsity=0.0)
    assert not any(share > 0 for share in open_.facts["closed"].values())
    # Pulled open hard, all of them end at the upper clamp.
    _, pulled = run("nft", taught_lr=0.0, ratio=0.5, sparsity=0.0, eta=6e3)
    assert set(pulled.facts["means"].values()) == {1.0}


@pytest.mark.parametrize("granularity", ["unit", "kernel"])
def test_nft_low_starts_of_either_granularity(granularity: str) -> None:
    _, done = run("nft", ratio=0.5, lr=1e-12, sparsity=0.0, granularity=granularity)
    low = [mean for name, mean in done.facts["means"].items() if "conv" in name]
    assert low
    assert min(low) < 0.95
    assert all(mean == 1.0 for name, mean in done.facts["means"].items() if "bn" in name)


def test_ngf_closes_weights_and_tunes_the_classifier_alone() -> None:
    model, done = run("ngf", ratio=0.3, part="masked")
    before, after = model.state_dict(), done.model.state_dict()
    assert done.facts["ratio"] == 0.3
    closed = 0
    for layer in unit_layers(model):
        shut = after[layer.name] != before[layer.name]
        assert not after[layer.name][shut].any()
        closed += int(shut.sum())
    assert closed
    head = [name for name in before if not torch.equal(before[name], after[name]) and name.split(".")[0] == "linear"]
    rest = before.keys() - {layer.name for layer in unit_layers(model)} - set(head)
    assert head
    assert all(torch.equal(before[name], after[name]) for name in rest), "only the classifier is trained"


def test_ngf_starts_the_last_layers_afresh_behind_closed_units() -> None:
    model, done = run("ngf", ratio=0.3)
    before, after = model.state_dict(), done.model.state_dict()
    fresh = tuple(f"{name}." for name in done.facts["layers"])
    assert len(fresh) == 2
    hidden = [layer for layer in unit_layers(model) if not layer.name.startswith(fresh)]
    for layer in hidden:
        shut = after[layer.name] != before[layer.name]
        assert not after[layer.name][shut].any()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in changed if name.startswith(fresh)}
    allowed = {layer.name for layer in hidden} | {name for name in before if name.startswith(fresh)}
    statistics = {name for name in changed - allowed if "running_" in name or "num_batches" in name}
    assert changed - allowed == statistics
    # Statistics in front of the fresh layers stay: the first norm of the network is such a one.
    first = next(name for name in before if name.endswith("running_mean"))
    assert first not in statistics


@pytest.mark.parametrize("batch_size", [4, 1000])
def test_what_holds_the_classifier_is_the_fisher_of_all_images_where_it_came_in(
    batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    def recording(*given: Any, curvature: Tensor, **named: Any) -> Tensor:
        seen.append(curvature.clone())
        return head_step(*given, curvature=curvature, **named)

    monkeypatch.setattr(ngf_head, "head_step", recording)
    data = clean_set()
    given: Any = small_cnn().eval()
    config = METHODS["ngf"].config(
        part="head", eta=0.5, views=1, epochs=1, min_steps=0, batch_size=batch_size, precision="fp32"
    )
    nothing = data.subset(torch.arange(0))
    ngf.purify(given, Splits(data, nothing, nothing), config, task=PLAIN, seed=0, device="cpu", progress=NullProgress())
    total = torch.zeros(given.linear.out_features, given.linear.in_features + 1)
    for image, label in zip(data.images, data.labels, strict=True):
        given.zero_grad()
        PLAIN.losses(given(PLAIN.inputs(image[None])), label[None]).sum().backward()
        total += torch.cat([given.linear.weight.grad, given.linear.bias.grad.unsqueeze(1)], 1).square()
    for found in seen:
        torch.testing.assert_close(found.float(), 0.5 * total / len(data), rtol=1e-3, atol=1e-6)
    assert len(seen) == -(-len(data) // min(batch_size, len(data)))


def test_the_last_layer_is_the_one_that_is_called_last_wherever_it_is_defined() -> None:
    class FirstDefinedLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(4, 6)
            self.convolution = nn.Conv2d(1, 4, 3)
            self.linear = nn.Linear(6, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.linear(self.hidden(self.convolution(images).mean((2, 3)).relu()).relu())

    asked = Run(clean_set(), METHODS["ngf"].config(), TASK, 0, "cpu", NullProgress())
    assert last_layers(FirstDefinedLast(), asked) == ["convolution", "hidden", "linear"]


@pytest.mark.parametrize("method", ["nft", "ngf"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("ratio", 1.0), ("ratio_grid", ()), ("start_keep", 0.0), ("unlearn_lr", 0.0), ("unlearn_epochs", 0)],
)
def test_settings_out_of_range_are_refused(method: str, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        METHODS[method].config(**{field: value})


@pytest.mark.parametrize(
    ("drops", "factor", "sparsity"),
    [([0.0, 0.0, 1.0], 2.0, 5e-4), ([1.0, 0.0, 1.0], 1.0, 0.0), ([1.0, 1.0], 1.0, 0.0)],
)
def test_nft_learns_answers_first_and_labels_where_that_leaves_room(
    drops: list[float], factor: float, sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter(drops)
    monkeypatch.setattr(nft, "expected_drop", lambda *_, **__: next(remaining))
    _, done = run("nft", factors=(1.0, 2.0), ratio_grid=(0.1,), sparsity=None, min_steps=0)
    assert done.facts["ratio"] == pytest.approx(0.1 * factor)
    assert done.facts["sparsity"] == sparsity
    assert {row["phase"] for row in done.history} == {"taught masks", *(["masks"] if sparsity else [])}
    assert next(remaining, None) is None


@pytest.mark.parametrize(("drops", "factor"), [([0.0], 2.0), ([1.0, 0.0], 1.0), ([1.0, 1.0], 1.0)])
@pytest.mark.parametrize("part", ["masked", "masked_block"])
def test_ngf_closes_more_while_accuracy_holds_after_the_tuning(
    part: str, drops: list[float], factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter(drops)
    monkeypatch.setattr(ngf, "expected_drop", lambda *_, **__: next(remaining))
    model, done = run("ngf", part=part, factors=(1.0, 2.0), ratio_grid=(0.4,))
    assert done.facts["ratio"] == pytest.approx(0.4 * factor)
    assert [trial["accuracy"] for trial in done.facts["factor_trials"]] == [-drop for drop in drops]
    assert next(remaining, None) is None
    fresh = tuple(f"{name}." for name in done.facts.get("layers", ()))
    hidden = [layer for layer in unit_layers(model) if not layer.name.startswith(fresh or ("-",))]
    after = done.model.state_dict()
    assert any((after[layer.name] != layer.weight).any() for layer in hidden)


@pytest.mark.parametrize(("drops", "layers"), [([0.0, 0.0], 2), ([0.0, 1.0], 1), ([1.0], 1)])
def test_ngf_tunes_more_layers_by_the_same_rule(
    drops: list[float], layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter(drops)
    monkeypatch.setattr(ngf, "expected_drop", lambda *_, **__: next(remaining))
    _, done = run("ngf", part="block", layers_grid=(1, 2))
    assert len(done.facts["layers"]) == layers + 1
    assert next(remaining, None) is None


@pytest.mark.parametrize("factors", [(), (0.5, 1.0)])
def test_ngf_factors_below_one_are_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="factors"):
        METHODS["ngf"].config(factors=factors)
