"""P-values from a pool: ranks against slow counting, Holm against the definition, and who is compared with whom."""

from __future__ import annotations

import itertools
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import median

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from defense_core.config import digest
from defense_core.errors import ConfigError
from defense_core.scan.base import outlying
from defense_core.scan.calibrate import CHANNELS, conformal, holm, least_adjusted, rejects, standing, uncovered
from defense_core.scan.detectors import Settings
from defense_core.scan.pool import (
    Pool,
    Probability,
    Reading,
    Reference,
    Stratum,
    load_pool,
    pool_for,
    save_pool,
    shipped_pools,
)

CLASSES = tuple(range(10))
DRAW = numpy.random.default_rng(5)
STRATUM = Stratum("small_cnn", 10, (1, 8, 8), tuple("0123456789"))


@pytest.fixture(autouse=True)
def _own_draw() -> None:
    """Every test draws the same, alone or after others."""
    DRAW.bit_generator.state = numpy.random.default_rng(6).bit_generator.state


def reading(scores: numpy.ndarray) -> Reading:
    statistic, _ = outlying(scores.tolist(), floor=0.1)
    return Reading(statistic, tuple(map(float, scores)), CLASSES)


def natural(easy: int = 4) -> numpy.ndarray:
    """Scores of a clean model: class ``easy`` is easy in every one of them."""
    scores = DRAW.normal(0.0, 0.3, 10)
    scores[easy] += 3.0
    return scores


def pool_of(count: int) -> Pool:
    references = tuple(
        Reference(
            f"r{number}", {}, {"accuracy": 0.7 + 0.001 * number},
            {
                "none": {"margin": reading(natural())},
                "many": {"patch": reading(natural()), "additive": reading(natural())},
            },
        )
        for number in range(count)
    )  # fmt: skip
    return Pool(STRATUM, "sha256:" + "0" * 64, references, {"many": Probability(-1.0, 2.0, 60, ("badnets",))})


POOL = pool_of(59)


@given(st.floats(-5, 5), st.lists(st.floats(-5, 5), min_size=1, max_size=40))
def test_the_conformal_p_value_is_a_rank(value: float, references: list[float]) -> None:
    above = len([each for each in references if not each < value])
    assert conformal(value, references) == (above + 1) / (len(references) + 1)


def test_conformal_p_values_of_exchangeable_models_keep_their_promise() -> None:
    """At most a share alpha of null models gets p <= alpha; 4,000 draws, three standard errors of slack."""
    draws = numpy.random.default_rng(0).normal(size=(4000, 60))
    p_values = numpy.array([conformal(row[0], row[1:].tolist()) for row in draws])
    for alpha in (0.05, 0.1, 0.5):
        assert (p_values <= alpha).mean() <= alpha + 3 * (alpha * (1 - alpha) / 4000) ** 0.5


@pytest.mark.parametrize(("references", "alpha"), [(9, 0.1), (19, 0.05), (19, 0.2)])
def test_standings_of_exchangeable_models_keep_their_promise(references: int, alpha: float) -> None:
    """Each reference is put in its place among the others, and the model among all: not quite the same, and no worse.

    600 draws with heavy tails, three standard errors of slack.
    """
    draw, names = numpy.random.default_rng(1), tuple(range(5))
    p_values = []
    for _ in range(600):
        model, *others = (Reading(0.0, tuple(row), names) for row in draw.standard_t(3, size=(references + 1, 5)))
        known = tuple(Reference(f"r{i}", {}, {}, {"none": {"margin": each}}) for i, each in enumerate(others))
        pool = Pool(replace(STRATUM, num_classes=5), "", known, {})
        place = standing(pool, ("none",), {"margin": model}, ("margin",), by_class=True)
        assert place is not None
        p_values.append(place.p_value)
    share = (numpy.array(p_values) <= alpha + 1e-12).mean()
    assert share <= alpha + 3 * (alpha * (1 - alpha) / 600) ** 0.5


@given(st.dictionaries(st.sampled_from("abcde"), st.floats(0.001, 1), min_size=1))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: dict[str, float]) -> None:
    adjusted = holm(p_values)
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for done, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
            if p_value > alpha / (len(p_values) - done) + 1e-15:
                break
            rejected.add(name)
        assert {name for name, value in adjusted.items() if value <= alpha + 1e-12} == rejected


