"""Neuron weight change and zero reinitialisation against slow loops, and the stop rule of the ascent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.inference import accuracy
from defense_core.layers import UnitLayer, unit_layers
from defense_core.progress import NullProgress
from defense_core.purify import stage_one, tsbd
from defense_core.purify.stage_one import unlearn
from defense_core.purify.tsbd import TSBDConfig
from defense_core.purify.zeroing import neuron_weight_change, weight_changes, zero, zero_masks
from defense_core.task import ImageClassification


def layers_of(*shapes: tuple[int, ...]) -> list[UnitLayer]:
    kinds = {2: "linear", 4: "conv"}
    return [
        UnitLayer(f"layer{i}.weight", nn.Parameter(torch.zeros(shape)), kinds[len(shape)])  # type: ignore[arg-type]
        for i, shape in enumerate(shapes)
    ]


def slow_masks(changes: list[Tensor], *, n: float, m: float, variant: str) -> list[Tensor]:
    """Stage 1c in plain loops: choose units by NWC, then weights by change. Needs distinct NWCs."""
    scores = []
    for layer, change in enumerate(changes):
        for unit in range(change.shape[0]):
            scores.append((float(change[unit].sum()), layer, unit))
    count = math.floor(n * len(scores))
    chosen = {(layer, unit) for _, layer, unit in sorted(scores, reverse=True)[:count]}
    masks = [torch.zeros_like(change, dtype=torch.bool) for change in changes]
    pool = sorted((float(v) for layer, unit in chosen for v in changes[layer][unit].flatten()), reverse=True)
    for layer, unit in chosen:
        own = sorted((float(v) for v in changes[layer][unit].flatten()), reverse=True)
        ranked = pool if variant == "v3" else own
        threshold = -math.inf if variant == "v1" else ranked[max(1, math.floor(m * len(ranked))) - 1]
        values, mask = changes[layer][unit].flatten(), masks[layer][unit].view(-1)
        for position in range(len(values)):
            mask[position] = float(values[position]) >= threshold
    return masks


shapes = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 4)),
        st.tuples(st.integers(1, 4), st.integers(1, 2), st.just(3), st.just(3)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=shapes,
    seed=st.integers(0, 10_000),
    n=st.floats(0, 1, exclude_max=True),
    m=st.floats(0.001, 1),
    variant=st.sampled_from(["v1", "v2", "v3"]),
    coarse=st.booleans(),
)
def test_masks_agree_with_slow_loops(
    shapes: list[tuple[int, ...]], seed: int, n: float, m: float, variant: Any, coarse: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layers = layers_of(*shapes)
    changes = [torch.rand(layer.weight.shape, generator=generator) for layer in layers]
    if coarse:
        # Many equal changes: thresholds fall on ties. Units keep distinct sums by a different offset each.
        changes = [(change * 3).floor() / 4 for change in changes]
        totals = [float(change[unit].sum()) for change in changes for unit in range(len(change))]
        if len(set(totals)) != len(totals):
            return
    got = zero_masks(layers, changes, n=n, m=m, variant=variant)
    for one, other in zip(got, slow_masks(changes, n=n, m=m, variant=variant), strict=True):
        assert torch.equal(one, other)


def test_masks_by_hand() -> None:
    layers = layers_of((2, 3), (2, 2))
    changes = [torch.tensor([[9.0, 1.0, 2.0], [0.1, 0.2, 0.3]]), torch.tensor([[5.0, 4.0], [0.0, 0.0]])]
    # Four units, n = 0.5: the two of NWC 12 and 9; their five weights are 9, 5, 4, 2, 1.
    v3 = zero_masks(layers, changes, n=0.5, m=0.6, variant="v3")
    assert v3[0].tolist() == [[True, False, False], [False] * 3]
    assert v3[1].tolist() == [[True, True], [False, False]]
    v2 = zero_masks(layers, changes, n=0.5, m=0.6, variant="v2")
    assert v2[0].tolist() == [[True, False, False], [False] * 3]
    assert v2[1].tolist() == [[True, False], [False, False]]
    v1 = zero_masks(layers, changes, n=0.5, m=0.6, variant="v1")
    assert v1[0].tolist() == [[True] * 3, [False] * 3]
    assert v1[1].tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("variant", ["v1", "v2", "v3"])
def test_ties_at_the_weight_threshold_are_included(variant: Any) -> None:
    # One unit of two is chosen, and the half of its four weights ends in a tie of three.
    changes = [torch.tensor([[2.0, 1.0, 1.0, 1.0]]), torch.zeros(1, 1)]
    one = zero_masks(layers_of((1, 4), (1, 1)), changes, n=0.5, m=0.5, variant=variant)
    assert one[0].all()
    assert not one[1].any()


@pytest.mark.parametrize("variant", ["v1", "v2", "v3"])
def test_ratio_rules(variant: Any) -> None:
    layers = layers_of((7, 3))
    changes = [torch.arange(21.0).reshape(7, 3)]
    for n, units in ((0.0, 0), (0.14, 0), (0.15, 1), (2 / 7 + 1e-9, 2), (0.99, 6)):
        mask = zero_masks(layers, changes, n=n, m=1.0, variant=variant)[0]
        assert int(mask.any(1).sum()) == units == math.floor(n * 7)
        # m = 1: every weight of the chosen units, and none elsewhere.
        assert int(mask.sum()) == 3 * units
        assert not mask[: 7 - units].any()
    # However small m is, one weight goes.
    tiny = zero_masks(layers, changes, n=0.15, m=1e-6, variant=variant)[0]
    assert int(tiny.sum()) == (3 if variant == "v1" else 1)
    assert tiny[6, 2]


def test_a_network_without_hidden_layers_has_nothing_to_zero() -> None:
    assert zero_masks([], [], n=0.35, m=1.0) == []


def test_equal_units_are_still_chosen_in_the_right_number() -> None:
    mask = zero_masks(layers_of((10, 2)), [torch.ones(10, 2)], n=0.35, m=1.0)[0]
    assert int(mask.any(1).sum()) == 3


def test_weight_change_and_nwc_against_loops() -> None:
    model, moved = (build("small_cnn", {"width": 3, "num_classes": 4}) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    layers = unit_layers(model)
    changes = weight_changes(layers, dict(moved.named_parameters()))
    scores = neuron_weight_change(layers, changes)
    targets = dict(moved.named_parameters())
    for layer, change, score in zip(layers, changes, scores, strict=True):
        assert change.shape == layer.weight.shape
        for unit in range(layer.units):
            by_hand = 0.0
            before, after = layer.weight[unit].flatten().tolist(), targets[layer.name][unit].flatten().tolist()
            for old, new in zip(before, after, strict=True):
                by_hand += abs(new - old)
            assert float(score[unit].detach()) == pytest.approx(by_hand, rel=1e-5)


def test_scores_are_never_rounded() -> None:
    layers = layers_of((2, 1))
    changes = [torch.tensor([[1.0], [1.0 + 1e-6]])]
    assert zero_masks(layers, changes, n=0.5, m=1.0)[0].tolist() == [[False], [True]]


def test_zero_touches_only_what_was_selected() -> None:
    layers = layers_of((3, 2))
    with torch.no_grad():
        layers[0].weight.copy_(torch.arange(1.0, 7.0).reshape(3, 2))
    zero(layers, [torch.tensor([[True, False], [False, False], [False, True]])])
    assert layers[0].weight.tolist() == [[0.0, 2.0], [3.0, 4.0], [5.0, 0.0]]


# -- the stop rule -----------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize(("before", "depth"), [(1.0, 0.5), (0.9, 0.25), (0.8, 1.0)])
def test_the_ascent_stops_at_a_share_of_the_way_to_chance(
    classes: int, before: float, depth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``a <= a0 - depth * (a0 - 1/K)``: halfway is 0.55 for ten classes and 0.75 for two."""
    stop = before - depth * (before - 1 / classes)
    readings = iter([before, before, stop + 1e-6, stop - 1e-6, 0.0, 0.0])
    monkeypatch.setattr(stage_one, "accuracy", lambda *_, **__: next(readings))
    model = build("small_cnn", {"width": 2, "num_classes": classes})
    images = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    data = CleanSet(images, torch.zeros(8, dtype=torch.int64), classes)
    history = unlearn(
        model,
        data,
        TSBDConfig(unlearn_depth=depth, unlearn_epochs=5, unlearn_lr=1e-6, batch_size=4),
        task=ImageClassification((1, 8, 8), classes, (0.5,), (0.5,)),
        seed=0,
        device="cpu",
        progress=NullProgress(),
    )
    assert [row["accuracy"] for row in history] == [before, stop + 1e-6, stop - 1e-6]


def test_the_ascent_unlearns_and_its_history_says_so() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    images = (torch.randint(0, 60, (40, 1, 8, 8), generator=generator) + 150 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    data, task = CleanSet(images, labels, 2), ImageClassification((1, 8, 8), 2, (0.5,), (0.5,))
    model = build("small_cnn", {"width": 4, "num_classes": 2})
    shared: dict[str, Any] = {"task": task, "seed": 0, "device": "cpu", "progress": NullProgress()}
    tsbd.repair(model, data, TSBDConfig(epochs=10, batch_size=8), lr=0.05, name="repair", **shared)
    assert accuracy(model, data, task=task, device="cpu") > 0.95
    history = unlearn(model, data, TSBDConfig(unlearn_lr=0.5, unlearn_epochs=20, batch_size=8), **shared)
    assert history[-1]["accuracy"] <= 0.75
    assert accuracy(model, data, task=task, device="cpu") == pytest.approx(history[-1]["accuracy"])
    assert all(row["loss"] > 0 for row in history), "the loss is reported with its own sign"
