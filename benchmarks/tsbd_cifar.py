"""TSBD on CIFAR-10 beside plain fine-tuning: ``tsbd-cifar.json``; its ablations: ``tsbd-ablation.json``.

``python -m benchmarks.tsbd_cifar --data FOLDER [--ablation]``. The victims are trained once and
kept in the user's cache, and rows that the results file already holds for the same configuration are not
measured again; each purification draws its own 1,000 clean images (5 % of the training
set's size), which no victim has seen. Figures are quoted on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.presets import DEVELOPMENT, NARROW, Setting, recipe_of
from benchmarks.purification import Case, clean_splits, figures
from benchmarks.results import read_rows, write_results
from benchmarks.zoo import load_cifar10, victim
from defense_core import config
from defense_core.progress import default_progress
from defense_core.purify import METHODS

SETTING = Setting(0.05, DEVELOPMENT, architecture_args=NARROW)
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
            recipe = recipe_of(job["attack"], SETTING, seed=job["victim_seed"])
            subject = victim(recipe, train, test, device=options.device, progress=default_progress())
            settings = ABLATIONS[job["ablation"]] if options.ablation else {}
            clean = clean_splits(subject, SETTING, job["seed"])
            case = Case.of(subject, clean, test, device=options.device, progress=default_progress())
            measured = figures(case, test, job["method"], seed=job["seed"], settings=settings)
            measured.pop("select", None)
            known[key_of(job)] = {**job, **measured}
            logging.info("%s", known[key_of(job)])
            done = [known[key_of(each)] for each in jobs if key_of(each) in known]
            write_results(name, done, command=command, started=started)


def comparison_jobs() -> Iterator[dict[str, Any]]:
    """Both methods on every victim and draw of clean images."""
    for attack, trained, seed, method in product(DEVELOPMENT, VICTIM_SEEDS, range(3), ("tsbd", "fine_tuning")):
        yield _job({}, attack=attack, victim_seed=trained, method=method, seed=seed)


def ablation_jobs() -> Iterator[dict[str, Any]]:
    """TSBD's parts, on the first victim of each attack."""
    for attack, (label, settings) in product(DEVELOPMENT, ABLATIONS.items()):
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