def test_holm_of_one_is_itself_and_never_exceeds_one() -> None:
    assert holm({"a": 0.3}) == {"a": 0.3}
    assert holm({"a": 0.9, "b": 0.8, "c": 0.7})["a"] == 1.0


RATES = tuple(Fraction(milli, 1000) for milli in range(1, 1000)) + tuple(Fraction(1, of) for of in range(3, 60))


@given(st.integers(1, 400), st.integers(1, 6), st.sampled_from(RATES))
def test_references_are_enough_where_the_most_extreme_model_is_rejected(
    count: int, channels: int, rate: Fraction
) -> None:
    """In exact numbers; rates that a whole number of references reaches to the digit among them."""
    others = {str(each): 1.0 for each in range(1, channels)}
    for references in {count, max(1, int(channels / rate) - 1)}:
        most_extreme = holm({"0": conformal(1.0, [0.0] * references), **others})["0"]
        exact = min(Fraction(1), Fraction(channels, references + 1)) <= rate
        assert rejects(most_extreme, float(rate)) == exact
        assert rejects(least_adjusted(channels, references), float(rate)) == exact


@pytest.mark.parametrize(("fpr", "references"), [(0.15, 19), (0.075, 39), (0.05, 59), (0.06, 49), (0.3, 9)])
def test_three_times_a_p_value_is_no_more_than_the_rate_that_it_equals(fpr: float, references: int) -> None:
    assert holm({"a": conformal(1.0, [0.0] * references), "b": 1.0, "c": 1.0})["a"] <= fpr


def test_an_easy_class_is_no_suspicion_where_it_is_easy_in_every_reference() -> None:
    readings = {"margin": reading(natural())}
    place = standing(POOL, ("none",), readings, ("margin",), by_class=True)
    assert place is not None
    assert place.p_value > 0.05
    assert place.references == 59


@pytest.mark.parametrize("target", [0, 7])
def test_a_class_that_is_unusual_for_its_kind_is_found_though_another_is_higher(target: int) -> None:
    scores = natural()
    scores[target] += 2.5
    by_class = standing(POOL, ("none",), {"margin": reading(scores)}, ("margin",), by_class=True)
    by_gap = standing(POOL, ("none",), {"margin": reading(scores)}, ("margin",), by_class=False)
    assert by_class is not None
    assert by_gap is not None
    assert by_class.p_value == pytest.approx(1 / 60)
    assert by_class.targets[0] == target
    assert by_gap.p_value > 0.05


def slow_value(scores: list[float], references: list[list[float]]) -> float:
    """A model's value in one detector, number by number from its definition."""

    def spread(values: list[float]) -> float:
        return 1.4826 * median([abs(value - median(values)) for value in values])

    own = [score - median(scores) for score in scores]
    others = [[score - median(each) for score in each] for each in references]
    spreads = [spread([each[i] for each in others]) for i in range(len(own))]
    z = [
        (own[i] - median([each[i] for each in others])) / (spreads[i] + 0.25 * median(spreads) + 1e-9)
        for i in range(len(own))
    ]
    return max(z)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_standing_is_that_of_the_slow_computation(classes: int, scale: float) -> None:
    draw = numpy.random.default_rng(classes)
    names = tuple(range(classes))
    table = [draw.normal(0.0, 1.0, classes).tolist() for _ in range(20)]
    scores = draw.normal(0.0, scale, classes).tolist()
    readings = [Reading(0.0, tuple(each), names) for each in table]
    references = tuple(Reference(f"r{i}", {}, {}, {"none": {"margin": each}}) for i, each in enumerate(readings))
    pool = Pool(replace(STRATUM, num_classes=classes), "", references, {})
    place = standing(pool, ("none",), {"margin": Reading(0.0, tuple(scores), names)}, ("margin",), by_class=True)
    null = [slow_value(each, table[:i] + table[i + 1 :]) for i, each in enumerate(table)]
    centre = median(null)
    assert place is not None
    assert place.p_value == conformal(slow_value(scores, table), null)
    reach = float(numpy.quantile(null, 0.9)) - centre
    assert place.score == pytest.approx((slow_value(scores, table) - centre) / reach)


