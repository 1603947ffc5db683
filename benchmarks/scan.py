"""The backdoor scan on a zoo of clean and backdoored models: ``scan.json`` and ``scan-summary.json``.

``python -m benchmarks.scan --family cifar10 --data FOLDER`` in stages, each resumable:

1. ``read``: run every detector on the references, the calibration models and the tests, and keep what they say.
2. ``pool``: write the calibration pool that the project ships, from the references and, for the probability, from the
   calibration models.
3. ``judge``: give the tests their verdicts, and the summary.

Figures are quoted on the *test* models alone; neither the pool nor the probability has seen one of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import read_rows, write_results
from benchmarks.scan_readings import clean_images, images_for, read, recall
from benchmarks.scan_summary import fitted_probability, summaries
from benchmarks.scan_zoo import FAMILIES, sets_of
from benchmarks.zoo import Victim, ZooModel, recipe_task, victim
from defense_core import config
from defense_core.evaluate import evaluate
from defense_core.progress import NullProgress
from defense_core.scan.detectors import FEW, MANY, Settings, regime_for
from defense_core.scan.judgement import ScanConfig, combined_score, judge
from defense_core.scan.observe import Observed
from defense_core.scan.pool import (
    SHIPPED,
    Pool,
    Probability,
    Reading,
    Reference,
    Stratum,
    load_pool,
    save_pool,
)
from defense_core.scan.references import file_readings, pool_of
from defense_core.scan.report import ScanReport
from defense_core.task import ImageClassification

TRIED_IMAGES = 1000
"""Test images that ACC and ASR of the zoo's models are measured on."""
BUDGET_S = 60.0
"""Of the scan that stops in time, by the seconds that its detectors took on one core."""
# With 1,000 images the detectors search with as many as with 100; the confirmation has 900 more.
COUNTS: Mapping[str, tuple[int, ...]] = {"pool": (FEW, MANY), "calibration": (FEW, MANY), "test": (0, FEW, MANY, 1000)}
"""Clean images by split of the zoo. Without images, the readings of ``FEW`` that need none are judged alone."""


def shipped_pool(family: str, models: list[ZooModel]) -> Path:
    """Where the pool of a family's models lies."""
    return SHIPPED / f"{models[0].recipe.architecture}-{family.removesuffix('_vit')}.json"


def within_budget(observed: Observed, seconds: Mapping[str, float], budget_s: float) -> Observed:
    """What a scan would have seen that stops after ``budget_s``, by the seconds that each detector took."""
    names = list(observed.observations)
    finished = sum(spent <= budget_s for spent in accumulate(seconds[name] for name in names))
    return replace(
        observed,
        observations={name: observed.observations[name] for name in names[:finished]},
        unfinished=tuple(names[finished:]),
    )


def make_pool(models: list[ZooModel], settings: Settings) -> Pool:
    """The pool of the references, with the probability fitted on the calibration models."""
    references = []
    for model in models:
        if model.split != "pool":
            continue
        readings: dict[str, dict[str, Reading]] = {}
        covariates: dict[str, float] = {}
        for count in COUNTS["pool"]:
            recalled = recall(model, count, settings)
            if recalled is None:
                continue
            observed, _, _ = recalled
            covariates.update(observed.covariates)
            file_readings(readings, observed, regime_for(count))
        if readings:
            recipe = config.to_mapping(model.recipe)
            references.append(Reference(model.name, recipe, covariates, readings))
    recipe = models[0].recipe
    task = recipe_task(recipe)
    stratum = Stratum(recipe.architecture, task.num_classes, task.input_size, task.class_names)
    return pool_of(references, stratum, settings)


def with_probability(pool: Pool, models: list[ZooModel], settings: Settings) -> Pool:
    """The pool with P(backdoor) by score, for each number of images, from the calibration models and the references.

    A reference's score is taken against the others, as if it were new.
    """
    fitted: dict[str, Probability] = {}
    backdoored = [model for model in models if model.split == "calibration"]
    for count in COUNTS["calibration"]:
        scores, truths = [], []
        for model in backdoored:
            recalled = recall(model, count, settings)
            if recalled is not None:
                scores.append(score_of(recalled[0], count, pool, model))
                truths.append(True)
        for number, reference in enumerate(pool.references):
            rest = replace(pool, references=pool.references[:number] + pool.references[number + 1 :])
            own = next(model for model in models if model.name == reference.name)
            recalled = recall(own, count, settings)
            if recalled is not None:
                scores.append(score_of(recalled[0], count, rest, own))
                truths.append(False)
        if any(truths):
            fitted[regime_for(count)] = fitted_probability(
                scores, truths, kinds=sorted({model.kind for model in backdoored})
            )
    return replace(pool, probability=fitted)


def score_of(observed: Observed, count: int, pool: Pool, model: ZooModel) -> float:
    """The combined score of a model that was read."""
    return combined_score(observed, regime_for(count), pool, recipe_task(model.recipe).class_names)


def accuracy_and_success(loaded: Victim, task: ImageClassification) -> tuple[float, float | None]:
    """(ACC, ASR) on test images: whether the planted backdoor took at all; ``None`` for a clean model."""
    images = loaded.test.subset(torch.arange(min(TRIED_IMAGES, len(loaded.test))))
    probes = () if loaded.probe is None else (loaded.probe,)
    measured = evaluate(loaded.model, images, task=task, probes=probes, device="cpu").to_results()
    return measured["acc"]["value"], measured["probes"][0]["asr"]["value"] if probes else None


