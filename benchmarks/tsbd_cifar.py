"""TSBD on CIFAR-10 beside plain fine-tuning: ``tsbd-cifar.json``; its ablations: ``tsbd-ablation.json``.

``python -m benchmarks.tsbd_cifar --data FOLDER [--ablation]``. The victims are trained once and
kept in the user's cache, and rows that the results file already holds for the same configuration are not
measured again; each purification draws its own 1,000 clean images (5 % of the training
set's size), which no victim has seen. Figures are quoted on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import read_rows, write_results
from benchmarks.zoo import Recipe, Victim, load_cifar10, victim
from defense_core import config
from defense_core.data import CleanSet, Splits, split_clean_set
from defense_core.evaluate import evaluate
from defense_core.progress import default_progress
from defense_core.purify import METHODS

ATTACKS: dict[str, dict[str, Any]] = {
    "badnets": {"name": "badnets", "kind": "badnets", "target": 0, "size": 3},
    "blended": {"name": "blended", "kind": "blended", "target": 0, "alpha": 0.2},
}
CLEAN_IMAGES = 1000
VICTIM_SEEDS = (0, 1)
"""Defaults were developed on the victims of seed 0; ``docs/benchmarks.md`` says what changed after seed 1 was seen."""
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "stage 1 only": {"epochs": 0},
    "stage 2 only (n = 0)": {"n": 0.0},
    "V1, whole units": {"variant": "v1"},
    "V2, m within each unit": {"variant": "v2"},
    "alpha = 0 (no gradient-norm term)": {"alpha": 0.0},
    "alpha = 1 (SAM)": {"alpha": 1.0},
    "per-tensor norm, r = 0.05": {"normalisation": "per_tensor", "r": 0.05},
    "global norm, r = 0.05": {"r": 0.05},
    "global norm, r = 0.37": {"r": 0.37},
    "unlearning to chance": {"unlearn_depth": 1.0},
    "unlearning at 1e-4": {"unlearn_lr": 1e-4},
}


def clean_splits(subject: Victim, seed: int) -> Splits:
    """1,000 clean images drawn by ``seed``, four fifths to fit, one fifth to select."""
    order = torch.randperm(len(subject.held_out), generator=torch.Generator().manual_seed(1000 + seed))
    return split_clean_set(subject.held_out.subset(order[:CLEAN_IMAGES]), seed=seed, select=0.2, report=0.0)


def purified_row(
    subject: Victim, test: CleanSet, method: str, settings: Mapping[str, Any], *, seed: int, device: str
) -> dict[str, Any]:
    """Purify once; ACC, ASR, RA before and after, DER and seconds as fields of a row."""
    row = METHODS[method]
    assert subject.probe is not None
    started = time.perf_counter()
    result = row.function(
        subject.model,
        clean_splits(subject, seed),
        config.from_mapping(row.config, settings),
        task=subject.task,
        seed=seed,
        device=device,
        progress=default_progress(),
    )
    seconds = time.perf_counter() - started
    measured = evaluate(
        result.model, test, task=subject.task, probes=(subject.probe,), reference=subject.model, device=device
    ).to_results()
    probe = measured["probes"][0]
    return {
        "acc_before": measured["acc_before"]["value"],
        "acc_after": measured["acc"]["value"],
        "asr_before": probe["asr_before"]["value"],
        "asr_after": probe["asr"]["value"],
        "ra_after": probe["ra"]["value"],
        "der": probe["der"],
        "seconds": round(seconds, 1),
        "chosen": {key: result.facts[key] for key in ("n", "lr") if key in result.facts},
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--ablation", action="store_true", help="measure TSBD's parts instead, one seed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = datetime.now(UTC)
    name = "tsbd-ablation" if options.ablation else "tsbd-cifar"
    command = "python -m benchmarks.tsbd_cifar --data DATA" + (" --ablation" if options.ablation else "")
    known = {key_of(row): row for row in read_rows(name)}
    train, test = load_cifar10(options.data)
    jobs = list(ablation_jobs() if options.ablation else comparison_jobs())
    for job in jobs:
        if key_of(job) not in known:
            recipe = Recipe(attack=ATTACKS[job["attack"]], seed=job["victim_seed"])
            subject = victim(recipe, train, test, device=options.device, progress=default_progress())
            settings = ABLATIONS[job["ablation"]] if options.ablation else {}
            figures = purified_row(subject, test, job["method"], settings, seed=job["seed"], device=options.device)
            known[key_of(job)] = {**job, **figures}
            logging.info("%s", known[key_of(job)])
            done = [known[key_of(each)] for each in jobs if key_of(each) in known]
            write_results(name, done, command=command, started=started)


def comparison_jobs() -> Iterator[dict[str, Any]]:
    """Both methods on every victim and draw of clean images."""
    for attack, trained, seed, method in product(ATTACKS, VICTIM_SEEDS, range(3), ("tsbd", "fine_tuning")):
        yield _job({}, attack=attack, victim_seed=trained, method=method, seed=seed)


def ablation_jobs() -> Iterator[dict[str, Any]]:
    """TSBD's parts, on the first victim of each attack."""
    for attack, (label, settings) in product(ATTACKS, ABLATIONS.items()):
        yield _job(settings, ablation=label, attack=attack, victim_seed=0, method="tsbd", seed=0)


def key_of(row: Mapping[str, Any]) -> str:
    """What identifies a row: what was run on what."""
    fields = ("ablation", "attack", "victim_seed", "method", "seed", "config_digest")
    return config.digest([row.get(field) for field in fields])


def _job(settings: Mapping[str, Any], *, method: str, **fields: Any) -> dict[str, Any]:
    digest = config.digest(config.from_mapping(METHODS[method].config, settings))
    return {**fields, "method": method, "config_digest": digest}


if __name__ == "__main__":
    main()
