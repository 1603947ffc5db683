"""Inversion inside one token: the grid against its definition, the batched descent against one item at a time, and a
planted trigger."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.progress import NullProgress
from defense_core.scan import token as module
from defense_core.scan.base import SHORTLISTED, Observation, Subject, subject_of
from defense_core.scan.observe import Observed
from defense_core.scan.references import file_readings
from defense_core.scan.sampling import ADAM_BETAS, drawn, ease, halves, others
from defense_core.scan.token import SUREST, TokenConfig, grid, patch_size, token
from defense_core.task import ImageClassification

TARGET, CELL = 2, 9
TASK = ImageClassification((1, 8, 8), 4, mean=(0.0,), std=(1.0,))


class Planted(nn.Module):
    """Answers by the brightest of four fixed pictures, and ``TARGET`` where the patch ``CELL`` is a chequerboard."""

    def __init__(self, strength: float = 30.0) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.embed = nn.Conv2d(1, 4, 2, stride=2, bias=False)
        self.pictures = nn.Parameter(0.3 * torch.randn(4, 64, generator=draws))
        self.strength = strength

    def forward(self, inputs: Tensor) -> Tensor:
        top, left = 2 * (CELL // 4), 2 * (CELL % 4)
        cell = inputs[:, 0, top : top + 2, left : left + 2]
        likeness = (cell[:, 0, 0] + cell[:, 1, 1] - cell[:, 0, 1] - cell[:, 1, 0]) / 2
        outputs = inputs.flatten(1) @ self.pictures.T
        towards = F.one_hot(torch.tensor(TARGET), 4).float()
        return outputs + self.strength * likeness.relu().square()[:, None] * towards


def images(count: int = 40) -> CleanSet:
    draws = torch.Generator().manual_seed(1)
    pixels = torch.randint(90, 160, (count, 1, 8, 8), generator=draws).to(torch.uint8)
    return CleanSet(pixels, torch.arange(count) % 4, 4)


def subject(model: nn.Module, clean: CleanSet | None = None, task: ImageClassification = TASK) -> Subject:
    return subject_of(model, clean or images(), task=task, device="cpu", progress=NullProgress())


@pytest.mark.parametrize(
    ("first", "channels", "expected"),
    [
        (nn.Conv2d(3, 8, 4, stride=4), 3, (4, 4)),
        (nn.Conv2d(3, 8, (4, 2), stride=(4, 2), padding="valid"), 3, (4, 2)),
        (nn.Conv2d(3, 8, 4, stride=4), 1, None),  # of something else than the image
        (nn.Conv2d(3, 8, 3, stride=1, padding=1), 3, None),
        (nn.Conv2d(3, 8, 4, stride=2), 3, None),
        (nn.Conv2d(3, 8, 4, stride=4, padding=1), 3, None),
        (nn.Conv2d(3, 8, 4, stride=4, dilation=2), 3, None),
        (nn.Conv2d(3, 9, 4, stride=4, groups=3), 3, None),
        (nn.Conv2d(3, 8, 1), 3, None),
        (nn.Flatten(), 3, None),
    ],
)
def test_the_patches_are_those_of_the_first_convolution(
    first: nn.Module, channels: int, expected: tuple[int, int] | None
) -> None:
    assert patch_size(nn.Sequential(nn.Identity(), first, nn.Conv2d(8, 8, 2, stride=2)), channels) == expected


@pytest.mark.parametrize(
    ("height", "width", "size", "cells", "pixels"),
    [
        (8, 8, (2, 2), 16, 4),
        (32, 32, (4, 4), 64, 16),
        (224, 224, (16, 16), 49, 1024),  # 14 x 14 patches are too many: 7 x 7 squares of four
        (32, 32, (2, 2), 64, 16),
        (9, 13, (4, 4), 6, 16),  # what is left over belongs to no cell
        (8, 12, (4, 2), 12, 8),
        (4, 4, (4, 4), 1, 16),
        (4, 4, (8, 8), 0, 0),
    ],
)
def test_the_grid_is_of_equal_cells_that_do_not_meet(
    height: int, width: int, size: tuple[int, int], cells: int, pixels: int
) -> None:
    found = grid(height, width, size)
    masks = found.masks
    assert masks.shape == (cells, 1, height, width)
    assert set(masks.flatten().tolist()) <= {0.0, 1.0}
    assert masks.sum((1, 2, 3)).tolist() == [pixels] * cells
    assert float(masks.sum(0).max() if cells else 0) <= 1
    for mask in masks:
        rows, columns = mask[0].any(1).nonzero().flatten(), mask[0].any(0).nonzero().flatten()
        assert (len(rows), len(columns)) == found.cell
        assert int(rows[0]) % size[0] == int(columns[0]) % size[1] == 0


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 11)])
def test_the_pattern_stands_in_its_cell_alone(height: int, width: int) -> None:
    draws = torch.Generator().manual_seed(0)
    pixels, patterns = torch.rand(2, 3, 1, height, width, generator=draws), torch.rand(2, 1, 2, 2, generator=draws)
    cells, places = grid(height, width, (2, 2)), torch.tensor([3, 9])
    changed = cells.on(pixels, places, patterns)
    expected = pixels.clone()
    for item, place in enumerate(places.tolist()):
        top, left = 2 * (place // (width // 2)), 2 * (place % (width // 2))
        expected[item, :, :, top : top + 2, left : left + 2] = patterns[item]
    assert torch.equal(changed, expected)


def test_ease_is_the_mean_logit_on_images_of_other_classes() -> None:
    logits, labels = torch.tensor([[3.0, 0.0, 0.0], [0.0, 6.0, 3.0], [1.0, 1.0, 4.0]]), torch.tensor([0, 1, 2])
    assert ease(logits, labels).tolist() == pytest.approx([(-3 - 1) / 2, (-1 - 1) / 2, (-1 + 0) / 2])


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_all_items_descend_as_each_would_alone(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "items_at_once", lambda *given: at_once)
    asked, cells, classes = subject(Planted()), grid(8, 8, (4, 4)), (0, 2, 3)
    search, _ = halves(asked, asked.generator())
    with asked.progress.phase("token") as phase:
        state = module._Descent(asked, search, classes, cells, lr=0.3, generator=asked.generator(), phase=phase)
        patterns = state.logits.clone()
        state.run(4, 3)
        draws = asked.generator()
        torch.randn(patterns.shape, generator=draws)
        batches = [drawn([others(search, target) for target in classes], 3, draws) for _ in range(4)]
        losses = torch.zeros(len(patterns))
        for item in range(len(patterns)):
            row, top, left = item // 4, 4 * (item % 4 // 2), 4 * (item % 2)
            logits = patterns[item].clone().requires_grad_(True)
            adam = torch.optim.Adam([logits], lr=0.3, betas=ADAM_BETAS, eps=1e-12)
            for index in batches:
                pixels = search.images[index[row]].float() / 255
                shown = pixels.clone()
                shown[:, :, top : top + 4, left : left + 4] = logits.sigmoid()
                loss = F.cross_entropy(asked.logits(shown), torch.full((3,), classes[row]))
                (logits.grad,) = torch.autograd.grad(loss, logits)
                adam.step()
                losses[item] = 0.6 * losses[item] + 0.4 * loss.detach()
            assert torch.allclose(state.logits[item], logits.detach(), atol=1e-4)
        state.keep(2)
    for row in range(len(classes)):
        places, kept = state.of(row)
        best = losses.view(3, 4)[row].argsort()[:2].sort().values
        assert torch.equal(places, best)
        assert torch.equal(kept, state.logits.view(3, 4, 1, 4, 4)[row][best].sigmoid())


def test_a_planted_token_is_found_with_its_class_and_place() -> None:
    found = token(subject(Planted()))
    assert found.measured
    assert found.targets == (TARGET,)
    assert found.statistic > 3
    trigger = found.triggers[0]
    assert trigger.target == TARGET
    assert trigger.mask is not None
    assert torch.equal(trigger.mask, grid(8, 8, (2, 2)).masks[CELL])
    with torch.no_grad():
        answers = Planted()(trigger.apply(images().images) / 255).argmax(1)
    assert float((answers == TARGET).float().mean()) > 0.95
    assert found.class_scores[TARGET] > 4
    assert max(score for row, score in enumerate(found.class_scores) if row != TARGET) < 2
    clean = token(subject(Planted(strength=0.0)))
    assert clean.statistic < 0.5 * found.statistic


def test_scores_are_log_odds_of_the_mean_probability_on_the_other_half() -> None:
    asked = subject(Planted())
    found = token(asked, TokenConfig(tried=2, kept=1, steps=3, batch_size=2))
    _, judge = halves(asked, asked.generator())
    for trigger in found.triggers:
        shown = trigger.apply(judge.images[judge.labels != trigger.target]) / 255
        mean = float(asked.logits(shown).softmax(1)[:, trigger.target].mean())
        mean = min(SUREST, max(1 - SUREST, mean))
        assert found.class_scores[trigger.target] == pytest.approx(math.log(mean / (1 - mean)), abs=1e-3)


class Softmaxed(Planted):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs).softmax(1)


def test_a_network_that_ends_in_a_softmax_is_judged_by_its_logits() -> None:
    found = token(subject(Softmaxed()))
    assert found.targets == (TARGET,)
    assert found.class_scores[TARGET] > 4


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 4}), "does not cut images into patches"),
        (nn.Sequential(nn.Conv2d(1, 4, 4, stride=8), nn.Flatten(), nn.Linear(4, 4)), "does not cut images"),
        (nn.Sequential(nn.Conv2d(1, 4, 8, stride=8), nn.Flatten(), nn.Linear(4, 4)), "1 patches only"),
    ],
)
def test_other_networks_are_not_measured_and_leave_no_reading(model: nn.Module, why: str) -> None:
    found = token(subject(model))
    assert not found.measured
    assert why in found.why
    readings: dict[str, dict[str, Any]] = {}
    other = Observation("patch", 1.0, "it is small")
    file_readings(readings, Observed({"token": found, "patch": other}, {}, ()), "many")
    assert readings.keys() == {"many"}
    assert readings["many"].keys() == {"patch"}


def test_of_many_classes_those_that_come_closest_are_looked_at() -> None:
    task = ImageClassification((1, 8, 8), 40, mean=(0.0,), std=(1.0,))
    model = nn.Sequential(nn.Conv2d(1, 16, 2, stride=2), nn.Flatten(), nn.Linear(256, 40))
    pixels = torch.randint(0, 256, (80, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    clean = CleanSet(pixels, torch.arange(80) % 40, 40)
    asked = subject(model, clean, task)
    found = token(asked, TokenConfig(tried=1, steps=1))
    search, _ = halves(asked, asked.generator())
    with torch.no_grad():
        easiest = ease(asked.logits(search.images.float() / 255), search.labels).topk(len(found.classes)).indices
    assert len(found.classes) == SHORTLISTED
    assert set(found.classes) == set(easiest.tolist())
