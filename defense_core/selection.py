"""The choice between purified models: a declared rule on clean images, blind to attacks.

Clean accuracy alone would choose the gentlest method, which leaves the backdoor. So every candidate is also asked how
far the universal perturbations that were found on the *given* model still work on it (:mod:`defense_core.universal`).
The candidates together name the class whose perturbation lost most: where several purifiers agree that a shortcut went
away, one was there. The candidate on which least is left of it is chosen; but the mean of several, whose errors are
averaged too, where so few images cannot tell that it leaves more.

No tensor is touched here: the signals are measured by :func:`defense_core.universal.select_signals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from defense_core.config import from_mapping, to_mapping

MAX_EXPECTED_DROP = 0.05
"""Permitted expected drop of accuracy on the select split. The estimate counts every answer that departs from the given
model's as a loss and credits no mistake that is mended: of methods that learn labels it is two points too high."""
MAX_DROP = 0.03
"""Permitted drop of the cautious accuracy, where no drop was estimated."""
TIE = 0.05
"""Shares of perturbed images within this are tied."""
STANDARD_ERRORS = 2.0
"""Of the difference between two shares: so much more may be left on the mean of several candidates."""

RULE = (
    "Among the methods that ended well, the control left out: those that are expected to lose at most "
    f"{MAX_EXPECTED_DROP:g} of accuracy on the select split, by the given model's calibrated probabilities (all, "
    "where none is). Of these, the least success of the universal perturbation that was found on the given model for "
    "the suspected class, but the mean of several candidates' weights, if it is among them, unless that leaves more by "
    f"{STANDARD_ERRORS:g} standard errors of the difference between two shares of so many images (at least {TIE:g}); "
    f"within {TIE:g}, the least success of the perturbations for all classes together; then the smallest expected "
    "drop; then the order in which the methods were given. "
    "The suspected class is the one whose perturbation lost most, averaged over the candidates."
)


@dataclass(frozen=True)
class Signals:
    """What a candidate is chosen by.

    Attributes:
        images: size of the split that was asked.
        correct_before, correct: images that the given and the purified model label as stated.
        cautious_accuracy: accuracy of the purified model less one standard error of the paired difference.
        targets: class of each universal perturbation, found on the given model.
        reached_before, reached: share of perturbed images that the given and the purified model put there.
        expected_drop: of accuracy, by :func:`defense_core.purify.choice.expected_drop` at the temperature that
            calibrates the given model; ``None`` in evidence of releases that did not estimate it.
    """

    images: int
    correct_before: int
    correct: int
    cautious_accuracy: float
    targets: tuple[int, ...]
    reached_before: tuple[float, ...]
    reached: tuple[float, ...]
    expected_drop: float | None = None

    @property
    def accuracy(self) -> float:
        """Accuracy of the purified model, in [0, 1]."""
        return self.correct / self.images

    def to_mapping(self) -> dict[str, Any]:
        """JSON types, with the accuracy."""
        return {**to_mapping(self), "accuracy": self.accuracy}

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Signals:
        """The inverse of :meth:`to_mapping`. Raises ConfigError for unknown keys."""
        known = {key: value for key, value in mapping.items() if key != "accuracy"}
        return from_mapping(cls, known, where="select signals")


@dataclass(frozen=True)
class Candidate:
    """A purified model as the rule sees it.

    Attributes:
        method: its name.
        signals: ``None`` where nothing could be asked.
        eligible: whether it can be chosen.
        why: the reason, where it cannot.
        residual: success of the suspected class's perturbation on it, in [0, 1]; filled in by :func:`with_residuals`.
        averaged: of how many candidates' weights it is the mean; 0 where it is none.
    """

    method: str
    signals: Signals | None
    eligible: bool = True
    why: str = ""
    residual: float | None = None
    averaged: int = 0


def permitted_drop(max_drop: float, images: int) -> float:
    """``max_drop``, but never less than three of ``images``: on a small split one image says nothing."""
    return max(max_drop, 3 / max(images, 1)) + 1e-9


def suspected_class(candidates: Sequence[Candidate]) -> int | None:
    """The class whose universal perturbation lost most success, averaged over the eligible candidates.

    Returns:
        One of the classes that all of them were asked about: of many, machines that round otherwise may look at other
        ones. ``None`` where no candidate has signals, or there is no such class.
    """
    voters = [each.signals for each in candidates if each.eligible and each.signals is not None]
    shared = (
        [target for target in voters[0].targets if all(target in each.targets for each in voters)] if voters else []
    )
    return max(shared, key=lambda target: math.fsum(map(partial(_fall, target), voters)), default=None)


def _fall(target: int, signals: Signals) -> float:
    """How much success the perturbation to ``target`` lost."""
    place = signals.targets.index(target)
    return signals.reached_before[place] - signals.reached[place]


def with_residuals(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates with what each leaves of the suspected class's perturbation."""
    suspect = suspected_class(candidates)

    def residual(signals: Signals | None) -> float | None:
        if signals is None or suspect is None or suspect not in signals.targets:
            return None
        return signals.reached[signals.targets.index(suspect)]

    return [replace(each, residual=residual(each.signals)) for each in candidates]


def choose(candidates: Sequence[Candidate]) -> Candidate | None:
    """Apply :data:`RULE` to candidates in order of preference; ``None`` where none is eligible."""
    eligible = [each for each in with_residuals(candidates) if each.eligible]
    accurate = [each for each in eligible if _holds(each.signals)] or eligible
    if not accurate:
        return None
    least = min(_residual(each) for each in accurate)
    tied = [each for each in accurate if _residual(each) <= least + TIE]
    means = [each for each in accurate if each.averaged > 1 and _residual(each) <= least + _undecided(each.signals)]
    return min(means or tied, key=_left)  # the first of equals, which is the one that was given first


def _undecided(signals: Signals | None) -> float:
    """A difference between two shares that the images cannot tell: ``STANDARD_ERRORS`` of it, for shares of a half."""
    return TIE if signals is None else max(TIE, STANDARD_ERRORS * math.sqrt(0.5 / signals.images))


def _left(candidate: Candidate) -> tuple[float, float]:
    """What orders those that are tied. The gentlest would be the one that removed least, if the suspected class is not
    the target or its perturbation not the shortcut."""
    signals = candidate.signals
    if signals is None:
        return math.inf, math.inf
    drop = 1.0 - signals.accuracy if signals.expected_drop is None else signals.expected_drop
    return math.fsum(signals.reached) / max(len(signals.reached), 1), drop


def _holds(signals: Signals | None) -> bool:
    if signals is None:
        return False
    if signals.expected_drop is not None:
        return signals.expected_drop <= MAX_EXPECTED_DROP
    drop = signals.correct_before / signals.images - signals.cautious_accuracy
    return drop <= permitted_drop(MAX_DROP, signals.images)


def _residual(candidate: Candidate) -> float:
    return 1.0 if candidate.residual is None else candidate.residual
