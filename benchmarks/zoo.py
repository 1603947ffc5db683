"""Backdoored and clean CIFAR-10 models, trained once and kept outside the repository."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from defense_core import architectures, config
from defense_core.attacks import Probe, probe_from_spec
from defense_core.attacks.catalogue import Attack, attack_from_spec
from defense_core.attacks.plant import TRIGGER_FILE, plant
from defense_core.attacks.victim import VictimTraining, train_victim
from defense_core.data import CleanSet, load_clean_set
from defense_core.files import atomic_directory
from defense_core.progress import Progress
from defense_core.task import Augment, ImageClassification

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


CONVOLUTIONAL = VictimTraining(epochs=15, batch_size=128, lr=0.1, weight_decay=5e-4)
STUBBORN = {"input_aware": 30, "badnets_all_to_all": 45}
"""Epochs of the attacks that the 15 of the others teach too little: ASR 0.84 and 0.43."""


def training_for(attack: str | None) -> VictimTraining:
    """How the convolutional victim of this attack, or the clean model, is trained."""
    return replace(CONVOLUTIONAL, epochs=STUBBORN.get(attack or "", CONVOLUTIONAL.epochs))


@dataclass(frozen=True)
class Recipe:
    """How a victim is trained.

    Attributes:
        attack: attack specification, or ``None`` for a clean model.
        seed: draws the training subset, the poisoned samples, the initial weights and the order.
        images: training images.
        rate: poisoning rate, a share of the whole training set.
        architecture, architecture_args: the network.
        training: the training schedule.
    """

    attack: Mapping[str, Any] | None
    seed: int = 0
    images: int = 20_000
    rate: float = 0.1
    architecture: str = "preact_resnet18"
    architecture_args: Mapping[str, Any] = field(default_factory=lambda: {"width": 16, "num_classes": 10})
    training: VictimTraining = CONVOLUTIONAL


@dataclass(frozen=True)
class VariedRecipe(Recipe):
    """A recipe whose augmentation and data vary too.

    Attributes:
        augment: as in :class:`defense_core.task.ImageClassification`.
        data: ``cifar10``, or ``digits``: scikit-learn's.
    """

    augment: Augment = "crop_flip"
    data: str = "cifar10"


@dataclass(frozen=True)
class ZooModel:
    """One model that the scan is calibrated or tested on.

    Attributes:
        name: unique.
        kind: ``clean`` or the attack's name.
        split: ``pool``: its statistics are the null distribution; ``calibration``: the probability is fitted on it;
            ``test``: figures are quoted on it.
        recipe: how it is trained.
    """

    name: str
    kind: str
    split: str
    recipe: Recipe


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


def digits_task() -> ImageClassification:
    """scikit-learn's digits as 8x8 grey images; the demo's task."""
    names = tuple("0123456789")
    return ImageClassification((1, 8, 8), 10, mean=(0.3,), std=(0.35,), class_names=names)


def recipe_task(recipe: Recipe) -> ImageClassification:
    """The task of the recipe's data, with its own augmentation where it names one."""
    if not isinstance(recipe, VariedRecipe):
        return cifar10_task()
    return replace(digits_task() if recipe.data == "digits" else cifar10_task(), augment=recipe.augment)


def load_cifar10(folder: Path) -> tuple[CleanSet, CleanSet]:
    """(train, test) from ``cifar10-train.parquet`` and ``cifar10-test.parquet`` in ``folder``."""
    train, test = (
        load_clean_set(folder / f"cifar10-{part}.parquet", input_size=(3, 32, 32), num_classes=10)
        for part in ("train", "test")
    )
    return train, test


def load_digits_set() -> CleanSet:
    """All 1,797 of scikit-learn's digits as uint8 (N, 1, 8, 8)."""
    # The GPU preset runs without scikit-learn.
    from sklearn.datasets import load_digits

    content = load_digits()
    pixels = torch.from_numpy((content.images / 16 * 255).round().astype("uint8")).unsqueeze(1)
    return CleanSet(pixels, torch.from_numpy(content.target).long(), 10)


def cache_folder() -> Path:
    """Where trained victims are kept: ``QUARANTINE_CACHE``, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "model-quarantine"
    return Path(os.environ.get("QUARANTINE_CACHE", default))


def victim(recipe: Recipe, train: CleanSet, test: CleanSet, *, device: str, progress: Progress) -> Victim:
    """Train the model of ``recipe``, or read it from the cache.

    An attack that wants a clean model of the same kind gets the clean victim of the same seed.
    """
    task = recipe_task(recipe)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))
    seen, held_out = train.subset(order[: recipe.images]), train.subset(order[recipe.images :])
    model = architectures.build(recipe.architecture, recipe.architecture_args)
    key = config.digest({"recipe": recipe, "data": train.digest}).removeprefix("sha256:")[:24]
    stored = cache_folder() / key
    if not stored.exists():
        clean = replace(recipe, attack=None, rate=0.0)
        attack = attack_from_spec(recipe.attack, num_classes=10) if recipe.attack is not None else None
        surrogate = None
        if attack is not None and attack.row.surrogate:
            surrogate = victim(clean, train, test, device=device, progress=progress).model
        with atomic_directory(stored) as folder:
            _train(recipe, attack, model, seen, surrogate, folder, device=device, progress=progress)
    facts = json.loads((stored / "facts.json").read_text("utf-8"))
    model.load_state_dict(safetensors.torch.load_file(stored / "model.safetensors"))
    probe = None
    if facts["probe"] is not None:
        spec = dict(facts["probe"])
        if "path" in spec:
            spec["path"] = str(stored / TRIGGER_FILE)
        probe = probe_from_spec(spec, num_classes=10)
    return Victim(model.eval(), task, probe, held_out, test, float(facts["seconds"]))


def _train(
    recipe: Recipe,
    attack: Attack | None,
    network: nn.Module,
    seen: CleanSet,
    surrogate: nn.Module | None,
    folder: Path,
    *,
    device: str,
    progress: Progress,
) -> None:
    started, task = time.monotonic(), recipe_task(recipe)
    spec = None
    if attack is None:
        trained = train_victim(
            network, seen, training=recipe.training, task=task, seed=recipe.seed, device=device, progress=progress,
            name="train a clean model",
        )  # fmt: skip
    else:
        planted = plant(
            attack, network, seen, rate=recipe.rate, training=recipe.training, task=task, seed=recipe.seed,
            device=device, progress=progress, folder=folder, surrogate=surrogate,
        )  # fmt: skip
        trained, spec = planted.model, planted.probe.to_spec()
    safetensors.torch.save_file(trained.state_dict(), folder / "model.safetensors")
    facts = {"recipe": recipe, "probe": spec, "seconds": round(time.monotonic() - started, 1)}
    (folder / "facts.json").write_text(json.dumps(config.to_mapping(facts), indent=1) + "\n", "utf-8")
