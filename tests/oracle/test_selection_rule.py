"""The rule that chooses strengths reads the select split with caution."""

from __future__ import annotations

import math

import pytest
import torch

from defense_core.data import CleanSet, Splits
from defense_core.errors import MethodDiverged
from defense_core.purify.choice import (
    cautious_accuracy,
    choosers,
    strongest_by_halving,
    strongest_expected,
    strongest_training,
    strongest_within,
)


@pytest.mark.parametrize(("seed", "images"), [(0, 1), (1, 79), (2, 200)])
def test_cautious_accuracy_is_accuracy_less_one_paired_standard_error(seed, images):
    generator = torch.Generator().manual_seed(seed)
    before, after = (torch.rand(2, images, generator=generator) < 0.7).unbind()
    lost = sum(1 for old, new in zip(before.tolist(), after.tolist(), strict=True) if old and not new)
    won = sum(1 for old, new in zip(before.tolist(), after.tolist(), strict=True) if new and not old)
    expected = sum(after.tolist()) / images - math.sqrt(lost + won) / images
    assert cautious_accuracy(before, after) == pytest.approx(expected, abs=1e-6)


def test_no_caution_where_no_image_changed_sides():
    same = torch.tensor([True, True, False, True])
    assert cautious_accuracy(same, same.clone()) == 0.75


@pytest.mark.parametrize(("lost", "chosen"), [(3, 2.0), (4, 1.0)])
def test_the_bound_is_never_tighter_than_three_images(lost, chosen):
    accuracies = {1.0: 0.9, 2.0: 0.9 - lost / 100}
    strength, made, trials = strongest_within(
        (1.0, 2.0), lambda each: (accuracies[each], str(each)), reference=0.9, max_drop=0.0, images=100
    )
    assert (strength, made) == (chosen, str(chosen))
    assert [row["strength"] for row in trials] == [1.0, 2.0]


def test_without_a_select_split_only_the_weakest_training_is_tried():
    some = CleanSet(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), 2)
    nothing = some.subset(torch.tensor([], dtype=torch.int64))

    def tried(splits: Splits) -> list[float]:
        _, _, trials = strongest_training(
            (0.2, 0.01, 0.05), lambda each: (0.9, each), clean=splits, reference=0.9, max_drop=0.0
        )
        return [row["strength"] for row in trials]

    assert tried(Splits(some, nothing, nothing)) == [0.01]
    assert tried(Splits(some, some, nothing)) == [0.01, 0.05, 0.2]


def test_each_view_of_an_image_counts_as_one_in_the_bound():
    some = CleanSet(torch.zeros(20, 1, 4, 4, dtype=torch.uint8), torch.arange(20) % 2, 2)
    accuracies = {1.0: 0.9, 2.0: 0.9 - 2 / 20}
    chosen = [
        strongest_training(
            (1.0, 2.0), lambda each: (accuracies[each], each),
            clean=Splits(some, some, some), reference=0.9, max_drop=0.0, views=views,
        )[0]
        for views in (1, 6)
    ]  # fmt: skip
    assert chosen == [2.0, 1.0], "two of 20 images, but 12 of 120 views"


def test_of_ten_images_one_may_be_lost_and_of_three_none():
    ten = CleanSet(torch.zeros(10, 1, 4, 4, dtype=torch.uint8), torch.arange(10), 10)
    nothing, one = ten.subset(torch.tensor([], dtype=torch.int64)), ten.subset(torch.arange(1))
    forty = ten.subset(torch.arange(40) % 10)
    assert choosers(Splits(ten, nothing, nothing)) == 30
    assert choosers(Splits(ten, ten, nothing)) == 30
    assert choosers(Splits(forty, nothing, nothing)) == 40
    assert choosers(Splits(ten, forty, nothing)) == 40
    chosen, _, _ = strongest_training(
        (1.0, 2.0), lambda each: (1.0 if each == 1 else 0.0, each), clean=Splits(ten, one, nothing), reference=1.0,
        max_drop=0.03,
    )  # fmt: skip
    assert chosen == 1.0, "the only image that was kept back is lost at 2"


# -- many strengths that lie close together --------------------------------------------------


def split_of(images: int) -> Splits:
    some = CleanSet(torch.zeros(images, 1, 4, 4, dtype=torch.uint8), torch.arange(images) % 2, 2)
    return Splits(some, some, some)


def searched(rule, costs: list[float | None], *, clean: Splits, max_drop: float = 0.05):
    """(strength, what was made, strengths tried) where the strength ``n`` costs ``costs[n]``, or diverges."""

    def attempt(strength: float) -> tuple[float, str]:
        cost = costs[int(strength)]
        if cost is None:
            raise MethodDiverged("diverged")
        return -cost, f"made at {strength:g}"

    strengths = tuple(map(float, range(len(costs))))
    chosen, made, trials = rule(strengths, attempt, clean=clean, max_drop=max_drop)
    return chosen, made, [row["strength"] for row in trials]


@pytest.mark.parametrize("count", range(1, 13))
def test_halving_takes_what_the_ascent_takes_where_more_costs_more(count):
    clean = split_of(200)
    for permitted in range(count + 1):
        for beyond in (0.2, None):
            costs = [0.01] * permitted + [beyond] * (count - permitted)
            if costs[0] is None:
                continue
            slow = searched(strongest_expected, costs, clean=clean)
            fast = searched(strongest_by_halving, costs, clean=clean)
            assert fast[:2] == slow[:2]
            assert len(fast[2]) <= math.ceil(math.log2(count)) + 1
            assert len(set(fast[2])) == len(fast[2]), "each is tried once"


@pytest.mark.parametrize("seed", range(20))
def test_what_halving_takes_holds_the_bound_or_is_the_weakest(seed):
    costs = torch.rand(10, generator=torch.Generator().manual_seed(seed)).mul(0.1).tolist()
    chosen, made, tried = searched(strongest_by_halving, costs, clean=split_of(200))
    assert made == f"made at {chosen:g}"
    assert chosen in tried
    assert costs[int(chosen)] <= 0.05 or chosen == 0
    assert all(costs[int(each)] > 0.05 for each in tried if each > chosen), "a stronger one that was tried held it too"


def test_where_even_the_weakest_diverges_halving_says_so():
    with pytest.raises(MethodDiverged):
        searched(strongest_by_halving, [None, None, None], clean=split_of(200))


def test_without_a_select_split_halving_tries_the_weakest_alone():
    some = split_of(200)
    nothing = some.fit.subset(torch.tensor([], dtype=torch.int64))
    fitted = Splits(some.fit, nothing, nothing)
    assert searched(strongest_by_halving, [0.0] * 10, clean=fitted) == (0.0, "made at 0", [0.0])
