"""NGF's fast part, ``masked``, on the victims of the purification benchmark: ``ngf-parts.json``.

``python -m benchmarks.ngf_parts --data FOLDER [--attack A,B]``. The protocol of ``purification-cpu.json`` with other
settings than the method's defaults; resumable. The signals of the choice are kept, so that the table says too what a
run would hand over with this part in place of the default's.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.markdown import Rows
from benchmarks.presets import PRESETS, Setting, recipe_of
from benchmarks.purification import APART, Case, clean_splits, completed, figures, group_of, jobs, key_of
from benchmarks.purification_tables import MEANS, Table, means, selected
from benchmarks.results import read_rows, write_results
from benchmarks.zoo import load_cifar10, victim
from defense_core import config
from defense_core.data import CleanSet
from defense_core.progress import NullProgress
from defense_core.purify import METHODS

NAME = "ngf-parts"
SETTINGS: Mapping[str, Any] = {"part": "masked"}
SHARE = 0.05
"""Clean images of the runs that are compared, as a share of the training set."""


def masked_jobs() -> Iterator[tuple[Setting, dict[str, Any]]]:
    """NGF's rows of the *cpu* preset on the convolutional network, with these settings."""
    digest = config.digest(config.from_mapping(METHODS["ngf"].config, SETTINGS))
    for setting, job in jobs(PRESETS["cpu"]):
        if job["method"] == "ngf" and setting.architecture == "preact_resnet18":
            yield setting, {**job, **SETTINGS, "config_digest": digest}


def measure(job: Mapping[str, Any], setting: Setting, train: CleanSet, test: CleanSet) -> dict[str, Any]:
    """One row."""
    progress = NullProgress()
    subject = victim(recipe_of(job["attack"], setting), train, test, device="cpu", progress=progress)
    case = Case.of(subject, clean_splits(subject, setting, job["seed"]), test, device="cpu", progress=progress)
    return {**job, **figures(case, test, job["method"], seed=job["seed"], settings=SETTINGS)}


def comparison(masked: Rows, others: Rows) -> Table:
    """Means over the runs that both have: the default part and ``masked``, and what the choice would hand over among
    those that stand side by side: their mean was not made with ``masked``."""
    fast = [row for row in masked if row["clean_fraction"] == SHARE]
    groups = {group_of(row) for row in fast}
    usual = [row for row in others if group_of(row) in groups]
    swapped = [*(row for row in usual if row["method"] != "ngf"), *fast]
    compared: dict[str, Rows] = {
        "`masked_block`, the default": [row for row in usual if row["method"] == "ngf"],
        "`masked`": fast,
        "selected, with the default": selected(completed(usual, APART), APART),
        "selected, with `masked`": selected(completed(swapped, APART), APART),
    }
    return ("what", *MEANS), [[what, *means(rows)] for what, rows in compared.items() if rows]


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
    everything = [(key_of(job), setting, job) for setting, job in masked_jobs()]
    for key, setting, job in everything:
        if wanted and job["attack"] not in wanted:
            continue
        # Rows of other settings than today's are left out.
        known = {key_of(row): row for row in read_rows(NAME)}
        if key in known:
            continue
        known[key] = measure(job, setting, train, test)
        rows = [known[each] for each, _, _ in everything if each in known]
        write_results(NAME, rows, command="python -m benchmarks.ngf_parts --data DATA", started=started)


if __name__ == "__main__":
    main()
