"""From what detectors saw to one of three words, and why: every way to each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy
import pytest
import torch
from torch import Tensor, nn

from components.scan_backdoor.step import _findings, _pictures
from defense_core.data import CleanSet, joined
from defense_core.errors import ConfigError
from defense_core.progress import NullProgress
from defense_core.scan import judgement
from defense_core.scan import observe as observe_module
from defense_core.scan.base import Deadline, InvertedTrigger, Observation, Subject
from defense_core.scan.calibrate import CHANNELS
from defense_core.scan.confirm import Confirmation, confirm
from defense_core.scan.detectors import FEW, MANY, SEARCHED, Settings, regime_of, searched_and_held_out
from defense_core.scan.judgement import ScanConfig, judge, scan
from defense_core.scan.observe import Observed
from defense_core.scan.pool import Pool, Probability, Reference, Stratum, reading_of
from defense_core.scan.report import ScanReport
from defense_core.scan.wording import narrowed
from defense_core.task import ImageClassification
from defense_core.verdict import Verdict
from tests.scan.test_confirm import Corner, images, patch

NAMES = ("a", "b", "c", "d")
TASK = ImageClassification((1, 8, 8), 4, mean=(0.0,), std=(1.0,), class_names=NAMES)
DRAW = numpy.random.default_rng(3)
DATA_FREE, INVERSIONS = ("weights", "margin"), ("patch", "additive", "generator")


@pytest.fixture(autouse=True)
def _own_draw() -> None:
    """Every test draws the same, alone or after others."""
    DRAW.bit_generator.state = numpy.random.default_rng(4).bit_generator.state


def observation(detector: str, *, suspicious: bool = False) -> Observation:
    scores = DRAW.normal(0.0, 0.2, 4)
    if suspicious:
        scores[2] += 5.0
    triggers: tuple[InvertedTrigger, ...] = (patch(2), patch(0), patch(1)) if detector == "patch" else ()
    classes = () if detector in ("pairs", "activeness", "curvature") else (0, 1, 2, 3)
    return Observation(
        detector, 9.0 if suspicious else float(abs(DRAW.normal())), f"{detector} says so",
        tuple(map(float, scores)) if classes else (), classes, (2,), triggers=triggers,
    )  # fmt: skip


def observed(*suspicious: str, without: tuple[str, ...] = ()) -> Observed:
    names = [each for each in (*DATA_FREE, *INVERSIONS, "pairs", "activeness", "curvature") if each not in without]
    found = {each: observation(each, suspicious=each in suspicious) for each in names}
    return Observed(
        found, {"mean_log_margin": 1.5, "log_weight_norm": -2.0}, without, searched=images(), held_out=images(30)
    )


def pool(count: int = 60) -> Pool:
    references = []
    for number in range(count):
        found = observed().observations
        none = {name: reading_of(found[name]) for name in DATA_FREE}
        many = {name: reading_of(found[name]) for name in found if name not in DATA_FREE}
        covariates = {"mean_log_margin": 1.0 + number / 60, "log_weight_norm": -2.5 + number / 60}
        references.append(Reference(f"r{number}", {}, covariates, {"none": none, "many": many}))
    stratum = Stratum("corner", 4, (1, 8, 8), NAMES)
    return Pool(stratum, "sha256:" + "0" * 64, tuple(references), {"many": Probability(-2.0, 1.0, 70)})


POOL = pool()


def without_pairs(whole: Pool = POOL) -> Pool:
    """References that pairs could not be read on either, as with 64 classes or more."""
    return replace(whole, references=tuple(
        replace(each, readings={
            regime: {name: found for name, found in read.items() if name != "pairs"}
            for regime, read in each.readings.items()
        })
        for each in whole.references
    ))  # fmt: skip


def judged(
    seen: Observed, *, pool: Pool | None = POOL, model: nn.Module | None = None, fpr: float = 0.05
) -> ScanReport:
    return judge(
        model or Corner(), images(30), seen, ScanConfig(fpr=fpr), pool=pool, task=TASK, device="cpu",
        progress=NullProgress(),
    )  # fmt: skip


def test_nothing_unusual_passes_and_is_not_called_clean() -> None:
    report = judged(observed())
    assert report.verdict is Verdict.PASS
    assert report.sentence.startswith("No evidence of a backdoor found at a false positive rate of 0.05")
    assert "clean (" not in report.sentence
    assert report.target_classes == ()
    assert report.p_value is not None
    assert report.p_value > 0.05
    assert report.references == 60


def test_without_images_each_reference_counts_once() -> None:
    seen = observed("margin", without=("patch", "additive", "generator", "pairs", "activeness", "curvature"))
    report = judge(
        Corner(), None, replace(seen, unfinished=(), held_out=None), ScanConfig(), pool=POOL, task=TASK,
        device="cpu", progress=NullProgress(),
    )  # fmt: skip
    assert report.p_value == pytest.approx(1 / 61)
    assert report.verdict is Verdict.UNKNOWN
    assert report.target_classes == (2,)


def test_a_confirmed_suspicion_fails_and_names_the_class() -> None:
    report = judged(observed("patch"))
    assert report.verdict is Verdict.FAIL
    assert report.target_classes == (2,)
    assert report.p_value == pytest.approx(3 / 61)
    assert report.confirmations[0].confirmed
    assert "class 2 sends 100%" in report.sentence
    assert "stands out from 60 clean reference models (p = 0.049)" in report.sentence
    assert {each.name: each.p_value for each in report.detectors}["patch"] == pytest.approx(1 / 61)
    assert report.probability is not None
    assert report.probability > 0.5


def test_a_suspicion_that_does_not_hold_is_unknown() -> None:
    report = judged(observed("patch"), model=Corner(backdoored=False))
    assert report.verdict is Verdict.UNKNOWN
    assert "no trigger that was found for it holds on held-out clean images" in report.sentence


@pytest.mark.parametrize(
    ("names", "least"), [(NAMES, True), (("a", "b", "c", "e"), False), (NAMES[::-1], False), ((), False)]
)
def test_classes_are_compared_one_by_one_where_they_are_those_of_the_references(
    names: tuple[str, ...], least: bool
) -> None:
    seen = observed()
    scores = tuple(score + 3.0 * (number == 2) for number, score in enumerate(seen.observations["patch"].class_scores))
    easy = replace(seen.observations["patch"], statistic=0.0, class_scores=scores)
    report = judge(
        Corner(), images(30), replace(seen, observations={**seen.observations, "patch": easy}), ScanConfig(), pool=POOL,
        task=replace(TASK, class_names=names), device="cpu", progress=NullProgress(),
    )  # fmt: skip
    entry = {each.name: each for each in report.detectors}["patch"]
    assert entry.p_value is not None
    assert (entry.p_value == pytest.approx(1 / 61)) is least
    assert least or entry.p_value > 0.5


def test_evidence_only_detectors_never_decide() -> None:
    report = judged(observed("weights", "activeness", "curvature"))
    assert report.verdict is Verdict.PASS
    assert {each.name: each.channel for each in report.detectors}["weights"] == ""


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"pool": None}, "no calibration pool"),
        ({"pool": pool(40)}, "40 references cannot tell a rate of 0.05: the smallest p-value of 3 channels is 0.073"),
        ({"fpr": 0.01}, "60 references cannot tell a rate of 0.01"),
    ],
)
def test_what_cannot_be_decided_is_unknown_and_says_why(changes: dict[str, object], why: str) -> None:
    report = judged(observed(), **changes)  # type: ignore[arg-type]
    assert report.verdict is Verdict.UNKNOWN
    assert not report.comparable
    assert why in " ".join(report.reasons)


def test_a_model_of_another_kind_is_unknown_even_where_nothing_stands_out() -> None:
    report = judged(replace(observed(), covariates={"mean_log_margin": 9.0}))
    assert report.verdict is Verdict.UNKNOWN
    assert not report.comparable
    assert report.probability is None
    assert "its mean log margin is 9" in report.sentence


def test_a_channel_that_the_pool_has_not_read_is_no_pass() -> None:
    seen = observed(without=("generator", "pairs", "activeness", "curvature"))
    few = judge(
        Corner(), images(5), replace(seen, unfinished=()), ScanConfig(), pool=POOL, task=TASK, device="cpu",
        progress=NullProgress(),
    )  # fmt: skip
    assert few.verdict is Verdict.UNKNOWN
    assert "holds no readings of inversion with so few clean images" in few.sentence


def test_a_scan_that_ran_out_of_time_is_unknown_and_its_channels_still_count_under_holm() -> None:
    report = judged(observed(without=("generator", "pairs")))
    assert report.verdict is Verdict.UNKNOWN
    assert report.comparable
    assert "ran out before generator, pairs" in report.sentence
    (only,) = report.channels
    assert only.name == "margin"
    assert only.adjusted == pytest.approx(min(1.0, 3 * only.p_value))


def test_detectors_that_are_evidence_only_keep_no_scan_from_its_verdict() -> None:
    seen = blind(observed())

    def late(*unfinished: str) -> ScanReport:
        finished = {name: each for name, each in seen.observations.items() if name not in unfinished}
        return judged(replace(seen, observations=finished, unfinished=unfinished), pool=without_pairs())

    report = late("activeness", "curvature")
    assert report.verdict is Verdict.PASS
    assert report.unfinished == ()
    report = late("pairs", "activeness", "curvature")
    assert report.verdict is Verdict.UNKNOWN
    assert "ran out before pairs had finished" in report.sentence


@pytest.mark.parametrize(("fpr", "references"), [(0.075, 39), (0.15, 19)])
def test_a_rate_that_the_references_just_reach_is_no_pass(fpr: float, references: int) -> None:
    seen = replace(observed("patch"), covariates={"mean_log_margin": 1.1, "log_weight_norm": -2.4})
    report = judged(seen, pool=pool(references), fpr=fpr)
    assert report.verdict is Verdict.FAIL
    assert report.p_value == fpr
    lines = {each.rule: each.verdict for each in _findings("scan", report)}
    assert lines["scan.inversion"] is Verdict.FAIL


def test_an_answer_that_is_not_finite_on_a_held_out_image_is_unknown() -> None:
    class Overflow(Corner):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where((x[:, 0, 7, 7] > 0.99)[:, None], math.nan, super().forward(x))

    held_out = images(30)
    held_out.images[5, 0, 7, 7] = 255
    report = judged(replace(observed("patch"), held_out=held_out), model=Overflow())
    assert report.verdict is Verdict.UNKNOWN
    assert report.target_classes == (2,)
    assert report.confirmations == ()
    assert "could not be tried on the held-out clean images: " in report.sentence
    assert "not finite" in report.sentence
    assert "no trigger that was found" not in report.sentence


def test_what_is_confirmed_in_a_model_of_another_kind_is_told_and_unknown() -> None:
    report = judged(replace(observed("patch"), covariates={"mean_log_margin": 9.0}))
    assert report.verdict is Verdict.UNKNOWN
    assert report.target_classes == (2,)
    assert report.confirmations[0].confirmed
    assert "its mean log margin is 9" in report.sentence
    assert "class 2 sends 100%" in report.sentence


def test_a_confirmed_suspicion_stands_without_what_the_time_did_not_allow() -> None:
    report = judged(observed("patch", without=("pairs",)))
    assert report.verdict is Verdict.FAIL
    assert report.reasons == ()


def test_a_suspicion_that_there_was_no_time_to_confirm_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judgement, "confirm", timeless := Timeless())
    report = judge(
        Corner(), images(30), observed("patch"), ScanConfig(budget_s=60), pool=POOL, task=TASK, device="cpu",
        progress=NullProgress(),
    )  # fmt: skip
    assert timeless.deadline.is_set
    assert report.verdict is Verdict.UNKNOWN
    assert [each.target for each in report.confirmations] == [1]
    assert "the 60 seconds that it was given for this ran out" in report.reasons[0]
    assert report.reasons == report.reasons[:1]


class Timeless:
    """Confirms as usual until one class is done; then the clock jumps to the end."""

    def __call__(
        self, subject: Subject, held_out: CleanSet, observations: Sequence[Observation], targets: Sequence[int]
    ) -> Iterator[Confirmation]:
        self.deadline = subject.deadline
        yield from confirm(subject, held_out, [replace(each, triggers=(patch(1),)) for each in observations[2:3]], (1,))
        yield from confirm(replace(subject, deadline=Deadline(0.0)), held_out, observations, targets)


def seen_of(classes: int, looked: int, facts: dict[str, int]) -> Observed:
    """What ``margin`` and ``pairs`` saw of a model of many classes."""
    rows = tuple(range(looked))
    margin = Observation("margin", 1.0, "", class_scores=tuple(map(float, rows)), classes=rows)
    found = {"margin": margin, "pairs": Observation("pairs", 1.0, "", facts=facts)}
    return Observed(found, {}, ())


def test_a_scan_of_many_classes_says_which_it_looked_at() -> None:
    assert narrowed(seen_of(43, 16, {"sources": 12, "pairs": 96}), 43) == (
        "Of 43 classes margin looked closely at 16, which a first look at them chose",
        "Changes that lead from one class to another were looked for from 12 of 43 classes, in 96 pairs",
    )
    assert narrowed(seen_of(10, 10, {"sources": 10, "pairs": 90}), 10) == ()
    assert narrowed(seen_of(12, 12, {"sources": 9, "pairs": 72}), 12) == (
        "Changes that lead from one class to another were looked for from 9 of 12 classes, in 72 pairs",
    )
    assert narrowed(seen_of(12, 9, {}), 12) == ()  # subspace has no image of three classes, and says so itself


def test_a_suspicion_of_pairs_alone_names_its_class_and_can_be_confirmed() -> None:
    seen = observed("pairs")
    others = {name: replace(each, triggers=()) for name, each in seen.observations.items()}
    named = replace(seen.observations["pairs"], triggers=(patch(2), patch(0)))
    report = judged(replace(seen, observations={**others, "pairs": named}))
    assert report.target_classes == (2,)
    assert {each.name: each.targets for each in report.channels}["pairs"] == (2,)
    assert [(each.detector, each.confirmed) for each in report.confirmations] == [("pairs", True)]
    assert report.verdict is Verdict.FAIL


def test_without_other_images_a_suspicion_is_not_confirmed_on_those_it_was_found_with() -> None:
    report = judged(replace(observed("patch"), held_out=None))
    assert report.verdict is Verdict.UNKNOWN
    assert report.confirmations == ()
    assert "no clean images are left that were not searched with" in report.sentence
    assert "give 20 or more" in report.sentence


def test_outputs_that_are_not_finite_are_unknown_never_pass() -> None:
    class Broken(Corner):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * math.nan

    report = scan(Broken(), None, ScanConfig(), pool=POOL, task=TASK, device="cpu", progress=NullProgress())
    assert report.verdict is Verdict.UNKNOWN
    assert "not finite" in report.sentence
    assert report.detectors == ()


def test_results_are_json_and_hold_no_tensor() -> None:
    results = judged(observed("patch")).to_results()
    assert "observations" not in results
    assert results["channels"][0]["name"] == "margin"
    assert results["verdict"] == "FAIL"


@pytest.mark.parametrize(
    ("count", "regime"), [(0, "none"), (FEW - 1, "none"), (FEW, "few"), (MANY - 1, "few"), (MANY, "many")]
)
def test_regimes(count: int, regime: str) -> None:
    clean = images(30).subset(torch.arange(count))
    assert regime_of(clean) == regime
    searched, held_out = searched_and_held_out(clean, regime)  # type: ignore[arg-type]
    if regime == "none":
        assert searched is None
        assert held_out is None
        return
    assert searched is not None
    assert len(searched) == SEARCHED[regime]
    assert int(searched.labels.bincount().max() - searched.labels.bincount().min()) <= 1
    left = count - len(searched)
    assert (None if held_out is None else len(held_out)) == (left if left >= FEW else None)


@pytest.mark.parametrize("settings", [{"fpr": 0.0}, {"fpr": 1.0}, {"budget_s": -1.0}])
def test_settings_out_of_range(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ScanConfig(**settings)


def test_a_picture_says_what_its_own_trigger_did() -> None:
    report = judged(observed("patch"))
    own = replace(report.observations["additive"], targets=(2, 1))
    others = replace(own, targets=(1, 2))
    faint = InvertedTrigger(2, "additive", torch.full((1, 8, 8), 6.0))
    for seen, said in ((others, "What additive found for this class"), (own, own.why)):
        shown = replace(report, observations={**report.observations, "additive": seen})
        pictures = _pictures(shown, [("patch", patch(2)), ("additive", faint)], images(3), NAMES)
        tried, other = (each.note for each in pictures if each.name.startswith("trigger"))
        assert tried == "Works on 100% of 90 held-out images"
        assert other == said


def blind(seen: Observed) -> Observed:
    """``seen`` where nothing stands out and ``pairs`` could not search, as with 64 classes or more."""
    even = {
        name: replace(each, statistic=0.0, class_scores=(0.0,) * len(each.classes))
        for name, each in seen.observations.items()
    }
    return replace(seen, observations={**even, "pairs": replace(even["pairs"], facts={"measured": False})})


def test_a_search_that_fails_on_every_class_alike_is_no_pass() -> None:
    """No class stands out from the others where none can be reached: the reading itself is another one."""
    seen = observed()
    lowered = replace(
        seen.observations["additive"],
        class_scores=tuple(score - 1000 for score in seen.observations["additive"].class_scores),
    )
    report = judged(replace(seen, observations={**seen.observations, "additive": lowered}))
    assert judged(seen).verdict is Verdict.PASS
    assert report.verdict is Verdict.UNKNOWN
    assert "The pool does not cover this model: what additive reads of an ordinary class is -" in report.sentence


def test_a_search_that_had_too_few_images_is_not_claimed() -> None:
    seen = blind(observed())
    report = judged(seen, pool=without_pairs())
    assert report.verdict is Verdict.PASS
    assert {channel.name for channel in report.channels} == {"margin", "inversion"}
    assert all(channel.adjusted >= min(1.0, 2 * channel.p_value) for channel in report.channels)
    assert min(channel.adjusted for channel in report.channels) == pytest.approx(
        min(1.0, 3 * min(channel.p_value for channel in report.channels))
    )
    assert not any("lead from one class to another" in sentence for sentence in report.coverage)
    assert any("none has two of the images" in sentence for sentence in report.coverage)
    assert any("lead from one class to another" in sentence for sentence in judged(observed()).coverage)


@pytest.mark.parametrize("detector", ["pairs", "generator", "margin"])
def test_what_saw_the_references_and_not_the_model_keeps_it_from_a_pass(detector: str) -> None:
    seen = observed()
    blinded = replace(seen.observations[detector], facts={"measured": False})
    report = judged(replace(seen, observations={**seen.observations, detector: blinded}))
    assert judged(seen).verdict is Verdict.PASS
    assert report.verdict is Verdict.UNKNOWN
    assert f"What {detector} would have found is not known" in report.sentence
    assert report.probability is None
    assert any(f"Without what {detector} would have looked for" in each for each in report.coverage)
    channel = next(name for name, members in CHANNELS.items() if detector in members)
    lines = {line.rule: line.verdict for line in _findings("scan", report)}
    assert lines.get(f"scan.{channel}", Verdict.UNKNOWN) is Verdict.UNKNOWN
    # A suspicion that is confirmed stands without it.
    if detector != "margin":
        suspected = observed("patch")
        found = judged(replace(suspected, observations={**suspected.observations, detector: blinded}))
        assert found.verdict is Verdict.FAIL


def test_a_scan_cut_short_states_no_probability_and_claims_no_search_that_did_not_end() -> None:
    report = judged(observed(without=("generator", "pairs")))
    assert report.probability is None
    assert "Without what generator, pairs would have looked for: they were not read on this model" in report.coverage
    broken = judged(replace(observed(), observations={}, covariates={}, failure="it answers NaN"))
    assert broken.coverage == ("Looked for nothing: the model could not be observed",)


def test_no_image_is_confirmed_on_whose_copy_was_searched_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def looked(model: nn.Module, clean: CleanSet | None, *_: object, **__: object) -> Observed:
        asked.append(0 if clean is None else len(clean))
        return observed()

    monkeypatch.setattr(judgement, "observe", looked)
    draw = torch.Generator().manual_seed(0)
    distinct = CleanSet(torch.randint(256, (60, 1, 8, 8), generator=draw).to(torch.uint8), torch.arange(60) % 4, 4)
    report = scan(
        Corner(), joined(distinct, distinct), ScanConfig(), pool=POOL, task=TASK, device="cpu", progress=NullProgress()
    )
    assert asked == [60]
    assert (report.regime, report.images) == ("few", 60)


def test_a_channel_that_could_not_search_still_takes_references() -> None:
    report = judged(blind(observed()), pool=without_pairs(pool(45)))
    assert len(report.channels) == 2
    assert report.verdict is Verdict.UNKNOWN
    assert not report.comparable
    assert "45 references cannot tell a rate of 0.05: the smallest p-value of 3 channels is 0.065" in report.sentence


def test_the_channel_with_the_fewest_references_tells_the_rate() -> None:
    whole = pool(60)
    less = [replace(each, readings={**each.readings, "many": {}}) for each in whole.references[:20]]
    report = judged(observed(), pool=replace(whole, references=(*less, *whole.references[20:])))
    assert report.verdict is Verdict.UNKNOWN
    assert "40 references cannot tell a rate of 0.05" in report.sentence


def test_the_detector_margin_is_not_its_channel() -> None:
    seen = observed()
    subspace = observation("subspace", suspicious=True)
    readings = [
        {**each.readings, "many": {**each.readings["many"], "subspace": reading_of(observation("subspace"))}}
        for each in POOL.references
    ]
    references = [replace(each, readings=of) for each, of in zip(POOL.references, readings, strict=True)]
    report = judged(
        replace(seen, observations={**seen.observations, "subspace": subspace}),
        pool=replace(POOL, references=tuple(references)),
    )
    channel = next(each for each in report.channels if each.name == "margin")
    alone = {each.name: each for each in judged(seen).detectors}["margin"]
    detectors = {each.name: each for each in report.detectors}
    assert channel.p_value == detectors["subspace"].p_value == pytest.approx(1 / 61)
    assert detectors["margin"] == alone
    assert detectors["margin"].score != channel.score


def test_a_detector_stands_by_itself_where_the_rest_of_its_channel_had_no_time() -> None:
    report = judged(observed(without=("subspace",)))
    assert "margin" not in {each.name for each in report.channels}
    assert {each.name: each for each in report.detectors}["margin"].p_value is not None


def test_detectors_and_confirmation_run_where_convolutions_are_the_same_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: list[str] = []

    def noted(module: str) -> Callable[[object], AbstractContextManager[None]]:
        @contextmanager
        def same_each_time(device: object) -> Iterator[None]:
            entered.append(f"{module} {torch.device(str(device)).type}")
            yield

        return same_each_time

    monkeypatch.setattr(observe_module, "same_each_time", noted("observe"))
    monkeypatch.setattr(judgement, "same_each_time", noted("confirm"))
    observe_module.observe(
        Corner(), None, "none", Settings(), task=TASK, device="cpu", progress=NullProgress(), only=("weights",)
    )
    judged(observed("patch"))
    assert entered == ["observe cpu", "confirm cpu"]


@pytest.mark.parametrize(("classes", "said"), [(4, ""), (3, "in 1 class that"), (2, "in 2 classes that")])
def test_classes_that_no_image_is_of_are_not_claimed(classes: int, said: str) -> None:
    some = images(30)
    seen = replace(observed(), searched=some.subset((some.labels < classes).nonzero().flatten()))
    seen = replace(seen, observations={**seen.observations, "subspace": observation("subspace")})
    sentences = [each for each in judged(seen).coverage if "that no image is of" in each]
    assert len(sentences) == bool(said)
    assert all(said in each for each in sentences)
