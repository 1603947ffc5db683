"""What the scan costs with 100 classes instead of 10, on the same images and the same network: ``scan-growth.json``.

``python -m benchmarks.scan_growth --data FOLDER``. CIFAR-10's classes are cut into ten each by brightness, so that 100
classes can be learnt from the same 10,000 images. Wanted: at most three times the time of 10 classes.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_mb, reset_peak
from benchmarks.results import write_results
from benchmarks.zoo import CIFAR10_MEAN, CIFAR10_STD, load_cifar10
from defense_core import architectures
from defense_core.attacks.victim import VictimTraining, train_victim
from defense_core.data import CleanSet
from defense_core.inference import accuracy
from defense_core.progress import NullProgress, default_progress
from defense_core.scan.detectors import MANY, Settings
from defense_core.scan.observe import observe
from defense_core.task import ImageClassification

IMAGES = 10_000
PARTS = (1, 10)
"""Into how many each class is cut."""
TRAINING = VictimTraining(epochs=6, batch_size=128, lr=0.1)


def cut_by_brightness(data: CleanSet, parts: int) -> CleanSet:
    """The same images, each class cut into ``parts`` of equal size from dark to bright."""
    brightness = data.images.float().mean((1, 2, 3))
    labels = torch.zeros_like(data.labels)
    for label in range(data.num_classes):
        members = (data.labels == label).nonzero().flatten()
        rank = brightness[members].argsort().argsort()
        labels[members] = label * parts + rank * parts // len(members)
    return CleanSet(data.images, labels, data.num_classes * parts)


def measured(data: CleanSet) -> tuple[dict[str, float], dict[str, Any]]:
    """Seconds of each detector, and facts of the model they ran on."""
    train, held_out = data.subset(torch.arange(IMAGES)), data.subset(torch.arange(IMAGES, IMAGES + 1000))
    names = tuple(map(str, range(data.num_classes)))
    task = ImageClassification((3, 32, 32), data.num_classes, CIFAR10_MEAN, CIFAR10_STD, names, augment="crop_flip")
    network = architectures.build("preact_resnet18", {"width": 16, "num_classes": data.num_classes})
    model = train_victim(
        network, train, training=TRAINING, task=task, seed=0, device="cpu", progress=default_progress(), name="train"
    )
    clean = held_out.subset(torch.arange(MANY))
    seconds: dict[str, float] = {}
    reset_peak("cpu")
    started = time.monotonic()
    observe(model, clean, "many", Settings(), task=task, device="cpu", progress=NullProgress(), seconds=seconds)
    seconds["all"] = time.monotonic() - started
    return seconds, {
        "acc": round(accuracy(model, held_out, task=task, device="cpu"), 3),
        "peak_mb": round(peak_mb("cpu")),
    }


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10-{train,test}.parquet")
    folder, started = parser.parse_args().data, datetime.now(UTC)
    train, _ = load_cifar10(folder)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    data = train.subset(order[: IMAGES + 1000])
    (few, few_facts), (many, many_facts) = (measured(cut_by_brightness(data, parts)) for parts in PARTS)
    rows = [
        {
            "detector": name,
            "seconds_10_classes": round(few[name], 2),
            "seconds_100_classes": round(many[name], 2),
            "ratio": round(many[name] / few[name], 2),
        }
        for name in few
    ]
    rows[-1] |= {f"{fact}_10_classes": value for fact, value in few_facts.items()}
    rows[-1] |= {f"{fact}_100_classes": value for fact, value in many_facts.items()}
    write_results("scan-growth", rows, command="python -m benchmarks.scan_growth --data DATA", started=started)


if __name__ == "__main__":
    main()
