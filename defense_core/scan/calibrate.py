"""From statistics to p-values: conformal, against the pool of clean references, and whether the pool covers the model.

The published thresholds of the detectors are not calibrated (their nominal 5 % is up to 40 % false alarms on
clean networks). Here a detector's value counts only by its rank among the same values on clean reference models:
``p = (1 + #{T_i >= T}) / (R + 1)``, valid whatever the distribution, as far as the model is exchangeable with the
references (Vovk et al., *Algorithmic learning in a random world*, 2005).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy

from defense_core.scan.pool import Pool, Reading, Reference

Floats = numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float64]]

CHANNELS: Mapping[str, tuple[str, ...]] = {
    "margin": ("margin", "subspace"),
    "inversion": ("token", "patch", "additive", "generator"),
    "pairs": ("pairs",),
}
"""The channels of the verdict and the detectors that speak in each. All others are evidence, not verdict."""

DEVIATION_FLOOR = 0.25
"""Of the median deviation over classes: a class on which the references agree by chance is no oracle."""
LEAST_REFERENCES = 3
"""With fewer, not even a deviation can be stated."""
RANGE_MARGIN = 0.5
"""A covariate may lie beyond the references' range by this share of it."""
NOTHING: Mapping[str, Reading] = MappingProxyType({})
DIGITS = 12
"""Decimals that p-values are compared by: in floating point three times 1/40 is more than 0.075."""


@dataclass(frozen=True)
class Standing:
    """Where a model stands among the references, by one detector or channel.

    Attributes:
        p_value: conformal, in [1 / (R + 1), 1].
        score: distance from the references' median, in units of their 90 % quantile's distance; for ranking.
        targets: classes that stand out, the most suspicious first.
        references: R, the number of clean models compared with.
    """

    p_value: float
    score: float
    targets: tuple[int, ...]
    references: int


def conformal(value: float, references: Sequence[float]) -> float:
    """``(1 + #{T_i >= T}) / (R + 1)``; larger values are more suspicious."""
    return (1 + sum(each >= value for each in references)) / (len(references) + 1)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's adjusted p-values (Holm 1979): valid under any dependence between the channels."""
    adjusted: dict[str, float] = {}
    least = 0.0
    for done, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        least = min(1.0, max(least, round((len(p_values) - done) * p_value, DIGITS)))
        adjusted[name] = least
    return adjusted


def rejects(adjusted: float, fpr: float) -> bool:
    """Whether a p-value from :func:`holm` rejects at the rate ``fpr``: both are compared by ``DIGITS`` decimals."""
    return round(adjusted, DIGITS) <= round(fpr, DIGITS)


def least_adjusted(channels: int, references: int) -> float:
    """The smallest p-value that :func:`holm` can give: one of ``channels`` stands out from all ``references``."""
    most_extreme = conformal(1.0, [0.0] * references)
    return min(holm({str(each): 1.0 if each else most_extreme for each in range(channels)}).values())


def standing(
    pool: Pool, regimes: Sequence[str], readings: Mapping[str, Reading], detectors: Sequence[str], *, by_class: bool
) -> Standing | None:
    """A model's standing by one detector, or by those of a channel together.

    Each detector is standardised on the references, every one of them against the others, and the value is the
    largest of them; the same is done for each reference, so ranks are comparable. Compared with are the references that
    all of these detectors have read: the largest of several is that of one and the same model.

    Args:
        regimes: whose readings of the pool to compare with.
        detectors: names. Not the name of a channel: ``margin`` is one of each.
        readings: of the model, by detector.
        by_class: compare class by class (the model knows the references' classes).

    Returns:
        ``None`` where none of the detectors was run, on the model or on the references.
    """
    read = [_read(reference, regimes) for reference in pool.references]
    known = [name for name in detectors if name in readings and sum(name in each for each in read) >= LEAST_REFERENCES]
    others = [each for each in read if all(name in each for name in known)]
    if not known or len(others) < LEAST_REFERENCES:
        return None
    values, nulls, targets = zip(
        *(_standardised(readings[name], [each[name] for each in others], by_class=by_class) for name in known),
        strict=True,
    )
    null = numpy.max(nulls, axis=0)
    best = int(numpy.argmax(values))
    value, centre = values[best], float(numpy.median(null))
    reach = max(float(numpy.quantile(null, 0.9)) - centre, 1e-9)
    return Standing(conformal(value, null.tolist()), (value - centre) / reach, targets[best], len(others))


