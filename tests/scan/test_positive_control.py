"""The positive control on scikit-learn's digits: a patch is planted into a copy, found or missed, and purified."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from components.control_model.step import _finding
from defense_core.architectures import build
from defense_core.config import digest
from defense_core.data import CleanSet, Splits, joined, split_clean_set
from defense_core.errors import ConfigError, DataError, MethodDiverged, MethodNotApplicable
from defense_core.loop import Tuning, finished, tune
from defense_core.positive_control import Control, ControlConfig, positive_control
from defense_core.progress import NullProgress
from defense_core.scan.additive import AdditiveConfig
from defense_core.scan.detectors import DETECTORS, Settings
from defense_core.scan.features import ActivenessConfig, CurvatureConfig
from defense_core.scan.generator import GeneratorConfig
from defense_core.scan.judgement import ScanConfig, scan
from defense_core.scan.margin import MarginConfig
from defense_core.scan.observe import Observed, observe
from defense_core.scan.pairs import PairsConfig
from defense_core.scan.patch import PatchConfig
from defense_core.scan.pool import Pool, Reading, Reference, Stratum, reading_of
from defense_core.scan.report import ScanReport
from defense_core.task import ImageClassification
from tests.small_pool import REFERENCES, beside

TASK = ImageClassification((1, 8, 8), 10, mean=(0.3,), std=(0.35,), augment="none")
SETTINGS = Settings(
    margin=MarginConfig(starts=1, steps=5),
    additive=AdditiveConfig(steps=2),
    patch=PatchConfig(steps=5),
    generator=GeneratorConfig(steps=2),
    pairs=PairsConfig(steps=1, images=1, judged=1),
    activeness=ActivenessConfig(steps=1),
    curvature=CurvatureConfig(images=8, hessian_images=4, products=2),
)
"""Too few steps to find anything: how well the scan finds things is measured by benchmarks, not here."""
CONFIG = ScanConfig(fpr=0.5, settings=SETTINGS)
QUIET = NullProgress()


@pytest.fixture(scope="module")
def splits() -> Splits:
    digits = load_digits()
    pixels = torch.from_numpy((digits.images[:400] / 16 * 255).round().astype(numpy.uint8)).unsqueeze(1)
    clean = CleanSet(pixels, torch.from_numpy(digits.target[:400]), 10)
    return split_clean_set(clean, seed=0)


@pytest.fixture(scope="module")
def model(splits: Splits) -> nn.Module:
    torch.manual_seed(0)
    network = build("small_cnn", {"width": 8, "in_channels": 1, "num_classes": 10})
    tuning = Tuning(epochs=12, batch_size=32, lr=0.05)
    tune(network, splits.fit, task=TASK, tuning=tuning, seed=0, device="cpu", progress=QUIET, name="train")
    return finished(network, "training")


def pool_beside(model: nn.Module, clean: CleanSet, shift: float) -> Pool:
    """References whose statistics lie ``shift`` above the model's."""
    seen = observe(model, clean, "many", SETTINGS, task=TASK, device="cpu", progress=QUIET)

    def readings(number: int, regime: str) -> dict[str, Reading]:
        return {
            name: beside(reading_of(each), number, shift=shift)
            for name, each in seen.observations.items()
            if regime in DETECTORS[name].regimes
        }

    references = tuple(
        Reference(f"r{number}", {}, {}, {regime: readings(number, regime) for regime in ("none", "many")})
        for number in range(REFERENCES)
    )
    return Pool(Stratum("small_cnn", 10, (1, 8, 8)), digest(SETTINGS), references, {})


def controlled(
    model: nn.Module, splits: Splits, pool: Pool | None, *, scanning: ScanConfig = CONFIG, **changes: Any
) -> Control:
    config = ControlConfig(**{"method": "", "epochs": 15, **changes})
    return positive_control(model, splits, config, scanning, pool=pool, task=TASK, seed=0, device="cpu", progress=QUIET)


