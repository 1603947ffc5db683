"""What is left of the inverted triggers after purification."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from defense_core.data import CleanSet
from defense_core.scan.base import InvertedTrigger, Subject
from defense_core.scan.confirm import success


@dataclass(frozen=True)
class Residual:
    """One inverted trigger on two models.

    Attributes:
        detector: that found it.
        target: class that it leads to.
        before, after: share of clean images of other classes that it sends there, on the model that it was found on
            and on the purified one.
        images: how many images.
    """

    detector: str
    target: int
    before: float
    after: float
    images: int


def residuals(
    given: Subject, purified: Subject, clean: CleanSet, triggers: Sequence[tuple[str, InvertedTrigger]]
) -> tuple[Residual, ...]:
    """Try each trigger on both models."""
    found = []
    for detector, trigger in triggers:
        before, _ = success(given, clean, trigger)
        after, _ = success(purified, clean, trigger)
        if len(before):
            shares = [float(hits.float().mean()) for hits in (before, after)]
            found.append(Residual(detector, trigger.target, shares[0], shares[1], len(before)))
    return tuple(found)
