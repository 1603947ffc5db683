"""NGF's fast part, ``masked``, on the victims of the purification benchmark: ``ngf-parts.json``.

``python -m benchmarks.ngf_parts --data FOLDER [--attack A,B]``. The protocol of ``purification-cpu.json`` with other
settings than the method's defaults; resumable. The signals of the choice are kept, so that the table says too what a
run would hand over with this part in place of the default's.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.markdown import Rows
from benchmarks.presets import PRESETS, Setting, described, recipe_of
from benchmarks.purification import Case, clean_splits, completed, figures
from benchmarks.purification_tables import Table
from benchmarks.results import read_rows, write_results
from benchmarks.zoo import load_cifar10, victim
from defense_core import config
from defense_core.data import CleanSet
from defense_core.progress import NullProgress
from defense_core.purify import METHODS

NAME = "ngf-parts"
SETTINGS: Mapping[str, Any] = {"part": "masked"}
KEY = ("attack", "seed", "clean_fraction", "architecture")
SHARE = 0.05
"""Clean images of the runs that are compared, as a share of the training set."""


def jobs() -> Iterator[tuple[Setting, dict[str, Any]]]:
    """Every setting of the *cpu* preset on the convolutional network, with the key of its row."""
    for setting in PRESETS["cpu"]:
        for attack in setting.attacks:
            for seed in setting.seeds:
                if setting.architecture == "preact_resnet18":
                    fraction, architecture = setting.clean_fraction, described(setting)
                    yield setting, dict(zip(KEY, (attack, seed, fraction, architecture), strict=True))


def measure(job: Mapping[str, Any], setting: Setting, train: CleanSet, test: CleanSet) -> dict[str, Any]:
    """One row."""
    progress = NullProgress()
    subject = victim(recipe_of(job["attack"], setting), train, test, device="cpu", progress=progress)
    case = Case.of(subject, clean_splits(subject, setting, job["seed"]), test, device="cpu", progress=progress)
    digest = config.digest(config.from_mapping(METHODS["ngf"].config, SETTINGS))
    found = figures(case, test, "ngf", seed=job["seed"], settings=SETTINGS)
    return {**job, "method": "ngf", "part": SETTINGS["part"], "config_digest": digest, **found}


def comparison(masked: Rows, others: Rows) -> Table:
    """Means over the runs that both have: the default part and ``masked``, and what the choice would hand over."""
    keys = {tuple(row[part] for part in KEY) for row in masked if row["clean_fraction"] == SHARE}
    default = [row for row in others if tuple(row[part] for part in KEY) in keys]
    swapped = [row for row in default if row["method"] != "ngf"]
    fast = [row for row in masked if tuple(row[part] for part in KEY) in keys]
    compared: list[tuple[str, Sequence[Mapping[str, Any]]]] = [
        ("`masked_block`, the default", [row for row in default if row["method"] == "ngf"]),
        ("`masked`", fast),
        ("selected, with the default", [row for row in completed(default) if row["selected"]]),
        ("selected, with `masked`", [row for row in completed([*swapped, *fast]) if row["selected"]]),
    ]
    return ("what", "runs", "ACC drop", "ASR", "worst ASR", "DER", "seconds"), [
        [
            what,
            str(len(rows)),
            f"{fmean(row['acc_before'] - row['acc_after'] for row in rows):.3f}",
            f"{fmean(row['asr_after'] for row in rows):.3f}",
            "{asr_after:.3f} ({attack})".format(**max(rows, key=lambda row: row["asr_after"])),
            f"{fmean(row['der'] for row in rows):.3f}",
            f"{fmean(row['seconds'] for row in rows):.1f}",
        ]
        for what, rows in compared
        if rows
    ]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--attack", default="", help="measure these only, separated by commas")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = datetime.now(UTC)
    train, test = load_cifar10(options.data)
    wanted = options.attack.split(",") if options.attack else None
    for setting, job in jobs():
        rows = read_rows(NAME)
        if (wanted and job["attack"] not in wanted) or any(all(row[k] == job[k] for k in KEY) for row in rows):
            continue
        rows = [*rows, measure(job, setting, train, test)]
        write_results(NAME, rows, command="python -m benchmarks.ngf_parts --data DATA", started=started)


if __name__ == "__main__":
    main()
