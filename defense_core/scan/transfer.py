"""Which of the patches that were found for pairs of classes share a trigger: sizes, transfer and the core of pairs.

The mathematics of :mod:`defense_core.scan.pairs` (Xiang et al., *UMD*, ICML 2023), on tensors alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE_FLOOR = 0.1
"""Added to the deviation of the log sizes: pairs whose patches agree to within a tenth are equal."""
TRANSFER_FLOOR = 0.05
"""A mean probability below this is no transfer; it is the unit that transfer is counted in."""
ENOUGH = 3
"""Pairs of one target from which that target's own ease can be told."""


@dataclass(frozen=True)
class Core:
    """Pairs that share a trigger.

    Attributes:
        score: mean of what each pair adds, in robust deviations.
        rows: which pairs, in the order in which they joined.
    """

    score: float
    rows: tuple[int, ...]


def size_residuals(chosen: Tensor, log_sizes: Tensor) -> Tensor:
    """How much smaller the patch of each pair is than those of its source and of its target, in robust deviations:
    float64 (P,), larger is smaller.

    Args:
        chosen: int64 (P, 2), sources and targets.
        log_sizes: float64 (P,).
    """
    residuals = -log_sizes.double()
    for side in (0, 1, 0, 1):
        for label in chosen[:, side].unique():
            member = chosen[:, side] == label
            if int(member.sum()) >= ENOUGH:
                residuals[member] -= residuals[member].quantile(0.5)
    return residuals / (1.4826 * residuals.abs().quantile(0.5) + SIZE_FLOOR)


def transfer_residuals(chosen: Tensor, transfer: Tensor) -> Tensor:
    """How much better pairs do each other's work than other patches for the same target do it, in units of
    ``TRANSFER_FLOOR``: float64 (P, P), symmetric, 0 where the sources are the same."""
    different = chosen[:, None, 0] != chosen[None, :, 0]
    values = transfer.double().where(different, torch.nan)
    usual = values.nanmean(0).expand_as(values).clone()
    for label in chosen[:, 1].unique():
        member = chosen[:, 1] == label
        if int(member.sum()) >= ENOUGH:
            usual[member] = values[member].nanmean(0)
    excess = ((values - usual) / TRANSFER_FLOOR).nan_to_num(0.0)
    return (excess + excess.T) / 2


def greedy_core(chosen: Tensor, sizes: Tensor, transfers: Tensor) -> Core:
    """The map from sources to targets whose pairs are small and transfer: from each pair on, the pair of an unused
    source that adds most joins, until every source has a target (UMD, section 4.2, with every pair as a start)."""
    best = Core(-math.inf, ())
    for start in range(len(chosen)):
        rows, gains = [start], [float(sizes[start])]
        free = chosen[:, 0] != chosen[start, 0]
        while bool(free.any()):
            adds = (sizes + transfers[:, rows].mean(1)).where(free, -math.inf)
            row = int(adds.argmax())
            rows.append(row)
            gains.append(float(adds[row]))
            free &= chosen[:, 0] != chosen[row, 0]
        score = sum(gains) / len(gains)
        if score > best.score:
            best = Core(score, tuple(rows))
    return best


def column_scores(chosen: Tensor, log_sizes: Tensor, transfer: Tensor) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The targets that two or more sources were led to, and how well the patches of each do each other's work; with
    fewer than four classes, where nothing can be transferred, minus the mean log size."""
    few = int(chosen.max()) < 3
    classes, scores = [], []
    for label in chosen[:, 1].unique().tolist():
        rows = (chosen[:, 1] == label).nonzero().flatten()
        if few:
            classes.append(label)
            scores.append(-float(log_sizes[rows].mean()))
        elif len(rows) > 1:
            block = transfer[rows][:, rows]
            classes.append(label)
            scores.append(float(block.sum() - block.diagonal().sum()) / (len(rows) * (len(rows) - 1)))
    return tuple(classes), tuple(scores)
