"""Patch inversion: the published index, Adam and the price of a mask against slow computations; a planted patch."""

from __future__ import annotations

import math

import pytest
import torch

from defense_core.data import CleanSet
from defense_core.progress import NullProgress
from defense_core.scan.base import subject_of
from defense_core.scan.inversion import Patches
from defense_core.scan.patch import MISS_COST, PatchConfig, _log_size, anomaly_index, patch
from defense_core.scan.sampling import ADAM_BETAS, Adam, halves
from pipelines.demo import TASK, DemoInputs


def test_the_published_index_is_the_distance_below_the_median_in_mads() -> None:
    assert anomaly_index([10.0, 12.0, 11.0, 2.0, 13.0]) == pytest.approx((11 - 2) / (1.4826 * 1))
    assert anomaly_index([5.0, 5.0, 5.0]) == 0.0
    assert anomaly_index([10.0, 12.0, 11.0, 90.0, 13.0]) < 2  # a large mask is no sign of a backdoor


def test_adam_is_adam() -> None:
    start = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    mine, theirs = start.clone(), start.clone().requires_grad_(True)
    adam, reference = Adam(start, 0.1), torch.optim.Adam([theirs], lr=0.1, betas=ADAM_BETAS, eps=1e-12)
    for _ in range(5):
        mine -= adam.step(2 * mine, torch.arange(3))
        reference.zero_grad()
        theirs.square().sum().backward()
        reference.step()
    assert torch.allclose(mine, theirs.detach(), atol=1e-6)


def test_an_item_that_rests_keeps_its_own_count_of_steps() -> None:
    adam = Adam(torch.zeros(2, 1), 0.1)
    adam.step(torch.ones(1, 1), torch.tensor([0]))
    late = adam.step(torch.ones(1, 1), torch.tensor([1]))
    assert float(late) == pytest.approx(0.1)  # the first step of Adam is lr, whenever it comes


def test_a_mask_that_fails_counts_as_larger_without_a_step_at_the_wanted_success() -> None:
    logits = torch.zeros(3, 2, 4, 4)  # masks of one half everywhere
    sizes = _log_size(Patches(logits), torch.tensor([0.95, 0.9 - 1e-6, 0.4]), 0.9)
    assert sizes[0].item() == pytest.approx(math.log(0.5))
    assert sizes[1].item() == pytest.approx(math.log(0.5), abs=1e-4)
    assert sizes[2].item() == pytest.approx(math.log(0.5) + 0.5 * MISS_COST)


def test_the_patch_is_laid_over_the_image() -> None:
    logits = torch.full((1, 2, 2, 2), -30.0)
    logits[0, :, 0, 0] = 30.0
    changed = Patches(logits).on(torch.full((1, 1, 1, 2, 2), 0.25))
    assert changed.flatten().tolist() == pytest.approx([1.0, 0.25, 0.25, 0.25])


def test_the_halves_are_disjoint_complete_and_even_in_each_class() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(24, 1, 1, 1)
    clean = CleanSet(images, torch.arange(24) % 3, 3)
    subject = subject_of(torch.nn.Identity(), clean, task=TASK, seed=0, device="cpu", progress=NullProgress())
    search, judge = halves(subject, subject.generator())
    assert sorted(search.images.flatten().tolist() + judge.images.flatten().tolist()) == list(range(24))
    assert search.class_counts == judge.class_counts == (4, 4, 4)


def test_a_planted_patch_is_found_with_its_target(digits_victim: DemoInputs) -> None:
    inputs = digits_victim
    subject = subject_of(
        inputs.model, inputs.clean.subset(torch.arange(100)), task=TASK, seed=0, device="cpu", progress=NullProgress()
    )
    found = patch(subject, PatchConfig())
    assert found.targets[0] == inputs.probe.target == found.triggers[0].target
    assert found.statistic > 1.5
    others = inputs.test.images[inputs.test.labels != 0]
    with torch.no_grad():
        answers = inputs.model(TASK.inputs(found.triggers[0].apply(others) / 255)).argmax(1)
    assert float((answers == 0).float().mean()) > 0.7
    pixels = found.facts["mask_pixels"]
    assert pixels[0] == min(pixels)
    assert found.facts["published_verdict"] == (found.facts["anomaly_index"] > 2)
