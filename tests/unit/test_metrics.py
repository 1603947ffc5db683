"""Intervals against exact enumeration, and DER against the published table it is quoted from."""

import math
from functools import lru_cache
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defense_core.errors import ConfigError
from defense_core.evaluate.metrics import Interval, PairedCounts, Proportion, der, der_interval, largest


def binomial(k: int, n: int, p: float) -> float:
    return math.comb(n, k) * p**k * (1 - p) ** (n - k)


@lru_cache
def intervals_of(method: str, n: int) -> tuple[Interval, ...]:
    return tuple(getattr(Proportion(k, n), method)() for k in range(n + 1))


def coverage(method: str, n: int, p: float) -> float:
    return sum(binomial(k, n, p) for k, each in enumerate(intervals_of(method, n)) if each.low <= p <= each.high)


counts = st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
tables = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


# -- one proportion --------------------------------------------------------------------


def test_wilson_equals_known_values():
    # 0 of n has the closed form z^2 / (n + z^2); 81 of 263 is Newcombe's (1998) first example.
    z2 = 1.959963984540054**2
    assert Proportion(0, 200).wilson().high == pytest.approx(z2 / (200 + z2), abs=1e-12)
    interval = Proportion(81, 263).wilson()
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_exact_equals_known_values():
    # 0 of n has the closed form 1 - (alpha/2)^(1/n); 81 of 263 is Newcombe's (1998) first example.
    assert Proportion(0, 200).exact().high == pytest.approx(1 - 0.025 ** (1 / 200), abs=1e-12)
    interval = Proportion(81, 263).exact()
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2527, 0.3676)


@pytest.mark.parametrize("n", [1, 5, 20, 50])
def test_exact_interval_covers_at_least_95_percent_everywhere(n):
    assert min(coverage("exact", n, p / 200) for p in range(201)) >= 0.95


@pytest.mark.parametrize("n", [10, 50, 150])
def test_wilson_covers_95_percent_on_average(n):
    grid = [(p + 0.5) / 200 for p in range(200)]
    assert sum(coverage("wilson", n, p) for p in grid) / len(grid) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("n", [150, 324, 600])
def test_wilson_upper_end_is_safe_for_small_rates(n):
    """The claim that the choice rests on: a true rate of up to 0.1 exceeds `high` in at most 2.6 % of draws."""
    highs = [each.high for each in intervals_of("wilson", n)]
    for p in (i / 500 for i in range(1, 51)):
        assert sum(binomial(k, n, p) for k in range(n + 1) if highs[k] < p) <= 0.026


@given(counts)
def test_intervals_hold_the_value_and_stay_in_range(case):
    each = Proportion(*case)
    for interval in (each.wilson(), each.exact()):
        assert 0 <= interval.low <= each.value <= interval.high <= 1


@given(counts)
def test_intervals_mirror_when_success_and_failure_swap(case):
    k, n = case
    for method in ("wilson", "exact"):
        one, other = getattr(Proportion(k, n), method)(), getattr(Proportion(n - k, n), method)()
        assert one.low == pytest.approx(1 - other.high, abs=1e-9)


@given(counts)
def test_more_confidence_is_wider(case):
    each = Proportion(*case)
    for method in (each.wilson, each.exact):
        assert method(0.99).high >= method(0.9).high
        assert method(0.99).low <= method(0.9).low


def test_no_trials_is_undefined_not_a_number():
    each = Proportion(0, 0)
    assert each.value is None
    assert each.wilson() is None
    assert each.exact() is None
    assert each.to_results() == {"value": None, "low": None, "high": None, "successes": 0, "trials": 0}


def test_results_carry_the_wilson_interval():
    results = Proportion(16, 324).to_results()
    assert results["value"] == 16 / 324
    assert Interval(results["low"], results["high"]) == Proportion(16, 324).wilson()
    assert (results["successes"], results["trials"]) == (16, 324)