@pytest.mark.parametrize("classes", [2, 3])
def test_one_of_two_classes_can_stand_out(classes: int) -> None:
    draw = numpy.random.default_rng(3)
    names = tuple(range(classes))
    models = [Reading(0.0, tuple(draw.normal(0.0, 1.0, classes)), names) for _ in range(60)]
    references = tuple(Reference(f"r{i}", {}, {}, {"none": {"margin": each}}) for i, each in enumerate(models))
    pool = Pool(replace(STRATUM, num_classes=classes), "", references, {})
    lifted = Reading(0.0, (20.0, *(0.0 for _ in names[1:])), names)
    place = standing(pool, ("none",), {"margin": lifted}, ("margin",), by_class=True)
    assert place is not None
    assert place.p_value == pytest.approx(1 / 61)
    assert place.targets[0] == 0


def test_a_channel_takes_its_most_suspicious_arm_and_counts_it_alike_for_the_references() -> None:
    scores = natural()
    scores[3] += 4.0
    readings = {"patch": reading(natural()), "additive": reading(scores)}
    place = standing(POOL, ("many",), readings, CHANNELS["inversion"], by_class=True)
    assert place is not None
    assert place.targets[0] == 3
    null = [
        standing(
            replace(POOL, references=tuple(each for each in POOL.references if each is not reference)),
            ("many",), reference.readings["many"], CHANNELS["inversion"], by_class=True,
        )
        for reference in POOL.references[:30]
    ]  # fmt: skip
    rejected = [each for each in null if each is not None and each.p_value <= 0.05]
    assert len(rejected) <= 6  # 30 exchangeable models at 0.05; 6 or more happen once in 300


@pytest.mark.parametrize("lacking", [0, 60, 119])
def test_detectors_are_put_together_reference_by_reference(lacking: int) -> None:
    """Where one reference lacks a detector, the other's largest values are still those of the same references."""
    levels = DRAW.normal(size=120)

    def reference(number: int) -> Reference:
        level = Reading(float(levels[number]))
        return Reference(f"r{number}", {}, {}, {"none": {"margin": level}, "many": {"subspace": level}})

    whole = [reference(number) for number in range(120)]
    half = replace(whole[lacking], readings={"none": whole[lacking].readings["none"], "many": {}})
    mixed = replace(POOL, references=(*whole[:lacking], half, *whole[lacking + 1 :]))
    without = replace(POOL, references=(*whole[:lacking], *whole[lacking + 1 :]))
    for value in (float(numpy.sort(levels)[-2:].mean()), 0.0, 9.0):
        own = {"margin": Reading(value), "subspace": Reading(value)}
        found = [standing(each, ("none", "many"), own, CHANNELS["margin"], by_class=False) for each in (mixed, without)]
        assert found[0] == found[1]


def test_too_few_references_that_have_every_detector_say_nothing() -> None:
    references = tuple(
        replace(
            each, readings={"none": {"margin": reading(natural())}} if number % 2 else {"many": each.readings["many"]}
        )
        for number, each in enumerate(POOL.references)
    )
    halves = replace(POOL, references=references)
    own = {"margin": reading(natural()), "patch": reading(natural())}
    assert standing(halves, ("none", "many"), own, ("margin",), by_class=True) is not None
    assert standing(halves, ("none", "many"), own, ("margin", "patch"), by_class=True) is None


def test_other_classes_are_compared_by_the_gap_alone() -> None:
    other = Reading(900.0, (1.0, 2.0, 3.0), (0, 1, 2))
    place = standing(POOL, ("none",), {"margin": other}, ("margin",), by_class=True)
    assert place is not None
    assert place.p_value == pytest.approx(1 / 60)
    assert place.targets == (2,)


def test_what_was_not_run_has_no_standing() -> None:
    assert standing(POOL, ("none",), {}, ("margin",), by_class=True) is None
    assert standing(POOL, ("few",), {"patch": reading(natural())}, CHANNELS["inversion"], by_class=True) is None
    few = replace(POOL, references=POOL.references[:2])
    assert standing(few, ("none",), {"margin": reading(natural())}, ("margin",), by_class=True) is None


def test_a_model_of_another_kind_is_not_covered() -> None:
    assert uncovered(POOL, {"accuracy": 0.72, "unheard_of": 3.0}) == ()
    assert uncovered(POOL, {"accuracy": 0.78}) == ()
    (sentence,) = uncovered(POOL, {"accuracy": 0.95})
    assert sentence.startswith("its accuracy is 0.95, the references' is 0.7 to 0.758")


