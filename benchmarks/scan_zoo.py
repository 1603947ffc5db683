"""The models that the scan is calibrated and tested on, by family.

``python -m benchmarks.scan_zoo --data FOLDER`` trains what the user's cache lacks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.zoo import ZooModel, load_cifar10, victim
from benchmarks.zoo_cifar10 import cifar10_zoo
from benchmarks.zoo_digits import digits_zoo, load_digits_sets
from defense_core.data import CleanSet
from defense_core.progress import default_progress

FAMILIES: Mapping[str, Callable[[], list[ZooModel]]] = {
    "cifar10": cifar10_zoo,
    "digits": lambda: digits_zoo("small_cnn"),
    "digits_vit": lambda: digits_zoo("vit_tiny"),
}


def sets_of(family: str, data: Path) -> tuple[CleanSet, CleanSet]:
    """(train, test) that a family's models are trained on; ``data`` is the folder with CIFAR-10."""
    return load_cifar10(data) if family == "cifar10" else load_digits_sets()


def main() -> None:
    """Train what the cache lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="cifar10")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--part", default="0/1", help="this process takes every n-th model: 0/2 and 1/2 side by side")
    parser.add_argument("--only", default="", help="names that start with this")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    train, test = sets_of(arguments.family, arguments.data)
    for model in [model for model in FAMILIES[arguments.family]() if model.name.startswith(arguments.only)][
        part::parts
    ]:
        trained = victim(model.recipe, train, test, device="cpu", progress=default_progress())
        print(f"{model.name}: {trained.train_seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
