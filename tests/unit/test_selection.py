"""The choice between candidates: what the rule weighs, and the universal perturbations that it rests on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from defense_core.data import CleanSet, Splits
from defense_core.errors import ConfigError
from defense_core.progress import NullProgress
from defense_core.selection import Candidate, Signals, choose, suspected_class, with_residuals
from defense_core.task import ImageClassification
from defense_core.universal import MAX_TARGETS, Search, reached, select_signals, universal_perturbations

TASK = ImageClassification((1, 4, 4), 3, (0.0,), (1.0,))
EASY = Signals(200, 180, 180, 0.9, (0, 1, 2), (0.9, 0.5, 0.5), (0.1, 0.4, 0.5))


def candidate(method: str, **changes: object) -> Candidate:
    return Candidate(method, replace(EASY, **changes))  # type: ignore[arg-type]


def test_the_suspect_is_the_class_that_lost_most_over_all_candidates() -> None:
    thorough, other = candidate("a"), candidate("b", reached=(0.3, 0.0, 0.5))
    assert suspected_class([thorough, other]) == 0
    assert [each.residual for each in with_residuals([thorough, other])] == [0.1, 0.3]


def test_candidates_that_were_asked_about_other_classes_are_compared_by_those_they_share() -> None:
    """On another machine the screening of many classes put 3 in the place of 1."""
    here = candidate("here", reached=(0.5, 0.0, 0.1))
    there = candidate("there", targets=(0, 2, 3), reached_before=(0.9, 0.5, 0.9), reached=(0.2, 0.2, 0.0))
    assert suspected_class([here, there]) == 0
    assert [each.residual for each in with_residuals([here, there])] == [0.5, 0.2]
    apart = candidate("apart", targets=(3, 4, 5))
    assert suspected_class([here, apart]) is None


def test_least_residual_wins_over_accuracy() -> None:
    gentle = candidate("gentle", correct=190, cautious_accuracy=0.94, reached=(0.8, 0.5, 0.5))
    chosen = choose([gentle, candidate("thorough", correct=178)])
    assert chosen is not None
    assert chosen.method == "thorough"


def test_within_a_tie_all_classes_count_then_accuracy_then_the_order() -> None:
    gentle = candidate("gentle", correct=190, reached=(0.06, 0.5, 0.5))
    removing = candidate("removing", reached=(0.1, 0.4, 0.3))
    accurate = candidate("accurate", correct=182)
    for tied, best in (
        ([gentle, removing, accurate], "removing"),
        ([candidate("first"), candidate("second"), accurate], "accurate"),
        ([candidate("first"), candidate("second")], "first"),
    ):
        chosen = choose(tied)
        assert chosen is not None
        assert chosen.method == best


@pytest.mark.parametrize(("images", "more"), [(200, 0.09), (50, 0.19), (20_000, 0.049)])
def test_the_mean_of_several_comes_first_unless_it_surely_leaves_more(images: int, more: float) -> None:
    """Two standard errors of the difference between two shares of so many images, at least the tie: 0.1, 0.2, 0.05."""
    counts = {"images": images, "correct_before": images, "correct": images}
    strong = candidate("strong", **counts, reached=(0.1, 0.0, 0.0))
    for left, best in ((0.1 + more, "mean"), (0.1 + more + 0.02, "strong")):
        mean = replace(candidate("mean", **counts, reached=(left, 0.9, 0.9)), averaged=4)
        chosen = choose([strong, mean])
        assert chosen is not None
        assert chosen.method == best


def test_within_a_tie_the_mean_of_several_comes_first() -> None:
    strong, accurate = candidate("strong", reached=(0.1, 0.1, 0.1)), candidate("accurate", correct=190)
    mean = replace(candidate("mean", correct=178, reached=(0.14, 0.9, 0.9)), averaged=2)
    for changed, best in (
        (mean, "mean"),
        (replace(mean, averaged=1), "strong"),  # of one model there is no mean
        (replace(mean, eligible=False, why="left out"), "strong"),
        (replace(candidate("mean", reached=(0.21, 0.0, 0.0)), averaged=2), "strong"),  # it leaves more
    ):
        chosen = choose([strong, accurate, changed])
        assert chosen is not None
        assert chosen.method == best


def test_what_costs_too_much_accuracy_is_passed_over_while_anything_holds() -> None:
    costly = candidate("costly", correct=150, cautious_accuracy=0.72, reached=(0.0, 0.0, 0.0))
    chosen = choose([costly, candidate("a")])
    assert chosen is not None
    assert chosen.method == "a"
    alone = choose([costly])
    assert alone is not None
    assert alone.method == "costly"


def test_an_estimated_drop_counts_in_place_of_the_labels() -> None:
    """The labels of a few hundred images exclude the first and prefer the second; the estimates say otherwise."""
    best = candidate("best", correct=168, cautious_accuracy=0.82, reached=(0.05, 0.4, 0.5), expected_drop=0.012)
    other = candidate("other", correct=184, reached=(0.05, 0.4, 0.5), expected_drop=0.02)
    costly = candidate("costly", correct=186, reached=(0.0, 0.0, 0.0), expected_drop=0.051)
    for order in ([best, other, costly], [costly, other, best]):
        chosen = choose(order)
        assert chosen is not None
        assert chosen.method == "best"
    without = choose([replace(each, signals=replace(each.signals, expected_drop=None)) for each in (best, other)])  # type: ignore[type-var]
    assert without is not None
    assert without.method == "other"


def test_three_images_are_always_permitted() -> None:
    small = {"images": 20, "correct_before": 18, "correct": 15, "cautious_accuracy": 0.75}
    costly = candidate("costly", **{**small, "cautious_accuracy": 0.74}, reached=(0.0, 0.0, 0.0))
    holding = candidate("holding", **small)
    chosen = choose([costly, holding])
    assert chosen is not None
    assert chosen.method == "holding"


def test_what_is_not_eligible_neither_votes_nor_wins() -> None:
    control = replace(candidate("control", reached=(0.9, 0.0, 0.5)), eligible=False)
    assert suspected_class([control, candidate("a")]) == 0
    chosen = choose([control, Candidate("a", None)])
    assert chosen is not None
    assert chosen.method == "a"
    assert choose([control]) is None


def test_signals_go_to_json_and_back() -> None:
    assert Signals.from_mapping(EASY.to_mapping()) == EASY
    assert EASY.to_mapping()["accuracy"] == 0.9
    with pytest.raises(ConfigError):
        Signals.from_mapping({**EASY.to_mapping(), "asr": 1.0})


class Linear(nn.Module):
    """Logits are ``w_k . x + b_k``: of two classes, the best universal change is ``epsilon * sign(w_t - w_other)``."""

    def __init__(self, weights: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(weights.shape[1], weights.shape[0])
        with torch.no_grad():
            self.head.weight.copy_(weights)
            self.head.bias.copy_(bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(inputs.flatten(1))


def shortcut(strength: float) -> Linear:
    """A model with three linear classes; ``strength`` is a shortcut to class 2 by one pixel."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, 16, generator=generator)
    weights[2] = 0.0
    weights[2, 5] = strength
    return Linear(weights, torch.tensor([0.0, 0.0, -1.0])).eval()