def levelled(*levels: float) -> Pool:
    """References of which ``additive`` reads ``level`` of an ordinary class, and ``pairs`` nothing of any."""
    return replace(
        POOL,
        references=tuple(
            Reference(
                f"reference-{number}",
                {},
                {},
                {"many": {"additive": Reading(0.0, (level - 1, level, level + 2), (0, 1, 2)), "pairs": Reading(1.0)}},
            )
            for number, level in enumerate(levels)
        ),
    )


@pytest.mark.parametrize(("level", "covered"), [(-2.0, True), (-0.1, True), (0.1, False), (-3.9, True), (-4.1, False)])
def test_a_search_that_reads_otherwise_of_every_class_covers_nothing(level: float, covered: bool) -> None:
    """Where it fails on all classes alike, none stands out from the others, and no p-value is small."""
    readings = {"additive": Reading(0.0, (level, level - 5, level + 50), (0, 1, 2)), "pairs": Reading(9.0)}
    found = uncovered(levelled(-3.0, -2.0, -1.0), {}, ("none", "many"), readings)
    assert found == (
        () if covered else (f"what additive reads of an ordinary class is {level:.3g}, the references' is -3 to -1",)
    )


def test_what_too_few_references_read_says_nothing_of_a_level() -> None:
    readings = {"additive": Reading(0.0, (9.0,), (0,)), "patch": Reading(0.0, (9.0,), (0,))}
    assert uncovered(levelled(-3.0, -2.0), {}, ("many",), readings) == ()
    assert uncovered(levelled(-3.0, -2.0, -1.0), {}, ("few",), readings) == ()


def test_a_pool_survives_its_file(tmp_path: Path) -> None:
    save_pool(POOL, tmp_path / "pool.json")
    assert load_pool(tmp_path / "pool.json") == POOL
    assert load_pool(tmp_path / "pool.json").digest == POOL.digest
    assert len((tmp_path / "pool.json").read_text().splitlines()) < 59 + 60


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', '{"format": 1, "extra": 2}'])
def test_files_that_are_no_pools(tmp_path: Path, content: str) -> None:
    (tmp_path / "pool.json").write_text(content)
    with pytest.raises(ConfigError):
        load_pool(tmp_path / "pool.json")


def test_a_missing_pool_says_how_one_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quarantine calibrate"):
        load_pool(tmp_path / "none.json")


def test_pools_name_each_reference_once() -> None:
    with pytest.raises(ConfigError, match="distinct names"):
        replace(POOL, references=POOL.references[:1] * 2)


def slow_outlying(scores: list[float], floor: float) -> float:
    ordered = sorted(scores, reverse=True)
    best = -float("inf")
    for count in (1, 2, 3):
        rest = ordered[count:]
        if len(rest) < 3 and count > 1:
            break
        middle = sorted(rest)[(len(rest) - 1) // 2]
        deviations = sorted(abs(each - middle) for each in rest)
        best = max(best, (ordered[count - 1] - rest[0]) / (1.4826 * deviations[(len(rest) - 1) // 2] + floor))
    return best


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12), st.sampled_from([0.05, 0.5]))
def test_outlying_against_its_definition(scores: list[float], floor: float) -> None:
    found, members = outlying(scores, floor=floor)
    assert found == pytest.approx(slow_outlying(scores, floor), abs=1e-9)
    inside, outside = [scores[i] for i in members], [s for i, s in enumerate(scores) if i not in members]
    assert all(one >= other for one, other in itertools.product(inside, outside))


def test_outlying_names_several_targets() -> None:
    statistic, members = outlying([0.0, 0.1, 5.0, 0.2, 5.1, 0.15, 0.05], floor=0.1)
    assert members == (4, 2)
    assert statistic > 10
    assert outlying([1.0], floor=0.1) == (0.0, ())


def test_a_shipped_pool_is_taken_for_its_own_classes_alone() -> None:
    settings = digest(Settings())
    shipped = [load_pool(path) for path in shipped_pools()]
    assert shipped
    for pool in shipped:
        assert pool_for(pool.stratum, settings) == pool
        assert pool_for(replace(pool.stratum, class_names=()), settings) is None
        others = tuple(f"texture {number}" for number in range(pool.stratum.num_classes))
        assert pool_for(replace(pool.stratum, class_names=others), settings) is None
        assert pool_for(pool.stratum, "sha256:of other settings") is None
