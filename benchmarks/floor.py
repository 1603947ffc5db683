"""What each trigger does to a model that nobody poisoned: ``floor.json``, which no purifier can be asked to beat.

``python -m benchmarks.floor --data FOLDER``. The clean model has the victims' recipe without the poison. It takes some
triggered images for the target class because it errs, and more where the trigger itself looks like that class or was
learnt against a network like it. The test images and the count are those of ``purification-cpu.json``.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.presets import PRESETS, recipe_of
from benchmarks.purification import measured
from benchmarks.results import FOLDER, write_results
from benchmarks.zoo import load_cifar10, victim
from defense_core.data import CleanSet
from defense_core.progress import default_progress


def floors(train: CleanSet, test: CleanSet, *, device: str) -> Iterator[dict[str, Any]]:
    """One row an attack: ``acc``, ``asr`` and ``ra`` of the clean model under the victim's trigger."""
    progress = default_progress()
    setting = PRESETS["cpu"][0]
    clean = victim(recipe_of(None, setting), train, test, device=device, progress=progress)
    for attack in setting.attacks:
        subject = victim(recipe_of(attack, setting), train, test, device=device, progress=progress)
        row = {"attack": attack, **measured(clean.model, subject, test, device=device)}
        logging.info("%s", row)
        yield row


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the results file")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = datetime.now(UTC)
    rows = list(floors(*load_cifar10(options.data), device=options.device))
    write_results("floor", rows, command="make bench-floor DATA=DATA", started=started, folder=options.out)


if __name__ == "__main__":
    main()