def images(count: int = 60) -> CleanSet:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(60, 180, (count, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return CleanSet(pixels, torch.arange(count) % 3, 3)


def test_the_change_of_a_linear_model_is_the_known_optimum() -> None:
    # Two classes: the loss falls along sign(w_t - w_other) and the bound is reached in every pixel.
    weights = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    model = Linear(weights, torch.zeros(2)).eval()
    data = CleanSet(images().images, torch.arange(60) % 2, 2)
    task = ImageClassification((1, 4, 4), 2, (0.0,), (1.0,))
    search = Search(epsilon=8.0, steps=30)
    found = universal_perturbations(model, data, task=task, device="cpu", progress=NullProgress(), search=search)
    difference = (weights[0] - weights[1]).view(1, 4, 4)
    assert torch.equal(found.changes[0], 8.0 * difference.sign())
    assert torch.equal(found.changes[1], -8.0 * difference.sign())


def test_what_is_reached_equals_a_slow_count() -> None:
    model, data = shortcut(6.0), images()
    found = universal_perturbations(model, data, task=TASK, device="cpu", progress=NullProgress())
    shares = reached(model, data, found, task=TASK, device="cpu")
    for target, change, share in zip(found.targets, found.changes, shares, strict=True):
        hits = [
            int(model(((image.float() + change).clamp(0, 255) / 255)[None]).argmax()) == target
            for image, label in zip(data.images, data.labels, strict=True)
            if label != target
        ]
        assert share == sum(hits) / len(hits)
    assert all(float(change.abs().max()) <= Search().epsilon for change in found.changes)


def test_a_removed_shortcut_shows_and_a_kept_one_does_not() -> None:
    given, clean = shortcut(6.0), Splits(images(60), images(30), images(0))
    kept, removed = (
        select_signals(given, model, clean, task=TASK, device="cpu", progress=NullProgress())
        for model in (shortcut(6.0), shortcut(0.0))
    )
    assert kept.reached == kept.reached_before == removed.reached_before
    assert removed.reached[2] < 0.5 < kept.reached[2]
    chosen = choose([Candidate("kept", kept), Candidate("removed", replace(removed, expected_drop=0.0))])
    assert chosen is not None
    assert chosen.method == "removed"


def test_models_are_left_as_they_are() -> None:
    model = shortcut(6.0).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    select_signals(
        model, model, Splits(images(), images(0), images(0)), task=TASK, device="cpu", progress=NullProgress()
    )
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_with_many_classes_the_easiest_targets_are_kept() -> None:
    count = 2 * MAX_TARGETS + 3
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(count, 16, generator=generator) * 0.1
    weights[7] = 4.0
    model = Linear(weights, torch.zeros(count)).eval()
    data = CleanSet(images(count).images, torch.arange(count), count)
    task = ImageClassification((1, 4, 4), count, (0.0,), (1.0,))
    found = universal_perturbations(model, data, task=task, device="cpu", progress=NullProgress())
    assert len(found.targets) == MAX_TARGETS == len(found.changes)
    assert 7 in found.targets
    assert list(found.targets) == sorted(found.targets)


@pytest.mark.parametrize("setting", [{"epsilon": 0.0}, {"epsilon": 300.0}, {"steps": 0}, {"batch_size": 0}])
def test_settings_out_of_range(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        Search(**setting)  # type: ignore[arg-type]