@pytest.mark.parametrize(
    "case", [(-1, 5), (6, 5), (0, -1), (1.0, 5), (True, 5), (float("nan"), 5), (1, 5.0), (None, 5)]
)
def test_impossible_counts_are_refused(case):
    with pytest.raises(ConfigError):
        Proportion(*case)


@pytest.mark.parametrize("confidence", [0, 1, -0.5, 2, float("nan")])
def test_impossible_confidence_is_refused(confidence):
    for method in (Proportion(1, 5).wilson, Proportion(1, 5).exact, Proportion(0, 0).exact):
        with pytest.raises(ConfigError, match="confidence"):
            method(confidence)


# -- the same samples twice ------------------------------------------------------------


def test_paired_interval_equals_published_examples():
    # Newcombe (1998) 36/12/2/0, method 10; Bentur et al. (2009) 1/1/7/12 as in Fagerland et al. (2014).
    first = PairedCounts(36, 12, 2, 0).drop_interval()
    assert (round(first.low, 4), round(first.high, 4)) == (0.0569, 0.3404)
    second = PairedCounts(1, 1, 7, 12).drop_interval()
    assert (round(second.low, 3), round(second.high, 3)) == (-0.507, -0.026)


@pytest.mark.parametrize(
    "probabilities", [(0.9, 0.04, 0.01, 0.05), (0.6, 0.1, 0.1, 0.2), (0.05, 0.85, 0.05, 0.05), (0.94, 0.02, 0.02, 0.02)]
)
def test_paired_interval_covers_by_enumeration(probabilities):
    """Every table of 24 samples, weighted by its multinomial probability."""
    n, truth = 24, probabilities[1] - probabilities[2]
    covered = 0.0
    for a, b, c in product(range(n + 1), repeat=3):
        d = n - a - b - c
        if d < 0:
            continue
        ways = math.factorial(n) // math.prod(map(math.factorial, (a, b, c, d)))
        weight = ways * math.prod(p**k for p, k in zip(probabilities, (a, b, c, d), strict=True))
        if weight > 1e-7:
            interval = PairedCounts(a, b, c, d).drop_interval()
            covered += weight * (interval.low <= truth <= interval.high)
    assert covered >= 0.935


@given(tables)
def test_paired_interval_holds_the_drop_and_stays_in_range(table):
    each = PairedCounts(*table)
    interval = each.drop_interval()
    assert -1 <= interval.low <= each.drop + 1e-12
    assert each.drop - 1e-12 <= interval.high <= 1
    assert each.drop == pytest.approx(each.before.value - each.after.value, abs=1e-12)


@given(tables)
def test_paired_interval_mirrors_when_time_turns(table):
    a, b, c, d = table
    forth, back = PairedCounts(a, b, c, d).drop_interval(), PairedCounts(a, c, b, d).drop_interval()
    assert forth.low == pytest.approx(-back.high, abs=1e-9)
    assert forth.high == pytest.approx(-back.low, abs=1e-9)


def test_pairing_narrows_the_interval():
    together = PairedCounts(900, 20, 10, 70).drop_interval()
    apart = PairedCounts(846, 74, 64, 16).drop_interval()  # same rates, nearly independent
    assert together.high - together.low < 0.6 * (apart.high - apart.low)


def test_opposed_outcomes_keep_their_negative_correlation():
    """No continuity correction below zero: the interval is wider than at phi = 0."""
    opposed, neutral = PairedCounts(0, 10, 10, 0), PairedCounts(5, 5, 5, 5)
    assert opposed.drop_interval().high > neutral.drop_interval().high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
def test_paired_counts_of_outcomes(pairs):
    counted = PairedCounts.of([b for b, _ in pairs], [a for _, a in pairs])
    expected = [pairs.count(each) for each in ((True, True), (True, False), (False, True), (False, False))]
    assert [counted.both, counted.only_before, counted.only_after, counted.neither] == expected


def test_paired_counts_of_different_lengths_are_refused():
    with pytest.raises(ConfigError, match="after"):
        PairedCounts.of([True], [True, False])


