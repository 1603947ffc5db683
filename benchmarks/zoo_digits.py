"""The models on scikit-learn's digits that the scan is calibrated and tested on, of two architectures.

Drawn like those on CIFAR-10 (:mod:`benchmarks.zoo_cifar10`); they are trained in seconds, so there are more of them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from benchmarks.zoo import VariedRecipe, ZooModel, load_digits_set
from defense_core.attacks.victim import VictimTraining
from defense_core.data import CleanSet
from defense_core.task import Augment

TRAINING = VictimTraining(epochs=30, batch_size=64)
IMAGES = 900
REFERENCES: Mapping[str, int] = {"small_cnn": 240, "vit_tiny": 60}
"""Four times as many of the network that is trained and read in seconds, the second half with other schedules."""
AUGMENTS: tuple[Augment, ...] = ("none", "crop")
ONE_CYCLE = 120
"""So many digits references, the first ones, are trained with one cycle of the rate, as the backdoored models are."""
CLEAN_TESTS: Mapping[str, tuple[range, ...]] = {
    "small_cnn": (range(2500, 2700),),
    "vit_tiny": (range(2100, 2124), range(2300, 2348)),
}
"""Seeds. With 24 clean models a false positive rate of 0.05 cannot be told from one of 0.15; with 200 it can."""
NETWORKS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "small_cnn": tuple({"width": width, "in_channels": 1, "num_classes": 10} for width in (16, 24, 32, 48)),
    "vit_tiny": tuple(
        {"image_size": 8, "patch_size": 2, "dim": dim, "depth": 3, "heads": 4, "in_channels": 1, "num_classes": 10}
        for dim in (32, 48, 64)
    ),
}


def digits_zoo(architecture: str) -> list[ZooModel]:
    """Every model on scikit-learn's digits with this architecture."""
    return [
        *(
            ZooModel(f"reference-{number:02}", "clean", "pool", digits_reference(architecture, number))
            for number in range(REFERENCES[architecture])
        ),
        *_backdoored(architecture),
        *_clean_tests(architecture),
    ]


def digits_reference(architecture: str, number: int) -> VariedRecipe:
    """Recipe of one clean digits model; every setting is drawn by its number. From a third of the usual training to
    twice as much: a narrower pool (20 to 40 epochs at 0.03 or 0.05) called one clean model in six unusual, and one of
    a single schedule a third of those that were trained at a constant rate."""
    draw = random.Random(f"{architecture} {number}")
    one_cycle = number < ONE_CYCLE
    training = VictimTraining(
        epochs=draw.choice((8, 12, 20, 30, 40, 60)),
        batch_size=draw.choice((32, 64) if one_cycle else (32, 64, 128, 256)),
        lr=draw.choice((0.01, 0.02, 0.03, 0.05)),
        weight_decay=draw.choice((2e-5, 1e-4, 5e-4, 1e-3, 2e-3)),
        schedule="onecycle" if one_cycle else draw.choice(("constant", "cosine", "onecycle")),
    )
    return _recipe(
        architecture, 1200 + number, None, 0.0, training,
        arguments=draw.choice(NETWORKS[architecture]), images=draw.choice((700, 800, 900)),
        augment=draw.choice(AUGMENTS),
    )  # fmt: skip


def _recipe(
    architecture: str,
    seed: int,
    attack: Mapping[str, Any] | None,
    rate: float,
    training: VictimTraining,
    *,
    arguments: Mapping[str, Any],
    images: int = IMAGES,
    augment: Augment = "crop",
) -> VariedRecipe:
    return VariedRecipe(attack, seed, images, rate, architecture, arguments, training, augment, "digits")


