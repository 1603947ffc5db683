"""Backdoored and clean CIFAR-10 models, trained once and kept outside the repository."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from defense_core import architectures, config
from defense_core.attacks import Probe, poison, probe_from_spec
from defense_core.data import CleanSet, load_clean_set
from defense_core.loop import Tuning, tune, working_copy
from defense_core.progress import Progress
from defense_core.task import ImageClassification

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained.

    Attributes:
        attack: probe specification, or ``None`` for a clean model.
        seed: draws the training subset, the poisoned samples, the initial weights and the order.
        images: training images.
        rate: poisoning rate.
        architecture, architecture_args: the network.
        tuning: the training schedule.
    """

    attack: Mapping[str, Any] | None
    seed: int = 0
    images: int = 20_000
    rate: float = 0.1
    architecture: str = "preact_resnet18"
    architecture_args: Mapping[str, Any] = field(default_factory=lambda: {"width": 16, "num_classes": 10})
    tuning: Tuning = field(
        default_factory=lambda: Tuning(epochs=15, batch_size=128, lr=0.1, weight_decay=5e-4, schedule="onecycle")
    )


@dataclass(frozen=True, eq=False)
class Victim:
    """A trained model with what is needed to attack and to defend it.

    Attributes:
        model: eval mode, CPU.
        probe: the planted trigger, ``None`` for a clean model.
        held_out: clean training images that the model has not seen; defences draw from it.
        test: the test set.
    """

    model: nn.Module
    task: ImageClassification
    probe: Probe | None
    held_out: CleanSet
    test: CleanSet
    train_seconds: float


def cifar10_task() -> ImageClassification:
    """CIFAR-10 as 32x32 RGB with flips and shifts."""
    return ImageClassification((3, 32, 32), 10, CIFAR10_MEAN, CIFAR10_STD, CIFAR10_NAMES, augment="crop_flip")


def load_cifar10(folder: Path) -> tuple[CleanSet, CleanSet]:
    """(train, test) from ``cifar10-train.parquet`` and ``cifar10-test.parquet`` in ``folder``."""
    train, test = (
        load_clean_set(folder / f"cifar10-{part}.parquet", input_size=(3, 32, 32), num_classes=10)
        for part in ("train", "test")
    )
    return train, test


def cache_folder() -> Path:
    """Where trained victims are kept: ``QUARANTINE_CACHE``, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "model-quarantine"
    return Path(os.environ.get("QUARANTINE_CACHE", default))


def victim(recipe: Recipe, train: CleanSet, test: CleanSet, *, device: str, progress: Progress) -> Victim:
    """Train the model of ``recipe``, or read it from the cache."""
    task = cifar10_task()
    probe = probe_from_spec(recipe.attack, num_classes=10) if recipe.attack is not None else None
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))
    seen, held_out = train.subset(order[: recipe.images]), train.subset(order[recipe.images :])
    model = architectures.build(recipe.architecture, recipe.architecture_args)
    key = config.digest({"recipe": recipe, "data": train.digest}).removeprefix("sha256:")[:24]
    stored = cache_folder() / f"{key}.safetensors"
    facts = stored.with_suffix(".json")
    if not facts.exists():
        started = time.monotonic()
        data = poison(seen, probe, rate=recipe.rate, seed=recipe.seed).data if probe is not None else seen
        trained = working_copy(architectures.initialise(model, recipe.seed), device)
        tune(
            trained,
            data,
            task=task,
            tuning=recipe.tuning,
            seed=recipe.seed,
            device=device,
            progress=progress,
            name=f"train {key[:8]}",
        )
        stored.parent.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu().contiguous() for name, tensor in trained.state_dict().items()}
        safetensors.torch.save_file(state, stored)
        facts.write_text(json.dumps({"recipe": config.to_mapping(recipe), "seconds": time.monotonic() - started}))
    model.load_state_dict(safetensors.torch.load_file(stored))
    seconds = float(json.loads(facts.read_text())["seconds"])
    return Victim(model.eval(), task, probe, held_out, test, seconds)
