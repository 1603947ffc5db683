"""Dirty-label poisoning of a training set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.attacks.probe import Probe
from defense_core.config import require
from defense_core.data import CleanSet


@dataclass(frozen=True, eq=False)
class Poisoned:
    """A poisoned training set.

    Attributes:
        data: all samples, the poisoned ones among them.
        index: int64, which ones are poisoned.
    """

    data: CleanSet
    index: Tensor


def poison(data: CleanSet, probe: Probe, *, rate: float, seed: int) -> Poisoned:
    """Trigger and relabel ``round(rate * N)`` samples drawn from the whole set.

    Args:
        data: clean training samples; left alone.
        rate: poisoning rate, in (0, 1).
        seed: draws the samples.
    """
    require(0 < rate < 1, "rate", "in (0, 1)", rate)
    count = round(rate * len(data))
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    images, labels = data.images.clone(), data.labels.clone()
    images[index] = probe.apply(data.images[index])
    labels[index] = probe.expected(data.labels[index])
    return Poisoned(CleanSet(images, labels, data.num_classes), index)
