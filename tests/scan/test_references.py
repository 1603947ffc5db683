"""Recipes of the reference models that a calibration pool is made of."""

from __future__ import annotations

import pytest

from defense_core.errors import ConfigError
from defense_core.scan.references import ReferenceTraining

MIDDLE = ReferenceTraining(epochs=20, batch_size=64, lr=0.04, weight_decay=1e-3)


def test_a_number_always_gives_the_same_recipe() -> None:
    assert MIDDLE.varied(7) == MIDDLE.varied(7)


def test_sixty_references_are_trained_in_every_way() -> None:
    recipes = [MIDDLE.varied(number) for number in range(60)]
    tunings = [tuning for tuning, _, _ in recipes]
    assert {tuning.schedule for tuning in tunings} == {"constant", "cosine", "onecycle"}
    assert {tuning.batch_size for tuning in tunings} == {32, 64, 128}
    assert {augment for _, _, augment in recipes} == {"none", "crop", "crop_flip"}
    assert all(10 <= tuning.epochs <= 30 for tuning in tunings)
    assert all(0.5 <= share <= 1 for _, share, _ in recipes)


def test_a_rate_that_stays_is_a_quarter_of_one_that_falls() -> None:
    by_schedule: dict[str, set[float]] = {}
    for number in range(60):
        tuning, _, _ = MIDDLE.varied(number)
        by_schedule.setdefault(tuning.schedule, set()).add(tuning.lr)
    assert by_schedule == {"constant": {0.005, 0.01}, "cosine": {0.02, 0.04}, "onecycle": {0.02, 0.04}}


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}, {"weight_decay": -1.0}])
def test_a_recipe_that_trains_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ReferenceTraining(**wrong)  # type: ignore[arg-type]
