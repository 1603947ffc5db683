"""The CIFAR-10 models that the scan is calibrated and tested on.

The references are drawn as ``quarantine calibrate`` draws them, in three widths. The clean *test* models are of kinds
that the pool has never seen: longer trainings, wider networks, other batch sizes, no momentum, other decays,
sharpness-aware training; and half of them have seen as many images as the backdoored ones, the others half as many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.zoo import Recipe, VariedRecipe, ZooModel, training_for
from defense_core.attacks.victim import VictimTraining
from defense_core.scan.references import ReferenceTraining

REFERENCES = 60
"""Clean models of the calibration pool: a conformal p-value can reach 1/61."""
LONGER = 30
"""The first references are varied from a longer training on more images than the others."""
CLEAN_TESTS = 40
"""Five of each kind, of seeds that no rule was chosen on; see ``DIVERGED``."""

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
    images, middle = (18_000, ReferenceTraining(epochs=8)) if number < LONGER else (12_000, ReferenceTraining(epochs=5))
    tuning, share, augment = middle.varied(number)
    return VariedRecipe(
        attack=None,
        seed=1000 + number,
        images=round(share * images),
        rate=0.0,
        architecture_args=network((8, 12, 16)[number % 3]),
        training=VictimTraining(
            tuning.epochs, tuning.batch_size, tuning.lr, weight_decay=tuning.weight_decay, schedule=tuning.schedule
        ),
        augment=augment,
    )


CLEAN_KINDS: tuple[tuple[str, VictimTraining, int], ...] = (
    ("long", VictimTraining(epochs=16, batch_size=128, lr=0.1), 16),
    ("wide", SHORT, 24),
    ("small_batch", VictimTraining(epochs=4, batch_size=16, lr=0.01), 16),
    ("without_momentum", VictimTraining(epochs=8, batch_size=128, lr=0.5, momentum=0.0), 16),
    ("large_batch", VictimTraining(epochs=8, batch_size=512, lr=0.4), 16),
    ("sam", VictimTraining(epochs=6, batch_size=128, lr=0.1, adaptive="sam"), 16),
    ("decayed", VictimTraining(epochs=6, batch_size=128, lr=0.1, weight_decay=3e-3), 16),
    ("undecayed", VictimTraining(epochs=8, batch_size=96, lr=0.1, weight_decay=0.0), 16),
)
"""(kind, training, width) of the clean tests: none as the references are trained."""


DIVERGED = (20,)
"""Of the clean tests: a large batch at a high rate, whose loss became NaN. There is no model to scan."""


def clean_tests() -> Iterator[ZooModel]:
    """Clean models of kinds that the pool does not hold."""
    for number in (each for each in range(CLEAN_TESTS) if each not in DIVERGED):
        kind, training, width = CLEAN_KINDS[number % len(CLEAN_KINDS)]
        images = (9_000, 18_000)[number // len(CLEAN_KINDS) % 2]
        recipe = Recipe(None, 2100 + number, images, 0.0, architecture_args=network(width), training=training)
        yield ZooModel(f"clean-{kind}-{number:02}", "clean", "test", recipe)
    yield ZooModel("clean-0", "clean", "test", Recipe(attack=None, rate=0.0))


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
