"""A calibration pool for the small model, of its own readings: what a run does with a verdict, not how it is found."""

from __future__ import annotations

from pathlib import Path

import torch

from defense_core.config import digest, from_mapping
from defense_core.data import CleanSet
from defense_core.progress import NullProgress
from defense_core.scan.detectors import DETECTORS, Settings
from defense_core.scan.observe import observe
from defense_core.scan.pool import Pool, Reading, Reference, Stratum, reading_of, save_pool
from defense_core.task import ImageClassification
from tests.small_model import PLAN_OPTIONS, images

REFERENCES = 12
RATE = 0.5
"""A false positive rate that so few references can tell."""


def beside(reading: Reading, number: int, *, shift: float) -> Reading:
    """What the detector read on reference ``number``: ``shift`` above ``reading`` and more, and of every class alike as
    much above or below it as covers a model that was read a little otherwise. That says nothing about any class."""
    level = number - REFERENCES / 2
    return Reading(
        reading.statistic + shift * (1 + number / 10),
        tuple(score + level for score in reading.class_scores),
        reading.classes,
    )


def make_pool(path: Path, *, shift: float) -> Pool:
    """A pool whose references all score ``shift`` more than the small model: above 0 it is the least suspicious of
    them, below 0 it stands out."""
    pixels, labels = images(80, seed=1)
    clean = CleanSet(torch.from_numpy(pixels), torch.from_numpy(labels), PLAN_OPTIONS.classes)
    task = ImageClassification((1, 8, 8), PLAN_OPTIONS.classes, mean=(0.5,), std=(0.5,))
    settings = from_mapping(Settings, PLAN_OPTIONS.scan["settings"])
    seen = observe(PLAN_OPTIONS.network(), clean, "few", settings, task=task, device="cpu", progress=NullProgress())
    own = {name: reading_of(each) for name, each in seen.observations.items() if each.measured}

    def shifted(number: int, regime: str) -> dict[str, Reading]:
        return {
            name: beside(each, number, shift=shift) for name, each in own.items() if regime in DETECTORS[name].regimes
        }

    references = tuple(
        Reference(
            f"reference-{number:02}",
            {},
            {name: value + number - REFERENCES / 2 for name, value in seen.covariates.items()},
            {regime: shifted(number, regime) for regime in ("none", "few")},
        )
        for number in range(REFERENCES)
    )
    stratum = Stratum("small_cnn", PLAN_OPTIONS.classes, (1, 8, 8))
    pool = Pool(stratum, digest(settings), references, {})
    save_pool(pool, path)
    return pool
