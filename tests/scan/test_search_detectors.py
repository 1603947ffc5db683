"""What holds for every detector that searches with clean images: one table of laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.errors import Cancelled, ConfigError, DataError, NonFiniteOutputs
from defense_core.progress import NullProgress
from defense_core.scan.base import Deadline, Observation, OutOfTime, Subject, subject_of
from defense_core.scan.generator import GeneratorConfig, generator
from defense_core.scan.pairs import PairsConfig, pairs
from defense_core.scan.patch import PatchConfig, patch
from defense_core.scan.stored_triggers import load_triggers, save_triggers
from defense_core.scan.token import TokenConfig, token
from defense_core.task import ImageClassification


@dataclass(frozen=True)
class Row:
    """A detector with a quick configuration."""

    function: Callable[[Subject, Any], Observation]
    quick: Any
    default: Any
    most_units: int


DETECTORS = {
    "patch": Row(patch, PatchConfig(steps=3, batch_size=2), PatchConfig(), 10_000),
    "pairs": Row(pairs, PairsConfig(steps=3, images=2), PairsConfig(), 12_000),
    "generator": Row(generator, GeneratorConfig(steps=3, batch_size=2), GeneratorConfig(), 12_000),
    "token": Row(token, TokenConfig(tried=2, steps=3, batch_size=2), TokenConfig(), 12_000),
}
every = pytest.mark.parametrize("row", DETECTORS.values(), ids=DETECTORS)


class Linear(nn.Module):
    """Counts the images that it is shown with and without a gradient; ``embed`` says that it cuts them into patches."""

    def __init__(self, num_classes: int, pixels: int, answer: float = 1.0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(num_classes, pixels, generator=draws))
        self.embed = nn.Conv2d(1, 1, 2, stride=2)
        self.answer = answer
        self.searched = self.judged = 0

    def forward(self, inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.searched += len(inputs)
        else:
            self.judged += len(inputs)
        return self.answer * inputs.flatten(1) @ self.weight.T


def images_of(num_classes: int, count: int, shape: tuple[int, int, int]) -> CleanSet:
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, *shape), generator=draws).to(torch.uint8)
    return CleanSet(images, torch.arange(count) % num_classes, num_classes)


def subject(
    model: nn.Module,
    num_classes: int,
    *,
    images: CleanSet | None = None,
    shape: tuple[int, int, int] = (1, 4, 4),
    seed: int = 0,
    deadline: Deadline = Deadline(),
    progress: NullProgress | None = None,
) -> Subject:
    task = ImageClassification(shape, num_classes, mean=(0.5,) * shape[0], std=(0.5,) * shape[0])
    clean = images_of(num_classes, max(20, 2 * num_classes), shape) if images is None else images
    return subject_of(
        model, clean, task=task, seed=seed, device="cpu", progress=progress or NullProgress(), deadline=deadline
    )


def counted(row: Row, num_classes: int) -> tuple[int, int]:
    """(images searched with, images judged on) of the default configuration."""
    asked = subject(Linear(num_classes, 16), num_classes)
    row.function(asked, row.default)
    assert isinstance(asked.model, Linear)
    return asked.model.searched, asked.model.judged


@every
def test_the_model_and_the_global_generator_are_left_as_they_are(row: Row) -> None:
    model = build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 4})
    asked = subject(model, 4, shape=(1, 8, 8))
    networks = (model, asked.model)
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    state = torch.get_rng_state()
    row.function(asked, row.quick)
    assert torch.equal(torch.get_rng_state(), state)
    for searched, kept in zip(networks, before, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in searched.state_dict().items())
    assert all(parameter.grad is None for parameter in asked.model.parameters())


@every
def test_the_same_seed_gives_the_same_numbers(row: Row) -> None:
    first, again, other = (row.function(subject(Linear(4, 16), 4, seed=seed), row.quick) for seed in (3, 3, 4))
    assert (first.statistic, first.class_scores, first.pairs) == (again.statistic, again.class_scores, again.pairs)
    assert torch.equal(first.triggers[0].pattern, again.triggers[0].pattern)
    assert not torch.equal(first.triggers[0].pattern, other.triggers[0].pattern)


@every
def test_a_deadline_or_a_stop_ends_the_search(row: Row) -> None:
    with pytest.raises(OutOfTime):
        row.function(subject(Linear(4, 16), 4, deadline=Deadline(at_s=0.0)), row.quick)
    with pytest.raises(Cancelled):
        row.function(subject(Linear(4, 16), 4, progress=NullProgress(lambda: True)), row.quick)


@every
def test_nan_is_no_answer(row: Row) -> None:
    with pytest.raises(NonFiniteOutputs):
        row.function(subject(Linear(4, 16, answer=math.nan), 4), row.quick)


@every
def test_no_images_are_an_error_that_says_so(row: Row) -> None:
    lacking = replace(subject(Linear(4, 16), 4), images=None)
    with pytest.raises(DataError, match="needs clean images: expected 2 or more, got 0"):
        row.function(lacking, row.quick)


@every
@pytest.mark.parametrize("num_classes", [2, 3, 11])
def test_any_number_of_classes(row: Row, num_classes: int) -> None:
    found = row.function(subject(Linear(num_classes, 16), num_classes), row.quick)
    assert math.isfinite(found.statistic)
    assert all(0 <= target < num_classes for target in found.targets)
    assert len(found.class_scores) == len(found.classes)


@every
@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        (
            "vit_tiny",
            {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 1, "heads": 2, "in_channels": 3},
            (3, 8, 8),
        ),
        ("preact_resnet18", {"width": 4, "in_channels": 1}, (1, 8, 12)),
    ],
)
def test_networks_with_and_without_batch_normalisation(
    row: Row, name: str, arguments: dict[str, Any], shape: tuple[int, int, int]
) -> None:
    model = build(name, {**arguments, "num_classes": 4})
    found = row.function(subject(model, 4, shape=shape), row.quick)
    assert math.isfinite(found.statistic)
    assert found.measured or (row.function is token and name == "preact_resnet18")
    assert len(found.triggers) >= found.measured
    for trigger in found.triggers:
        assert trigger.pattern.shape == shape
        changed = trigger.apply(images_of(4, 3, shape).images)
        assert changed.shape == (3, *shape)
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 255


@every
def test_all_triggers_can_be_kept_and_read_again(row: Row, tmp_path: Path) -> None:
    found = row.function(subject(Linear(10, 16), 10), row.quick)
    save_triggers(tmp_path, [(found.detector, trigger) for trigger in found.triggers])
    shown = images_of(10, 3, (1, 4, 4)).images
    for (detector, kept), trigger in zip(load_triggers(tmp_path), found.triggers, strict=True):
        assert (detector, kept.target) == (found.detector, trigger.target)
        assert torch.equal(kept.apply(shown), trigger.apply(shown))


@every
def test_ten_images_are_enough(row: Row) -> None:
    few = images_of(10, 10, (1, 4, 4))
    found = row.function(subject(Linear(10, 16), 10, images=few), row.quick)
    assert math.isfinite(found.statistic)


@every
def test_images_of_a_single_class_are_enough(row: Row) -> None:
    one = replace(images_of(4, 8, (1, 4, 4)), labels=torch.zeros(8, dtype=torch.int64))
    assert math.isfinite(row.function(subject(Linear(4, 16), 4, images=one), row.quick).statistic)


@every
def test_the_cost_is_bounded_and_hardly_grows_with_the_classes(row: Row) -> None:
    ten, judged = counted(row, 10)
    assert ten <= row.most_units
    assert judged <= 15_000
    hundred, judged_of_hundred = counted(row, 100)
    assert hundred + judged_of_hundred / 3 <= 3 * (ten + judged / 3)


@every
def test_settings_out_of_range_are_refused(row: Row) -> None:
    with pytest.raises(ConfigError, match="steps is out of range: expected 1 or more"):
        replace(row.quick, steps=0)
    with pytest.raises(ConfigError, match="lr"):
        replace(row.quick, lr=0.0)