@pytest.mark.parametrize("case", [(-1, 0, 0, 0), (0, 1.5, 0, 0), (0, 0, True, 0), (0, 0, 0, None)])
def test_impossible_paired_counts_are_refused(case):
    with pytest.raises(ConfigError):
        PairedCounts(*case)


def test_no_samples_is_undefined():
    none = PairedCounts(0, 0, 0, 0)
    assert none.drop is None
    assert none.drop_interval() is None
    assert none.to_results() is None
    assert der_interval(none, PairedCounts(1, 0, 0, 0)) is None
    assert der_interval(PairedCounts(1, 0, 0, 0), none) is None


# -- DER -------------------------------------------------------------------------------

# FT-SAM paper, table 1: (ACC, ASR) of the backdoored model, then (ACC, ASR, DER) after a defence, in percent.
PUBLISHED = [
    (91.82, 93.79, 90.29, 1.70, 95.28),
    (91.82, 93.79, 91.77, 0.84, 96.45),
    (91.82, 93.79, 57.22, 0.90, 79.14),
    (91.82, 93.79, 92.21, 1.63, 96.08),
    (93.44, 97.71, 92.48, 82.22, 57.26),
    (93.44, 97.71, 88.24, 6.00, 93.26),
    (94.03, 98.35, 94.11, 98.98, 50.00),
    (94.03, 98.35, 89.91, 8.92, 92.66),
    (93.01, 99.06, 88.92, 11.99, 91.49),
    (84.49, 97.87, 90.47, 5.74, 96.06),
    (84.49, 97.87, 83.87, 97.24, 50.00),
    (92.88, 97.07, 86.53, 2.89, 93.91),
    (93.47, 99.99, 91.85, 51.03, 73.67),
    (92.80, 98.90, 90.70, 0.88, 97.96),
]


@pytest.mark.parametrize("row", PUBLISHED)
def test_der_equals_the_published_table(row):
    acc, asr, acc_after, asr_after, published = row
    assert 100 * der((acc - acc_after) / 100, (asr - asr_after) / 100) == pytest.approx(published, abs=0.011)


@pytest.mark.parametrize(
    ("acc_drop", "asr_drop", "rating"),
    [(0, 0, 0.5), (0, 1, 1.0), (1, 0, 0.0), (1, 1, 0.5), (-0.5, 0.4, 0.7), (0.2, -0.5, 0.4), (-1, -1, 0.5)],
)
def test_der_by_hand(acc_drop, asr_drop, rating):
    assert der(acc_drop, asr_drop) == pytest.approx(rating)


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_der_is_a_rating_in_zero_to_one_and_never_rewards_lost_accuracy(acc_drop, asr_drop):
    rating = der(acc_drop, asr_drop)
    assert 0 <= rating <= 1
    assert der(1.0, asr_drop) <= rating <= der(-1.0, asr_drop)


def test_der_of_nothing_is_undefined():
    assert der(None, 0.5) is None
    assert der(0.5, None) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.01, -1.01])
def test_der_refuses_what_is_no_drop(bad):
    with pytest.raises(ConfigError):
        der(bad, 0.0)
    with pytest.raises(ConfigError):
        der(0.0, bad)


@given(tables, tables)
def test_der_interval_holds_the_rating(acc, asr):
    first, second = PairedCounts(*acc), PairedCounts(*asr)
    interval = der_interval(first, second)
    assert 0 <= interval.low <= der(first.drop, second.drop) + 1e-12
    assert der(first.drop, second.drop) - 1e-12 <= interval.high <= 1


def test_der_interval_joins_two_intervals_at_97_5_percent():
    acc, asr = PairedCounts(300, 12, 4, 8), PairedCounts(4, 300, 2, 10)
    acc_drop, asr_drop = acc.drop_interval(0.975), asr.drop_interval(0.975)
    assert der_interval(acc, asr) == Interval(der(acc_drop.high, asr_drop.low), der(acc_drop.low, asr_drop.high))


def test_largest_is_undefined_if_any_is():
    assert largest([0.1, -0.3]) == 0.1
    assert largest([-0.1, -0.3]) == -0.1
    assert largest([0.1, None]) is None
    assert largest([]) is None
