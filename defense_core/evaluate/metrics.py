"""Proportions, drops and defence effectiveness, each with an interval.

Counts go in, never rates, so that every figure carries its own uncertainty. A figure that is
not defined (no trials) is ``None``; it is never 0, 1 or NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from scipy.special import betaincinv, ndtri

from defense_core.config import require
from defense_core.errors import ConfigError

CONFIDENCE = 0.95
"""Two-sided confidence of every interval, unless a caller asks for another."""


@dataclass(frozen=True)
class Interval:
    """A closed interval, ``low <= high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Proportion:
    """``successes`` out of ``trials``, with intervals.

    The default interval is Wilson's score interval. Reasons: it never collapses to a point
    (0 of n has width), its average coverage is the nominal one, and it is narrow enough that
    a clean model passes on a few hundred images. A policy bounds the *upper* end of a small
    attack success rate: for rates up to 0.1 on 150 images or more, the truth lies above that
    end in at most 2.6 % of draws (nominal: 2.5 %).
    :meth:`exact` gives the guaranteed, wider Clopper-Pearson interval.

    >>> Proportion(0, 200).wilson().high.__round__(4)
    0.0188
    """

    successes: int
    trials: int

    def __post_init__(self) -> None:
        for name in ("successes", "trials"):
            value = getattr(self, name)
            require(isinstance(value, int) and not isinstance(value, bool), name, "a whole number", repr(value))
        require(0 <= self.successes <= self.trials, "successes", f"in 0..{self.trials} (trials)", self.successes)

    @property
    def value(self) -> float | None:
        """``successes / trials``; ``None`` without trials."""
        return self.successes / self.trials if self.trials else None

    def wilson(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Score interval: E. B. Wilson, JASA 22 (1927); ``None`` without trials."""
        z = _quantile(confidence)
        if not self.trials:
            return None
        n, p = self.trials, self.successes / self.trials
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        # The ends are exact at 0 and n; floating point would give 1e-19 and 1 - 1e-16 there.
        low = 0.0 if self.successes == 0 else max(0.0, centre - half)
        high = 1.0 if self.successes == n else min(1.0, centre + half)
        return Interval(low, high)

    def exact(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Guaranteed interval: Clopper and Pearson, Biometrika 26 (1934); ``None`` without trials."""
        _quantile(confidence)
        if not self.trials:
            return None
        tail = (1 - confidence) / 2
        k, n = self.successes, self.trials
        low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
        high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
        return Interval(low, high)

    def above_guessing(self, classes: int) -> bool:
        """Whether these are surely more than guessing among ``classes`` would get right, by Wilson's lower end."""
        interval = self.wilson()
        return interval is not None and interval.low > 1 / classes

    def to_results(self) -> dict[str, Any]:
        """``{"value", "low", "high", "successes", "trials"}`` with Wilson's ends."""
        interval = self.wilson()
        return {
            "value": self.value,
            "low": None if interval is None else interval.low,
            "high": None if interval is None else interval.high,
            "successes": self.successes,
            "trials": self.trials,
        }


@dataclass(frozen=True)
class PairedCounts:
    """The same samples judged twice, before and after a change.

    Attributes:
        both: success before and after.
        only_before: success before, not after.
        only_after: success after, not before.
        neither: success in neither.
    """

    both: int
    only_before: int
    only_after: int
    neither: int

    def __post_init__(self) -> None:
        for name in ("both", "only_before", "only_after", "neither"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            require(whole and value >= 0, name, "a whole number, 0 or more", repr(value))

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> PairedCounts:
        """Count two equally long sequences of outcomes.

        Raises:
            ConfigError: the lengths differ.
        """
        first, second = numpy.asarray(before, dtype=bool), numpy.asarray(after, dtype=bool)
        require(first.shape == second.shape, "after", f"{first.shape} outcomes, one a sample", second.shape)
        both = int((first & second).sum())
        return cls(both, int(first.sum()) - both, int(second.sum()) - both, int((~first & ~second).sum()))

    @property
    def trials(self) -> int:
        """Number of samples."""
        return self.both + self.only_before + self.only_after + self.neither

    @property
    def before(self) -> Proportion:
        """Successes before."""
        return Proportion(self.both + self.only_before, self.trials)

    @property
    def after(self) -> Proportion:
        """Successes after."""
        return Proportion(self.both + self.only_after, self.trials)

    @property
    def drop(self) -> float | None:
        """Rate before minus rate after; negative where it rose; ``None`` without samples."""
        return (self.only_before - self.only_after) / self.trials if self.trials else None

    def drop_interval(self, confidence: float = CONFIDENCE) -> Interval | None:
        """Interval of :attr:`drop` for paired samples; ``None`` without samples.

        R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10: Wilson's
        intervals of the two rates, squared and added with the phi coefficient (continuity
        corrected) as their correlation. Much narrower than two unpaired intervals, because a
        purified model errs mostly on the images that the original errs on.
        """
        first, second = self.before.wilson(confidence), self.after.wilson(confidence)
        if first is None or second is None or self.drop is None:
            return None
        p, q = (self.both + self.only_before) / self.trials, (self.both + self.only_after) / self.trials
        phi = self._phi()
        return Interval(
            max(-1.0, self.drop - _joint(p - first.low, second.high - q, phi)),
            min(1.0, self.drop + _joint(first.high - p, q - second.low, phi)),
        )

    def _phi(self) -> float:
        n, before, after = self.trials, self.before.successes, self.after.successes
        margins = before * (n - before) * after * (n - after)
        if margins == 0:
            return 0.0
        covariance = float(self.both * self.neither - self.only_before * self.only_after)
        if covariance > 0:
            covariance = max(covariance - n / 2, 0.0)
        return covariance / math.sqrt(margins)

    def to_results(self) -> dict[str, Any] | None:
        """``{"value", "low", "high"}`` of the drop; ``None`` without samples."""
        interval = self.drop_interval()
        return None if interval is None else {"value": self.drop, "low": interval.low, "high": interval.high}


def der(acc_drop: float | None, asr_drop: float | None) -> float | None:
    """Defence effectiveness rating, in [0, 1]; 0.5 means no effect.

    ``[max(0, ASR_before - ASR_after) - max(0, ACC_before - ACC_after) + 1] / 2``, equation 7 of
    Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization"
    (2023). The accuracy term is *subtracted*: published code that adds it rewards a loss of accuracy.

    Args:
        acc_drop: accuracy before minus after, in [-1, 1].
        asr_drop: attack success before minus after, in [-1, 1].

    Returns:
        ``None`` if either drop is ``None``.

    Raises:
        ConfigError: a drop is not finite or outside [-1, 1].
    """
    if acc_drop is None or asr_drop is None:
        return None
    for name, value in (("acc_drop", acc_drop), ("asr_drop", asr_drop)):
        require(-1 <= value <= 1, name, "a number in [-1, 1]", value)
    return (max(0.0, asr_drop) - max(0.0, acc_drop) + 1) / 2


def der_interval(acc: PairedCounts, asr: PairedCounts, confidence: float = CONFIDENCE) -> Interval | None:
    """Interval of :func:`der` that covers with at least about ``confidence`` (Bonferroni).

    DER rises with the ASR drop and falls with the ACC drop, so its ends are those of the two
    paired intervals, each taken at ``1 - (1 - confidence) / 2``.
    """
    each = 1 - (1 - confidence) / 2
    acc_drop, asr_drop = acc.drop_interval(each), asr.drop_interval(each)
    if acc_drop is None or asr_drop is None:
        return None
    low, high = der(acc_drop.high, asr_drop.low), der(acc_drop.low, asr_drop.high)
    return None if low is None or high is None else Interval(low, high)


def largest(values: Iterable[float | None]) -> float | None:
    """The largest value; ``None`` if there is none, or if any of them is undefined."""
    seen = list(values)
    known = [value for value in seen if value is not None]
    return max(known) if known and len(known) == len(seen) else None


def _joint(first: float, second: float, phi: float) -> float:
    # Rounding can push the sum of squares a hair below zero when phi is near 1.
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def _quantile(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ConfigError("confidence is out of range", expected="a number in (0, 1)", got=confidence)
    return float(ndtri(0.5 + confidence / 2))
