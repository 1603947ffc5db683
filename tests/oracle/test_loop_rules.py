"""Learning rates, batches and the selection rule against what their documentation says."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defense_core.errors import MethodDiverged
from defense_core.loop import Tuning, batch_indices, learning_rates
from defense_core.purify.choice import strongest_within


def rates(schedule: str, epochs: int, steps: int, lr: float = 0.1) -> list[float]:
    return list(learning_rates(Tuning(epochs, lr=lr, schedule=schedule), steps))  # type: ignore[arg-type]


# -- schedules ---------------------------------------------------------------------------


def test_constant() -> None:
    assert rates("constant", 3, 4) == [0.1] * 12


@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (4, 5), (3, 1)])
def test_cosine_is_that_of_torch(epochs: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=epochs * steps)
    expected = []
    for _ in range(epochs * steps):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates("cosine", epochs, steps) == pytest.approx(expected)


def test_onecycle_rises_over_the_first_third_and_falls_to_zero() -> None:
    total = 30
    found = rates("onecycle", 3, 10)
    assert max(found) == pytest.approx(0.1)
    assert found.index(max(found)) == total // 3 - 1
    assert found[0] == pytest.approx(0.01)
    assert found[: total // 3] == sorted(found[: total // 3])
    assert found[total // 3 :] == sorted(found[total // 3 :], reverse=True)
    assert found[-1] == pytest.approx(0.1 / 20)
    steps = [after - before for before, after in itertools.pairwise(found[10:])]
    assert steps == pytest.approx([steps[0]] * len(steps)), "the fall is a line"


@given(
    schedule=st.sampled_from(["constant", "cosine", "onecycle"]),
    epochs=st.integers(1, 6),
    steps=st.integers(1, 12),
    lr=st.floats(1e-6, 10),
)
def test_every_step_has_a_positive_rate_that_never_passes_the_peak(
    schedule: str, epochs: int, steps: int, lr: float
) -> None:
    found = rates(schedule, epochs, steps, lr)
    assert len(found) == epochs * steps
    assert all(0 < rate <= lr * (1 + 1e-9) for rate in found)


# -- batches -----------------------------------------------------------------------------


@given(count=st.integers(1, 400), size=st.integers(1, 70), seed=st.integers(0, 1000))
def test_a_pass_covers_every_sample_once_in_batches_that_batchnorm_can_train_on(
    count: int, size: int, seed: int
) -> None:
    batches = batch_indices(count, size, torch.Generator().manual_seed(seed))
    joined = torch.cat(batches)
    if count == 1:
        assert joined.tolist() == [0, 0]
        return
    assert sorted(joined.tolist()) == list(range(count))
    assert all(len(batch) >= 2 for batch in batches)
    assert all(len(batch) == max(size, 2) for batch in batches[:-1])
    assert len(batches[-1]) <= max(size, 2) + 1
    assert len(batches) in (math.ceil(count / max(size, 2)), math.ceil(count / max(size, 2)) - 1)


def test_order_is_shuffled_and_follows_the_generator() -> None:
    first, again, other = (torch.cat(batch_indices(100, 10, torch.Generator().manual_seed(s))) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, torch.arange(100))
    generator = torch.Generator().manual_seed(0)
    passes = [torch.cat(batch_indices(100, 10, generator)) for _ in range(2)]
    assert not torch.equal(*passes), "each pass has its own order"


# -- the selection rule ------------------------------------------------------------------


def choose(
    accuracies: dict[float, float | None], *, reference: float = 0.9, max_drop: float = 0.02, images: int = 1000
) -> tuple[float, str, list[dict[str, float | None]], list[float]]:
    tried: list[float] = []

    def attempt(strength: float) -> tuple[float, str]:
        tried.append(strength)
        reached = accuracies[strength]
        if reached is None:
            raise MethodDiverged("diverged")
        return reached, f"made at {strength}"

    chosen = strongest_within(tuple(accuracies), attempt, reference=reference, max_drop=max_drop, images=images)
    return *chosen, tried


def test_the_last_one_within_the_bound_is_taken() -> None:
    strength, made, trials, tried = choose({0.1: 0.9, 0.2: 0.89, 0.3: 0.88, 0.4: 0.87, 0.5: 0.9})
    assert (strength, made) == (0.3, "made at 0.3")
    assert tried == [0.1, 0.2, 0.3, 0.4], "what costs too much ends the search"
    assert trials[-1] == {"strength": 0.4, "accuracy": 0.87}


def test_candidates_are_tried_in_ascending_order() -> None:
    strength, _, _, tried = choose({0.3: 0.9, 0.1: 0.9, 0.2: 0.9})
    assert tried == [0.1, 0.2, 0.3]
    assert strength == 0.3


def test_the_weakest_is_taken_where_even_that_costs_too_much() -> None:
    strength, made, trials, tried = choose({0.1: 0.5, 0.2: 0.9})
    assert (strength, made) == (0.1, "made at 0.1")
    assert tried == [0.1]
    assert len(trials) == 1


def test_a_single_candidate_is_no_choice() -> None:
    assert choose({0.1: 0.0})[0] == 0.1


def test_a_gain_is_never_a_cost() -> None:
    assert choose({0.1: 0.9, 0.2: 1.0}, reference=0.9, max_drop=0.0)[0] == 0.2


@pytest.mark.parametrize(("images", "expected"), [(20, 0.2), (1000, 0.1)])
def test_on_a_small_split_the_bound_is_two_images(images: int, expected: float) -> None:
    assert choose({0.1: 0.9, 0.2: 0.9 - 2 / 20}, max_drop=0.01, images=images)[0] == expected


def test_the_bound_itself_is_permitted_whatever_the_rounding() -> None:
    assert choose({0.1: 0.9, 0.2: 0.9 - 0.02})[0] == 0.2


def test_a_candidate_that_diverges_ends_the_search_and_is_on_record() -> None:
    strength, made, trials, tried = choose({0.1: 0.9, 0.2: 0.9, 0.3: None, 0.4: 0.9})
    assert (strength, made) == (0.2, "made at 0.2")
    assert tried == [0.1, 0.2, 0.3]
    assert trials[-1] == {"strength": 0.3, "accuracy": None}


def test_the_weakest_may_not_diverge() -> None:
    with pytest.raises(MethodDiverged):
        choose({0.1: None, 0.2: 0.9})
