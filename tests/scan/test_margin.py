"""Maximum margin: the formula, and what holds for every detector."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.errors import ConfigError, NonFiniteOutputs
from defense_core.progress import NullProgress
from defense_core.scan.base import Deadline, OutOfTime, Subject, subject_of
from defense_core.scan.margin import MarginConfig, log_margins, margin, margins_of
from defense_core.task import ImageClassification
from pipelines.demo import TASK, DemoInputs

SMALL = MarginConfig(starts=2, steps=4, screening_steps=2)


class Counting(nn.Module):
    """A linear network that counts the images it is shown."""

    def __init__(self, num_classes: int, *, gain: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, 16, generator=generator))
        self.gain = gain
        self.seen = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen += len(inputs)
        return self.gain * inputs.flatten(1) @ self.weight.T


def _subject(model: nn.Module, num_classes: int, *, seed: int = 0, deadline: Deadline = Deadline()) -> Subject:
    task = ImageClassification((1, 4, 4), num_classes, mean=(0.5,), std=(0.5,))
    return subject_of(model, None, task=task, seed=seed, device="cpu", progress=NullProgress(), deadline=deadline)


def test_margin_is_own_logit_minus_the_best_other() -> None:
    logits = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    slow = [row[c] - max(v for k, v in enumerate(row) if k != c)
            for row, c in zip(logits.tolist(), classes.tolist(), strict=True)]  # fmt: skip
    assert margins_of(logits, classes).tolist() == pytest.approx(slow)
    assert margins_of(logits.log_softmax(1), classes).tolist() == pytest.approx(slow, abs=1e-5)


def test_a_linear_model_reaches_its_largest_margin() -> None:
    """Two classes: the margin is linear in the image, and its maximum over the cube is known."""
    model = Counting(2)
    observation = margin(_subject(model, 2), MarginConfig(steps=60))
    difference = (model.weight[0] - model.weight[1]).detach()
    assert observation.facts["margins"] == pytest.approx([float(difference.abs().sum())] * 2, rel=1e-3)
    assert observation.facts["settled"]


def test_logarithms_bear_margins_that_are_not_positive() -> None:
    assert log_margins(torch.tensor([8.0, -1.0, 0.0])).tolist() == pytest.approx([math.log(8)] + [math.log(8e-3)] * 2)
    assert log_margins(torch.tensor([-2.0, 0.0])).tolist() == [0.0, 0.0]


def test_the_statistic_knows_no_scale() -> None:
    plain, large = (margin(_subject(Counting(6, gain=gain), 6), SMALL) for gain in (1.0, 64.0))
    assert plain.statistic == pytest.approx(large.statistic, rel=1e-4)
    assert large.facts["mean_log_margin"] - plain.facts["mean_log_margin"] == pytest.approx(math.log(64), rel=1e-4)


def test_same_seed_same_observation_and_the_model_stays() -> None:
    model = build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 5})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, again, other = (margin(_subject(model, 5, seed=seed), SMALL) for seed in (3, 3, 4))
    assert (first.class_scores, first.facts) == (again.class_scores, again.facts)
    assert first.class_scores != other.class_scores
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_hundred_classes_cost_at_most_three_times_ten() -> None:
    costs = []
    for num_classes in (10, 100):
        subject = _subject(Counting(num_classes), num_classes)
        observation = margin(subject)
        assert isinstance(subject.model, Counting)
        costs.append(subject.model.seen)
    assert len(observation.classes) == 16
    assert costs[0] <= 4500
    assert costs[1] <= 3 * costs[0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(NonFiniteOutputs):
        margin(_subject(Counting(3, gain=broken), 3), SMALL)


def test_the_deadline_ends_it() -> None:
    with pytest.raises(OutOfTime):
        margin(_subject(Counting(3), 3, deadline=Deadline(0.0)), SMALL)


@pytest.mark.parametrize("values", [{"starts": 0}, {"steps": 0}, {"step_size": 0.0}, {"screening_steps": 0}])
def test_settings_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        MarginConfig(**values)  # type: ignore[arg-type]


def test_a_planted_backdoor_is_named(digits_victim: DemoInputs) -> None:
    subject = subject_of(digits_victim.model, None, task=TASK, seed=0, device="cpu", progress=NullProgress())
    observation = margin(subject)
    assert observation.targets[0] == 0
    assert observation.class_scores[0] == max(observation.class_scores)
