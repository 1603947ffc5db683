"""Weights-only statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from defense_core.architectures import build
from defense_core.errors import ConfigError, NonFiniteOutputs
from defense_core.progress import NullProgress
from defense_core.scan.base import Deadline, OutOfTime, Subject, subject_of
from defense_core.scan.weights import INDICATORS, WeightsConfig, head_rows, log_weight_norm, row_deviations, weights
from defense_core.task import ImageClassification


def _subject(model: nn.Module, num_classes: int = 10, *, deadline: Deadline = Deadline()) -> Subject:
    task = ImageClassification((1, 8, 8), num_classes, mean=(0.5,), std=(0.5,))
    return subject_of(model, None, task=task, seed=0, device="cpu", progress=NullProgress(), deadline=deadline)


def _network() -> nn.Module:
    return build("small_cnn", {"width": 8, "in_channels": 1, "num_classes": 10})


def test_a_row_with_larger_weights_stands_out() -> None:
    model = _network()
    with torch.no_grad():
        model.linear.weight[7] = model.linear.weight[7].abs() * 4
    observation = weights(_subject(model))
    assert observation.targets == (7,)
    assert observation.class_scores[7] == max(observation.class_scores)
    assert "class 7" in observation.why


def test_deviations_are_the_formula_and_know_no_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, bias = torch.randn(9, 6, generator=generator).double(), torch.randn(9, generator=generator).double()
    found = row_deviations(rows, bias, relative_floor=0.05)
    assert tuple(found) == INDICATORS
    norms = [math.sqrt(sum(value**2 for value in row)) for row in rows.tolist()]
    middle = sorted(norms)[4]
    spread = 1.4826 * sorted(abs(norm - middle) for norm in norms)[4]
    floor = 0.05 * math.sqrt(sum(norm**2 for norm in norms) / 9)
    assert found["norm"].tolist() == pytest.approx([(norm - middle) / (spread + floor) for norm in norms])
    scaled = row_deviations(1000 * rows, 1000 * bias, relative_floor=0.05)
    assert all(torch.allclose(found[name], scaled[name]) for name in INDICATORS)


def test_equal_rows_stand_nowhere() -> None:
    found = row_deviations(torch.ones(5, 3).double(), torch.zeros(5).double(), relative_floor=0.05)
    assert all(not value.any() for value in found.values())


def test_log_weight_norm_is_of_matrices_alone() -> None:
    model = nn.Linear(3, 2)
    nn.init.constant_(model.weight, -0.5)
    nn.init.constant_(model.bias, 100.0)
    assert log_weight_norm(model) == pytest.approx(math.log(0.5))


def test_a_head_of_another_size_gives_no_scores() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 20), nn.Unflatten(1, (10, 2)), nn.AdaptiveMaxPool1d(1), nn.Flatten()
    )
    assert head_rows(model, 10) is None
    observation = weights(_subject(model))
    assert (observation.statistic, observation.class_scores, observation.targets) == (0.0, (), ())


def test_same_model_same_observation_and_it_stays() -> None:
    model = _network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again = weights(_subject(model)), weights(_subject(model))
    assert (first.class_scores, first.facts) == (again.class_scores, again.facts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_finite_are_refused() -> None:
    model = _network()
    with torch.no_grad():
        model.linear.bias[0] = math.nan
    with pytest.raises(NonFiniteOutputs):
        weights(_subject(model))


def test_the_deadline_ends_it() -> None:
    with pytest.raises(OutOfTime):
        weights(_subject(_network(), deadline=Deadline(0.0)))


@pytest.mark.parametrize("values", [{"far": 0.0}, {"relative_floor": 0.0}])
def test_settings_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        WeightsConfig(**values)