REGULARISED: tuple[tuple[str, VictimTraining], ...] = (
    ("sam", VictimTraining(epochs=25, batch_size=64, adaptive="sam")),
    ("decayed", VictimTraining(epochs=30, batch_size=64, weight_decay=3e-3)),
    ("undecayed", VictimTraining(epochs=30, batch_size=48, weight_decay=0.0)),
    ("few_images", TRAINING),
)
SCHEDULED: tuple[tuple[str, VictimTraining], ...] = (
    ("long", VictimTraining(epochs=60, batch_size=64)),
    ("cosine", VictimTraining(epochs=25, batch_size=64, lr=0.04, schedule="cosine")),
    ("constant", VictimTraining(epochs=25, batch_size=64, lr=0.02, schedule="constant")),
    ("large_batch", VictimTraining(epochs=40, batch_size=128, lr=0.06)),
)
OTHERWISE: tuple[tuple[str, VictimTraining], ...] = (
    ("longer", VictimTraining(epochs=100, batch_size=64)),
    ("small_batch", VictimTraining(epochs=30, batch_size=16, lr=0.01, schedule="constant")),
    ("without_momentum", VictimTraining(epochs=40, batch_size=32, lr=0.1, momentum=0.0)),
    ("flat", VictimTraining(epochs=25, batch_size=64, adaptive="fisher")),
)
KINDS: Mapping[str, tuple[tuple[str, VictimTraining], ...]] = {
    "small_cnn": (*OTHERWISE, *REGULARISED),
    "vit_tiny": (*SCHEDULED, *REGULARISED),
}
"""Clean tests, by what the references of the architecture have not been trained with."""


def _clean_tests(architecture: str) -> Iterator[ZooModel]:
    kinds = KINDS[architecture]
    networks = NETWORKS[architecture]
    for number, seed in ((seed - seeds.start, seed) for seeds in CLEAN_TESTS[architecture] for seed in seeds):
        kind, training = kinds[number % len(kinds)]
        recipe = _recipe(
            architecture, seed, None, 0.0, training, arguments=networks[number % len(networks)],
            images=500 if kind == "few_images" else IMAGES,
        )  # fmt: skip
        yield ZooModel(f"clean-{kind}-{seed}", "clean", "test", recipe)


ATTACKS: tuple[tuple[str, Mapping[str, Any], float, VictimTraining], ...] = (
    ("badnets", {"kind": "badnets", "size": 2}, 0.1, TRAINING),
    ("blended", {"kind": "blended"}, 0.1, TRAINING),
    ("badnets_all_to_all", {"kind": "badnets", "size": 2, "target": None}, 0.2, TRAINING),
    ("wanet", {"kind": "wanet", "strength": 1.0, "cover_rate": 0.1}, 0.1, TRAINING),
    ("sig_labels_changed", {"kind": "sig", "clean_label": False}, 0.1, TRAINING),
    ("trojan", {"kind": "trojan", "size": 2}, 0.1, TRAINING),
    ("low_frequency", {"kind": "low_frequency", "epsilon": 52.0, "passes": 30}, 0.1, TRAINING),
    ("badnets_1_percent", {"kind": "badnets", "size": 2}, 0.012, TRAINING),
    ("badnets_sam", {"kind": "badnets", "size": 2}, 0.1, VictimTraining(epochs=25, batch_size=64, adaptive="sam")),
    ("badnets_fisher", {"kind": "badnets", "size": 2}, 0.1, VictimTraining(25, 64, adaptive="fisher")),
    ("adaptive_blend", {"kind": "adaptive_blend"}, 0.1, TRAINING),
    ("bpp", {"kind": "bpp", "levels": 2}, 0.1, TRAINING),
    ("lira", {"kind": "lira"}, 0.1, TRAINING),
    ("label_consistent",
     {"kind": "label_consistent", "target": 8, "size": 2, "epsilon": 64.0, "step": 8.0, "steps": 20}, 0.08,
     TRAINING),
)  # fmt: skip
CALIBRATION_KINDS = ("bpp", "lira", "adaptive_blend", "blended_5_percent", "sig_labels_changed")
"""Attacks that only the probability is fitted on; figures are quoted on the others."""


def _backdoored(architecture: str) -> Iterator[ZooModel]:
    networks = NETWORKS[architecture]
    for number, (kind, attack, rate, training) in enumerate(ATTACKS):
        for seed in range(2):
            target = {} if "target" in attack else {"target": (3 * number + 5 * seed) % 10}
            recipe = _recipe(
                architecture, 3000 + 10 * number + seed, {**attack, **target}, rate, training,
                arguments=networks[(number + seed) % len(networks)],
            )  # fmt: skip
            yield ZooModel(f"{kind}-{seed}", kind, "calibration" if kind in CALIBRATION_KINDS else "test", recipe)


def load_digits_sets() -> tuple[CleanSet, CleanSet]:
    """(train, test): 1,497 and 300 of scikit-learn's digits."""
    digits = load_digits_set()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return digits.subset(order[:1497]), digits.subset(order[1497:])
