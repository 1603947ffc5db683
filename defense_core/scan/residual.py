"""What is left of the inverted triggers after purification."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from defense_core.data import CleanSet
from defense_core.errors import MethodDiverged
from defense_core.scan.base import InvertedTrigger, OutOfTime, Subject
from defense_core.scan.confirm import enough, success


@dataclass(frozen=True)
class Residual:
    """One inverted trigger on two models.

    Attributes:
        detector: that found it; empty: none found one for this class.
        target: class that it leads to.
        before, after: share of clean images of other classes that it sends there, on the model that it was found on
            and on the purified one; ``None`` where that was not measured.
        images: how many images.
    """

    detector: str
    target: int
    before: float | None
    after: float | None
    images: int


def residuals(
    given: Subject,
    purified: Subject | None,
    clean: CleanSet,
    triggers: Sequence[tuple[str, InvertedTrigger]],
    *,
    suspects: Collection[int],
) -> tuple[Residual, ...]:
    """Try each trigger on both models.

    Args:
        purified: ``None``: nothing was changed, and both are the same.
        clean: images; :func:`defense_core.scan.confirm.enough` of them are tried, exact copies once.
        suspects: classes that have to be answered for: one of which nothing could be measured, for want of a trigger,
            of images or of time, gets a row that says so.
    """
    clean = enough(clean.without_copies())
    found: list[Residual] = []
    try:
        for detector, trigger in triggers:
            before, images = _success(given, clean, trigger)
            after, _ = (before, images) if purified is None else _success(purified, clean, trigger)
            found.append(Residual(detector, trigger.target, before, after, images))
    except OutOfTime:  # those of suspects come first
        pass
    found = [each for each in found if each.images]
    silent = sorted(set(suspects) - {each.target for each in found})
    return (*found, *(Residual("", target, None, None, 0) for target in silent))


def _success(subject: Subject, clean: CleanSet, trigger: InvertedTrigger) -> tuple[float | None, int]:
    """The share that it sends to its class, ``None`` where the model gave no answer to some image; of how many."""
    try:
        hits, _ = success(subject, clean, trigger)
    except MethodDiverged:
        return None, int((clean.labels != trigger.target).sum())
    return (float(hits.float().mean()) if len(hits) else None), len(hits)
