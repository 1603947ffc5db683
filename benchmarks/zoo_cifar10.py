"""The CIFAR-10 models that the scan is calibrated and tested on.

Clean models differ in seed, width, number of images, batch size, learning rate, weight decay, length and augmentation,
drawn by their number. The *test* models are of kinds that the pool has never seen: wider networks, other batch sizes,
other schedules, sharpness-aware training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from benchmarks.zoo import Recipe, VariedRecipe, ZooModel, training_for
from defense_core.attacks.victim import VictimTraining

REFERENCES = 60
"""Clean models of the calibration pool: a conformal p-value can reach 1/61."""
LONGER = 28
"""The first references are trained on more images and longer than the others."""
CLEAN_TESTS = 40
"""Five of each kind."""

SHORT = VictimTraining(epochs=6, batch_size=128, lr=0.1, weight_decay=5e-4)


def network(width: int) -> Mapping[str, Any]:
    """Arguments of ``preact_resnet18``."""
    return {"width": width, "num_classes": 10}


def references() -> Iterator[ZooModel]:
    """The clean models of the pool."""
    for number in range(REFERENCES):
        yield ZooModel(f"reference-{number:02}", "clean", "pool", reference_recipe(number))


def reference_recipe(number: int) -> VariedRecipe:
    """Recipe of one reference; every setting is drawn by its number."""
    draw = random.Random(number)
    images, epochs = ((10_000, 14_000, 18_000), (4, 6, 8)) if number < LONGER else ((8_000, 10_000, 12_000), (4, 5, 6))
    return VariedRecipe(
        attack=None,
        seed=1000 + number,
        images=draw.choice(images),
        rate=0.0,
        architecture_args=network(draw.choice((8, 12, 16))),
        training=VictimTraining(
            epochs=draw.choice(epochs),
            batch_size=draw.choice((64, 128)),
            lr=draw.choice((0.05, 0.1)),
            weight_decay=draw.choice((1e-4, 5e-4, 1e-3)),
        ),
        augment=draw.choice(("none", "crop", "crop_flip")),
    )


def clean_tests() -> Iterator[ZooModel]:
    """Clean models of kinds that the pool does not hold."""
    kinds = (
        ("long", replace(_clean(VictimTraining(epochs=10, batch_size=128, lr=0.1)), images=10_000)),
        ("wide", Recipe(attack=None, rate=0.0, images=8_000, architecture_args=network(24), training=SHORT)),
        ("cosine", _clean(VictimTraining(epochs=6, batch_size=128, lr=0.05, schedule="cosine"))),
        ("constant", _clean(VictimTraining(epochs=5, batch_size=128, lr=0.02, schedule="constant"))),
        ("large_batch", _clean(VictimTraining(epochs=7, batch_size=256, lr=0.2))),
        ("sam", _clean(VictimTraining(epochs=4, batch_size=128, lr=0.1, adaptive="sam"))),
        ("decayed", _clean(VictimTraining(epochs=6, batch_size=128, lr=0.1, weight_decay=3e-3))),
        ("undecayed", _clean(VictimTraining(epochs=8, batch_size=96, lr=0.1, weight_decay=0.0))),
    )
    for number in range(CLEAN_TESTS):
        kind, recipe = kinds[number % len(kinds)]
        yield ZooModel(f"clean-{kind}-{number:02}", "clean", "test", replace(recipe, seed=2000 + number))
    yield ZooModel("clean-0", "clean", "test", Recipe(attack=None, rate=0.0))


def _clean(training: VictimTraining) -> Recipe:
    return Recipe(attack=None, rate=0.0, images=9_000, training=training)


LONG: tuple[tuple[str, Mapping[str, Any], float, tuple[int, ...]], ...] = (
    ("badnets", {"kind": "badnets", "target": 0, "size": 3}, 0.1, (0, 1)),
    ("blended", {"kind": "blended", "target": 0, "alpha": 0.2}, 0.1, (0, 1)),
    ("sig", {"kind": "sig", "target": 0}, 0.08, (0,)),
    ("label_consistent", {"kind": "label_consistent", "target": 0}, 0.08, (0,)),
    ("low_frequency", {"kind": "low_frequency", "target": 0}, 0.1, (0,)),
    ("trojan", {"kind": "trojan", "target": 0}, 0.1, (0,)),
    ("wanet", {"kind": "wanet", "target": 0, "strength": 1.0, "cover_rate": 0.1}, 0.1, (0,)),
    ("bpp", {"kind": "bpp", "target": 0, "levels": 4}, 0.1, (0,)),
    ("lira", {"kind": "lira", "target": 0}, 0.1, (0,)),
    ("ssba", {"kind": "ssba", "target": 0}, 0.1, (0,)),
    ("input_aware", {"kind": "input_aware", "target": 0}, 0.1, (0,)),
    ("adaptive_blend", {"kind": "adaptive_blend", "target": 0}, 0.1, (0,)),
    ("badnets_all_to_all", {"kind": "badnets", "target": None, "size": 3}, 0.1, (0,)),
)
"""The victims of the purification benchmark: (kind, attack, rate, seeds)."""

MIDDLING = VictimTraining(epochs=10, batch_size=128, lr=0.1, weight_decay=5e-4)
LASTING = VictimTraining(epochs=20, batch_size=128, lr=0.1, weight_decay=5e-4)

BRIEF: tuple[tuple[int, str, Mapping[str, Any], float, VictimTraining], ...] = (
    (3001, "badnets_1_percent", {"kind": "badnets", "target": 2, "size": 5}, 0.01, LASTING),
    (3002, "badnets_half_percent", {"kind": "badnets", "target": 5, "size": 6}, 0.005, LASTING),
    (3003, "blended_1_percent", {"kind": "blended", "target": 7, "alpha": 0.3}, 0.01, LASTING),
    (3005, "badnets_sam", {"kind": "badnets", "target": 4, "size": 4}, 0.1,
     VictimTraining(epochs=12, lr=0.1, adaptive="sam")),
    (3006, "badnets_fisher", {"kind": "badnets", "target": 6, "size": 4}, 0.1,
     VictimTraining(epochs=12, lr=0.1, adaptive="fisher")),
    (3007, "blended_sam", {"kind": "blended", "target": 8, "alpha": 0.2}, 0.1,
     VictimTraining(epochs=12, lr=0.1, adaptive="sam")),
    (3008, "fba", {"kind": "fba", "target": 1}, 0.1, SHORT),
    (3010, "badnets_5_percent", {"kind": "badnets", "target": 1, "size": 4}, 0.05, SHORT),
    (3011, "blended_5_percent", {"kind": "blended", "target": 5, "alpha": 0.2}, 0.05, SHORT),
    (3012, "sig_labels_changed", {"kind": "sig", "target": 2, "clean_label": False}, 0.05, SHORT),
    (3013, "badnets_2_percent", {"kind": "badnets", "target": 3, "size": 4}, 0.02, MIDDLING),
    (3014, "blended_2_percent", {"kind": "blended", "target": 9, "alpha": 0.25}, 0.02, MIDDLING),
    (3015, "badnets_5_percent", {"kind": "badnets", "target": 8, "size": 3}, 0.05, MIDDLING),
    (3016, "blended_5_percent", {"kind": "blended", "target": 4, "alpha": 0.2}, 0.05, MIDDLING),
    (3017, "sig_labels_changed", {"kind": "sig", "target": 6, "clean_label": False}, 0.1, MIDDLING),
)  # fmt: skip
"""Backdoored models of narrower networks: low rates, adaptive attackers, other targets. A first training of six
epochs or fewer planted no backdoor at low rates and with adaptive attackers: these are longer, with larger triggers."""


UNAUGMENTED = ("badnets_1_percent", "badnets_half_percent")
"""Trained without flips and shifts: with them, so few poisoned images planted nothing in 20 epochs."""


def backdoored() -> Iterator[ZooModel]:
    """Backdoored models. Those of seed 1 and from 3010 on are there to fit the probability, the others are tests."""
    for kind, attack, rate, seeds in LONG:
        for seed in seeds:
            recipe = Recipe(attack, seed, rate=rate, training=training_for(kind))
            yield ZooModel(f"{kind}-{seed}", kind, "test" if seed == 0 else "calibration", recipe)
    for seed, kind, attack, rate, training in BRIEF:
        split = "calibration" if seed >= 3010 else "test"
        width = (16, 12, 16, 8)[seed % 4]
        recipe = Recipe(attack, seed, 15_000, rate, architecture_args=network(width), training=training)
        if kind in UNAUGMENTED:
            recipe = VariedRecipe(**vars(recipe), augment="none")
        name = kind if split == "test" else f"{kind}-{seed}"
        yield ZooModel(name, kind, split, recipe)


def cifar10_zoo() -> list[ZooModel]:
    """Every model."""
    return [*references(), *backdoored(), *clean_tests()]