def readers(pool: Pool, regimes: Sequence[str], detector: str) -> int:
    """How many references ``detector`` has read in one of ``regimes``."""
    return sum(detector in _read(reference, regimes) for reference in pool.references)


def _read(reference: Reference, regimes: Sequence[str]) -> dict[str, Reading]:
    """What was read of a reference in ``regimes``, by detector; the first regime counts."""
    return {name: each for regime in reversed(regimes) for name, each in reference.readings.get(regime, {}).items()}


def _standardised(own: Reading, others: Sequence[Reading], *, by_class: bool) -> tuple[float, Floats, tuple[int, ...]]:
    """(value of the model, values of the references, suspected classes)."""
    comparable = by_class and len(own.classes) > 1 and all(each.classes == own.classes for each in others)
    if not comparable:
        statistics = numpy.array([each.statistic for each in others])
        value, null = _against(own.statistic, statistics)
        return value, null, _classes_by_score(own)
    table = numpy.array([_centred(each.class_scores) for each in others])
    row = _centred(own.class_scores)
    scores = _class_z(row, table)
    null = numpy.array([_class_z(table[i], numpy.delete(table, i, axis=0)).max() for i in range(len(table))])
    order = numpy.argsort(-scores, kind="stable")
    outstanding = [own.classes[i] for i in order[:3] if scores[i] >= 0.5 * scores[order[0]] and scores[i] > null.max()]
    return float(scores.max()), null, tuple(outstanding or [own.classes[order[0]]])


def _against(value: float, statistics: Floats) -> tuple[float, Floats]:
    """Robust z of the model, and of each reference against the others."""

    def z(each: float, rest: Floats) -> float:
        centre = numpy.median(rest)
        return float((each - centre) / (1.4826 * numpy.median(numpy.abs(rest - centre)) + 1e-9))

    return z(value, statistics), numpy.array(
        [z(each, numpy.delete(statistics, i)) for i, each in enumerate(statistics)]
    )


def _centred(scores: Sequence[float]) -> Floats:
    values = numpy.array(scores, dtype=numpy.float64)
    centred: Floats = values - numpy.median(values)
    return centred


def _class_z(row: Floats, table: Floats) -> Floats:
    """Robust z of each class's score among the references' scores of the same class."""
    centre = numpy.median(table, axis=0)
    deviation = 1.4826 * numpy.median(numpy.abs(table - centre), axis=0)
    z: Floats = (row - centre) / (deviation + DEVIATION_FLOOR * numpy.median(deviation) + 1e-9)
    return z


def _classes_by_score(own: Reading) -> tuple[int, ...]:
    if not own.class_scores:
        return ()
    return (own.classes[int(numpy.argmax(own.class_scores))],)


def uncovered(
    pool: Pool, covariates: Mapping[str, float], regimes: Sequence[str] = (), readings: Mapping[str, Reading] = NOTHING
) -> tuple[str, ...]:
    """Sentences that say in what a model differs from all references; empty where the pool covers it.

    A number differs where it lies outside the references' range by more than half of that range: a covariate, and what
    a detector of the verdict reads of an ordinary class. P-values say by how far one class stands out from the others;
    where a search fails on every class alike, whatever the reason, none does. That is no evidence of innocence.

    Args:
        regimes, readings: as of :func:`standing`.
    """
    sentences = []
    for name, value in sorted(covariates.items()):
        known = [reference.covariates[name] for reference in pool.references if name in reference.covariates]
        sentences += _beyond(f"its {name.replace('_', ' ')} is", value, known)
    read = [_read(reference, regimes) for reference in pool.references]
    for name in (name for members in CHANNELS.values() for name in members if name in readings):
        own = _level(readings[name])
        levels = [level for each in read if name in each and (level := _level(each[name])) is not None]
        if own is not None and len(levels) >= LEAST_REFERENCES:
            sentences += _beyond(f"what {name} reads of an ordinary class is", own, levels)
    return tuple(sentences)


def _level(reading: Reading) -> float | None:
    """The median over classes; ``None`` where the detector has no score a class."""
    return float(numpy.median(reading.class_scores)) if reading.class_scores else None


def _beyond(what: str, value: float, known: Sequence[float]) -> list[str]:
    if not known:
        return []
    low, high = min(known), max(known)
    slack = RANGE_MARGIN * (high - low)
    # Not: whether it is outside. What is no number is not covered either.
    inside = low - slack <= value <= high + slack
    return [] if inside else [f"{what} {value:.3g}, the references' is {low:.3g} to {high:.3g}"]