def judged_rows(
    model: ZooModel, loaded: Victim, pool: Pool, settings: Settings, family: str
) -> Iterator[dict[str, Any]]:
    """Rows of one test model: every detector, every channel and the combined verdict, for each number of images."""
    task = recipe_task(model.recipe)
    acc, asr = accuracy_and_success(loaded, task)
    for count in COUNTS["test"]:
        recalled = recall(model, min(count, MANY), settings)
        if recalled is None or count > len(loaded.held_out):
            continue
        observed, seconds, peak = recalled
        searched, held_out = images_for(loaded, count)
        observed = replace(observed, searched=searched, held_out=held_out)
        started = time.monotonic()
        report = judged(loaded, count, observed, pool, settings, task)
        confirming = time.monotonic() - started
        common = {
            "model": f"{family}/{model.name}",
            "kind": model.kind,
            "seed": model.recipe.seed,
            "split": model.split,
            "acc": acc,
            "asr": asr,
            "clean_images": count,
            "target_true": None if loaded.probe is None else loaded.probe.target,
            "peak_mb": round(peak),
        }
        for entry in report.detectors:
            if not observed.observations[entry.name].measured:
                continue  # a detector of other networks
            yield common | {
                "detector": entry.name,
                "statistic": entry.statistic,
                "score": entry.score,
                "p_value": entry.p_value,
                "verdict": None,
                "target_named": entry.targets[0] if entry.targets else None,
                "seconds": round(seconds.get(entry.name, 0.0), 2),
            }
        patch = observed.observations.get("patch")
        if patch is not None:
            yield common | {
                "detector": "neural_cleanse_as_published",
                "statistic": patch.facts["anomaly_index"],
                "score": patch.facts["anomaly_index"],
                "p_value": None,
                "verdict": "FAIL" if patch.facts["anomaly_index"] > 2 else "PASS",
                "target_named": patch.classes[max(range(len(patch.classes)), key=lambda i: patch.class_scores[i])],
                "seconds": round(seconds.get("patch", 0.0), 2),
            }
        whole = sum(seconds[name] for name in observed.observations)
        yield common | _combined("combined", report) | {"seconds": round(whole + confirming, 2)}
        if count == MANY:
            if whole > BUDGET_S:
                report = judged(loaded, count, within_budget(observed, seconds, BUDGET_S), pool, settings, task)
            spent = min(whole, BUDGET_S) + confirming
            yield common | _combined(f"combined_{BUDGET_S:g}_s", report) | {"seconds": round(spent, 2)}


def judged(
    loaded: Victim, count: int, observed: Observed, pool: Pool, settings: Settings, task: ImageClassification
) -> ScanReport:
    """The verdict on what was observed of a model."""
    return judge(
        loaded.model, clean_images(loaded.held_out, count), observed, ScanConfig(settings=settings), pool=pool,
        task=task, device="cpu", progress=NullProgress(),
    )  # fmt: skip


def _combined(name: str, report: ScanReport) -> dict[str, Any]:
    return {
        "detector": name,
        "statistic": report.score,
        "score": report.score,
        "p_value": report.p_value,
        "probability": report.probability,
        "verdict": str(report.verdict),
        "reasons": report.reasons,
        "target_named": report.target_classes[0] if report.target_classes else None,
        "named_anyway": (report.channels and max(report.channels, key=lambda each: each.score).targets[:1]) or None,
    }


def main() -> None:
    """Run one stage or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="cifar10")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--stage", choices=("read", "pool", "judge", "all"), default="all")
    parser.add_argument("--splits", default="pool,calibration,test", help="of the zoo, for read")
    parser.add_argument("--images", default="", help="numbers of clean images, for read; empty: all")
    parser.add_argument("--part", default="0/1", help="this process reads every n-th model: 0/2 and 1/2 side by side")
    arguments = parser.parse_args()
    started, settings = datetime.now(UTC), Settings()
    models = FAMILIES[arguments.family]()
    sets = sets_of(arguments.family, arguments.data)
    path = shipped_pool(arguments.family, models)

    def load(model: ZooModel) -> Victim:
        return victim(model.recipe, *sets, device="cpu", progress=NullProgress())

    if arguments.stage in ("read", "all"):
        part, parts = map(int, arguments.part.split("/"))
        counts = [int(count) for count in arguments.images.split(",") if count]
        chosen = [model for model in models if model.split in arguments.splits.split(",")]
        for model in chosen[part::parts]:
            loaded = load(model)
            for count in COUNTS[model.split]:
                if 0 < count <= MANY and (not counts or count in counts):
                    begun = time.monotonic()
                    read(model, loaded, count, settings)
                    print(f"{model.name} with {count} images: {time.monotonic() - begun:.0f} s", flush=True)
    if arguments.stage in ("pool", "all"):
        pool = make_pool(models, settings)
        save_pool(with_probability(pool, models, settings), path)
        print(f"{path}: {len(pool.references)} references")
    if arguments.stage in ("judge", "all"):
        pool = load_pool(path)
        rows = [
            row
            for model in models
            if model.split == "test"
            for row in judged_rows(model, load(model), pool, settings, arguments.family)
        ]
        others = [row for row in read_rows("scan") if not row["model"].startswith(f"{arguments.family}/")]
        command = "python -m benchmarks.scan --family FAMILY --data FOLDER"
        rows = [*others, *config.to_mapping(rows)]
        write_results("scan", rows, command=command, started=started)
        write_results("scan-summary", summaries(rows), command=command, started=started)


if __name__ == "__main__":
    main()