def test_a_patch_that_stands_out_would_have_been_detected(model: nn.Module, splits: Splits) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = controlled(model, splits, pool_beside(model, splits.fit, -100.0), size_share=0.25, method="fine_tuning")
    assert found.planted
    assert found.planted_asr is not None
    assert found.planted_asr >= 0.9
    assert found.scan.comparable
    assert found.detected
    assert found.target_named
    assert found.scan.p_value is not None
    assert found.scan.p_value <= 0.5
    assert found.asr_after is not None
    sentence = found.sentence()
    assert sentence.startswith(
        "A patch of 2×2 pixels planted into a copy of this model would have been detected (p = 0."
    )
    assert f"took its success from {found.planted_asr:.0%} to {found.asr_after:.0%}" in sentence
    results = found.to_results()
    assert results["sentence"] == sentence
    assert results["scan"]["p_value"] == found.scan.p_value
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_patch_that_looks_like_every_clean_model_would_have_been_missed(model: nn.Module, splits: Splits) -> None:
    missed = controlled(model, splits, pool_beside(model, splits.fit, 1000.0), size_share=0.25)
    assert missed.planted
    assert not missed.detected
    assert missed.asr_after is None
    assert "would not have been detected (p = " in missed.sentence()


def test_a_copy_that_stands_out_for_another_class_was_not_detected(
    model: nn.Module, splits: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def another(*arguments: Any, **named: Any) -> ScanReport:
        return replace(scan(*arguments, **named), p_value=0.01, target_classes=(9,))

    monkeypatch.setattr("defense_core.positive_control.scan", another)
    missed = controlled(model, splits, pool_beside(model, splits.fit, -100.0), size_share=0.25)
    assert missed.planted
    assert missed.target != 9
    assert not missed.detected
    assert missed.sentence().endswith(
        f"would not have been detected (p = 0.010): the copy stands out, but not for class {missed.target}"
    )


@pytest.mark.parametrize(("images", "scanned"), [(400, 150), (150, 150)])
def test_a_copy_is_scanned_with_images_it_was_not_planted_with_where_they_are_enough(
    model: nn.Module, splits: Splits, monkeypatch: pytest.MonkeyPatch, images: int, scanned: int
) -> None:
    asked: list[CleanSet] = []

    def watched(copy: nn.Module, clean: CleanSet, *arguments: Any, **named: Any) -> ScanReport:
        asked.append(clean)
        return scan(copy, clean, *arguments, **named)

    monkeypatch.setattr("defense_core.positive_control.scan", watched)
    every = joined(splits.fit, splits.unfitted)
    given = splits if images == len(every) else split_clean_set(every.subset(torch.arange(images)), seed=0)
    controlled(model, given, None, epochs=1)
    assert [len(clean) for clean in asked] == [scanned]
    assert (asked[0].digest == given.unfitted.digest) == (scanned < images)


def test_references_of_another_kind_tell_nothing(model: nn.Module, splits: Splits) -> None:
    pool = pool_beside(model, splits.fit, -100.0)
    others = tuple(replace(each, covariates={"accuracy": 0.2}) for each in pool.references)
    found = controlled(model, splits, replace(pool, references=others), size_share=0.25)
    assert found.planted
    assert found.scan.p_value is not None
    assert not found.scan.comparable
    assert not found.detected
    assert "cannot be told whether the scan would have found it" in found.sentence()


def test_too_few_references_for_the_rate_tell_nothing(model: nn.Module, splits: Splits) -> None:
    pool = pool_beside(model, splits.fit, -100.0)
    strict = replace(CONFIG, fpr=0.05)  # three channels of twelve references reach no less than 3/13
    found = controlled(model, splits, pool, scanning=strict, size_share=0.25)
    assert found.planted
    assert not found.scan.comparable
    assert not found.detected
    assert "without enough clean reference models" in found.sentence()


def test_a_channel_without_references_counts_under_the_rate_all_the_same(model: nn.Module, splits: Splits) -> None:
    pool = pool_beside(model, splits.fit, -100.0)
    without = tuple(
        replace(
            each,
            readings={
                of: {name: found[name] for name in found if name != "pairs"} for of, found in each.readings.items()
            },
        )
        for each in pool.references
    )
    found = controlled(  # two channels of twelve references reach 2/13, three no less than 3/13
        model, splits, replace(pool, references=without), scanning=replace(CONFIG, fpr=0.2), size_share=0.25
    )
    assert found.planted
    assert not found.scan.comparable
    assert not found.detected


@pytest.mark.parametrize(("unfinished", "verdict"), [((), "FAIL"), (("pairs",), "UNKNOWN")])
def test_a_scan_that_ran_out_of_time_missed_nothing(
    model: nn.Module, splits: Splits, monkeypatch: pytest.MonkeyPatch, unfinished: tuple[str, ...], verdict: str
) -> None:
    def stopped(*arguments: Any, **named: Any) -> Observed:
        seen = observe(*arguments, **named)
        kept = {name: each for name, each in seen.observations.items() if name not in unfinished}
        return replace(seen, observations=kept, unfinished=unfinished)

    pool = pool_beside(model, splits.fit, 1000.0)
    monkeypatch.setattr("defense_core.scan.judgement.observe", stopped)
    missed = controlled(model, splits, pool, size_share=0.25)
    assert missed.scan.comparable
    assert not missed.detected
    assert _finding(missed).verdict == verdict
    assert ("ran out before pairs had finished" in missed.sentence()) == bool(unfinished)


def test_one_image_a_class_leaves_nothing_to_measure_on(model: nn.Module, splits: Splits) -> None:
    first = torch.tensor([int((splits.fit.labels == label).nonzero()[0]) for label in range(10)])
    alone = split_clean_set(splits.fit.subset(first), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match="no clean images are left to measure the positive control on"):
        controlled(model, alone, None)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_references_nobody_can_tell(model: nn.Module, splits: Splits) -> None:
    unknown = controlled(model, splits, None, size_share=0.25)
    assert not unknown.detected
    assert unknown.scan.p_value is None
    assert "cannot be told whether the scan would have found it" in unknown.sentence()


def test_what_could_not_be_planted_says_nothing(model: nn.Module, splits: Splits) -> None:
    failed = controlled(model, splits, None, rate=0.02, epochs=1, lr=1e-6)
    assert not failed.planted
    assert failed.sentence().endswith("the control says nothing")
    assert "1×1 pixels" in failed.sentence()


class Constant(nn.Module):
    """Answers one class to every image, whatever it is trained on."""

    def __init__(self, target: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 10)
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * self.linear(x.flatten(1)) + nn.functional.one_hot(torch.tensor(self.target), 10).float()


def test_a_copy_that_answers_the_target_to_everything_holds_no_backdoor(model: nn.Module, splits: Splits) -> None:
    target = controlled(model, splits, None, epochs=1).target
    collapsed = controlled(Constant(target), splits, None, epochs=1)
    assert (collapsed.planted_asr, collapsed.untriggered) == (1.0, 1.0)
    assert not collapsed.planted
    assert collapsed.sentence().endswith("the control says nothing")


@pytest.mark.parametrize("error", [MethodDiverged("the loss became NaN"), MethodNotApplicable("no scales to mask")])
def test_what_the_scan_missed_stands_where_purification_fails(
    model: nn.Module, splits: Splits, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*arguments: Any, **named: Any) -> None:
        raise error

    monkeypatch.setattr("defense_core.positive_control.purify", failing)
    missed = controlled(model, splits, pool_beside(model, splits.fit, 1000.0), size_share=0.25, method="tsbd")
    assert missed.asr_after is None
    assert _finding(missed).verdict == "FAIL"
    assert missed.sentence().endswith(f"; purification came to no result: {error}")


def test_the_same_seed_plants_the_same_backdoor(model: nn.Module, splits: Splits) -> None:
    first, second = (controlled(model, splits, None, epochs=2) for _ in range(2))
    assert first.to_results() == second.to_results()


@pytest.mark.parametrize(
    "changes", [{"size_share": 0.0}, {"size_share": 1.5}, {"rate": 0.0}, {"rate": 1.0}, {"epochs": 0}, {"lr": 0.0}]
)
def test_settings_have_ranges(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ControlConfig(**changes)


def test_an_unknown_purifier_is_named() -> None:
    with pytest.raises(ConfigError, match="prayer"):
        ControlConfig(method="prayer")
