"""Additive perturbations: the scores against a slow computation, a planted pattern, and what ends the search."""

from __future__ import annotations

import math
from statistics import mean

import pytest
import torch
from torch import Tensor, nn

from defense_core.data import CleanSet
from defense_core.errors import NonFiniteOutputs
from defense_core.progress import NullProgress
from defense_core.scan.additive import AdditiveConfig, additive
from defense_core.scan.base import Deadline, OutOfTime, Subject, outlying, subject_of
from defense_core.scan.sampling import halves
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 4, 4), 4, mean=(0.0,), std=(1.0,))
SIGNS = torch.tensor([1.0, -1.0]).repeat(8)


class Linear(nn.Module):
    """Logits that know no brightness; class 2 follows a pattern of signs as well."""

    def __init__(self, strength: float, *, gain: float = 1.0) -> None:
        super().__init__()
        weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
        weight[2] += strength * SIGNS
        self.weight = nn.Parameter(weight - weight.mean(1, keepdim=True))
        self.gain = gain

    def forward(self, inputs: Tensor) -> Tensor:
        return self.gain * inputs.flatten(1) @ self.weight.T


def images(count: int = 48) -> CleanSet:
    """Flat images of any brightness, with some noise."""
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(40, 200, (count, 1, 1, 1), generator=draw)
    pixels = pixels + torch.randint(-16, 17, (count, 1, 4, 4), generator=draw)
    return CleanSet(pixels.to(torch.uint8), torch.arange(count) % 4, 4)


def subject(model: nn.Module, *, deadline: Deadline = Deadline()) -> Subject:
    return subject_of(model, images(), task=TASK, device="cpu", progress=NullProgress(), deadline=deadline)


def test_a_score_is_the_mean_margin_on_the_other_half_in_deviations_of_the_logits() -> None:
    asked = subject(Linear(1.0))
    found = additive(asked, AdditiveConfig())
    _, judged = halves(asked, asked.generator())
    pixels = judged.images.float()
    scale = float(asked.model(pixels / 255).std())
    scores, reached = [], []
    for trigger in found.triggers:
        margins = []
        for image, label in zip(pixels, judged.labels.tolist(), strict=True):
            if label != trigger.target:
                changed = (image + trigger.pattern).clamp(0, 255) / 255
                logits = asked.model(changed[None])[0].tolist()
                margins.append(logits.pop(trigger.target) - max(logits))
        scores.append(mean(margins) / scale)
        reached.append(mean(margin > 0 for margin in margins))
    assert found.classes == tuple(trigger.target for trigger in found.triggers) == (0, 1, 2, 3)
    assert found.class_scores == pytest.approx(scores, rel=1e-4)
    assert found.facts["reached"] == pytest.approx(reached)
    assert found.statistic == pytest.approx(outlying(scores, floor=0.1)[0], rel=1e-3)


@pytest.mark.parametrize(("config", "bound"), [(AdditiveConfig(), 6.0), (AdditiveConfig(epsilon=2.5), 2.5)])
def test_every_change_keeps_to_its_bound(config: AdditiveConfig, bound: float) -> None:
    found = additive(subject(Linear(0.0)), config)
    assert [trigger.kind for trigger in found.triggers] == ["additive"] * 4
    assert [float(trigger.pattern.abs().max()) for trigger in found.triggers] == [bound] * 4


def test_a_planted_pattern_of_signs_stands_out_with_its_class() -> None:
    planted, clean = (additive(subject(Linear(strength)), AdditiveConfig()) for strength in (8.0, 0.0))
    assert planted.targets == (2,)
    assert planted.statistic > 2 * clean.statistic
    assert torch.equal(planted.triggers[2].pattern.flatten().sign(), SIGNS)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(NonFiniteOutputs):
        additive(subject(Linear(0.0, gain=broken)), AdditiveConfig(steps=2))


def test_the_deadline_ends_it() -> None:
    with pytest.raises(OutOfTime):
        additive(subject(Linear(0.0), deadline=Deadline(at_s=0.0)), AdditiveConfig())
