"""Pairs: residuals and the core against plain computations; a planted all-to-all backdoor and an all-to-one one."""

from __future__ import annotations

import itertools

import pytest
import torch

from defense_core import architectures
from defense_core.attacks import poison, probe_from_spec
from defense_core.loop import Tuning, finished, tune, working_copy
from defense_core.progress import NullProgress
from defense_core.scan.base import Observation, subject_of
from defense_core.scan.pairs import PairsConfig, pairs
from defense_core.scan.transfer import (
    TRANSFER_FLOOR,
    column_scores,
    greedy_core,
    size_residuals,
    transfer_residuals,
)
from pipelines.demo import ARCHITECTURE, ARGUMENTS, TASK, DemoInputs, _digits

FIVE = torch.tensor([(source, target) for source in range(5) for target in range(5) if source != target])


def test_ease_of_a_source_or_a_target_is_taken_off_the_sizes() -> None:
    draws = torch.Generator().manual_seed(0)
    ease = torch.randn(2, 5, generator=draws).double()
    log_sizes = ease[0][FIVE[:, 0]] + ease[1][FIVE[:, 1]]
    log_sizes[7] -= 3.0
    residuals = size_residuals(FIVE, log_sizes)
    assert int(residuals.argmax()) == 7
    assert float(residuals[7]) > 5 * float(residuals[torch.arange(len(FIVE)) != 7].abs().max())


def test_the_usual_transfer_to_a_target_is_taken_off() -> None:
    draws = torch.Generator().manual_seed(1)
    transfer = torch.rand(len(FIVE), len(FIVE), generator=draws)
    residuals = transfer_residuals(FIVE, transfer)

    def slow(i: int, j: int) -> float:
        same = [k for k in range(len(FIVE)) if FIVE[k, 1] == FIVE[i, 1] and FIVE[k, 0] != FIVE[j, 0]]
        return (float(transfer[i, j]) - sum(float(transfer[k, j]) for k in same) / len(same)) / TRANSFER_FLOOR

    for i, j in itertools.product((0, 3, 11), (5, 8, 19)):
        expected = 0.0 if FIVE[i, 0] == FIVE[j, 0] else (slow(i, j) + slow(j, i)) / 2
        assert float(residuals[i, j]) == pytest.approx(expected, abs=1e-4)


def test_the_core_is_the_map_whose_pairs_transfer() -> None:
    cycle = {int(row) for row in range(len(FIVE)) if int(FIVE[row, 1]) == (int(FIVE[row, 0]) + 1) % 5}
    transfers = torch.zeros(len(FIVE), len(FIVE), dtype=torch.float64)
    for i, j in itertools.permutations(cycle, 2):
        transfers[i, j] = 4.0
    core = greedy_core(FIVE, torch.zeros(len(FIVE), dtype=torch.float64), transfers)
    assert set(core.rows) == cycle
    assert core.score == pytest.approx(4 * 4.0 / 5)


def test_a_column_counts_what_its_patches_do_on_each_others_images() -> None:
    transfer = torch.zeros(len(FIVE), len(FIVE))
    rows = (FIVE[:, 1] == 2).nonzero().flatten()
    transfer[rows[:, None], rows] = 0.8
    transfer[rows, rows] = 1.0  # a pair's success on its own source is no transfer
    classes, scores = column_scores(FIVE, torch.zeros(len(FIVE)), transfer)
    assert classes == (0, 1, 2, 3, 4)
    assert scores == pytest.approx((0.0, 0.0, 0.8, 0.0, 0.0))


def test_an_all_to_one_backdoor_is_one_column(digits_victim: DemoInputs) -> None:
    inputs = digits_victim
    subject = subject_of(
        inputs.model, inputs.clean.subset(torch.arange(100)), task=TASK, seed=0, device="cpu", progress=NullProgress()
    )
    found = pairs(subject, PairsConfig())
    assert found.targets == (inputs.probe.target,)
    assert found.statistic == found.facts["column_score"]


def test_an_all_to_all_backdoor_is_a_map() -> None:
    found = _all_to_all(0)
    right = [pair for pair in found.pairs if pair[1] == (pair[0] + 1) % 10]
    assert len(right) >= 6
    assert len(right) > 0.7 * len(found.pairs)
    assert found.statistic == found.facts["core_score"] > 3
    assert found.triggers[0].sources == (found.pairs[0][0],)


def _all_to_all(seed: int) -> Observation:
    digits = _digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(seed))
    probe = probe_from_spec({"name": "corner", "kind": "badnets", "target": None, "size": 2}, num_classes=10)
    network = working_copy(architectures.initialise(architectures.build(ARCHITECTURE, ARGUMENTS), seed), "cpu")
    tune(
        network, poison(digits.subset(order[:900]), probe, rate=0.3, seed=seed).data, task=TASK,
        tuning=Tuning(epochs=30, batch_size=64, lr=0.05, weight_decay=5e-4, schedule="onecycle"),
        seed=seed, device="cpu", progress=NullProgress(), name="train",
    )  # fmt: skip
    clean = digits.subset(order[900:1000])
    model = finished(network, "test")
    return pairs(subject_of(model, clean, task=TASK, seed=0, device="cpu", progress=NullProgress()), PairsConfig())
