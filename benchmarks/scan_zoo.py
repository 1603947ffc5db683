"""The models that the scan is calibrated and tested on: which ones, and how they were trained.

Clean CIFAR-10 models differ in seed, width, number of images, batch size, learning rate, weight decay, length and
augmentation, drawn by their number. The *test* models are of kinds that the pool has never seen: wider networks, other
batch sizes, other schedules, sharpness-aware training. ``python -m benchmarks.scan_zoo --data FOLDER`` trains what the
user's cache lacks.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.zoo import Recipe, load_cifar10, load_digits_set, training_for, victim
from defense_core.attacks.victim import VictimTraining
from defense_core.data import CleanSet
from defense_core.progress import default_progress

REFERENCES = 60
"""Clean models of the calibration pool: a conformal p-value can reach 1/61."""
LONGER = 28
"""The first references are trained on more images and longer than the others."""
CLEAN_TESTS = 40
"""Five of each kind."""

SHORT = VictimTraining(epochs=6, batch_size=128, lr=0.1, weight_decay=5e-4)


@dataclass(frozen=True)
class VariedRecipe(Recipe):
    """A recipe whose augmentation varies too.

    Attributes:
        augment: as in :class:`defense_core.task.ImageClassification`.
        data: ``cifar10``, or ``digits``: scikit-learn's.
    """

    augment: str = "crop_flip"
    data: str = "cifar10"


@dataclass(frozen=True)
class ZooModel:
    """One model of the zoo.

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


def cifar_zoo() -> list[ZooModel]:
    """Every CIFAR-10 model."""
    return [*references(), *backdoored(), *clean_tests()]


DIGITS_TRAINING = VictimTraining(epochs=30, batch_size=64)
DIGITS_IMAGES = 900
DIGITS_REFERENCES: Mapping[str, int] = {"small_cnn": 4 * REFERENCES, "vit_tiny": REFERENCES}
"""Four times as many of the network that is trained and read in seconds, the second half with other schedules."""
ONE_CYCLE = 2 * REFERENCES
"""So many digits references, the first ones, are trained with one cycle of the rate, as the backdoored models are."""
DIGITS_CLEAN_TESTS: Mapping[str, tuple[range, ...]] = {
    "small_cnn": (range(2500, 2700),),
    "vit_tiny": (range(2100, 2124), range(2300, 2348)),
}
"""Seeds. With 24 clean models a false positive rate of 0.05 cannot be told from one of 0.15; with 200 it can."""
DIGITS_NETWORKS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
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
            for number in range(DIGITS_REFERENCES[architecture])
        ),
        *_digits_backdoored(architecture),
        *_digits_clean(architecture),
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
    return _digits(
        architecture, 1200 + number, None, 0.0, training,
        arguments=draw.choice(DIGITS_NETWORKS[architecture]), images=draw.choice((700, 800, 900)),
        augment=draw.choice(("none", "crop")),
    )  # fmt: skip


def _digits(
    architecture: str,
    seed: int,
    attack: Mapping[str, Any] | None,
    rate: float,
    training: VictimTraining,
    *,
    arguments: Mapping[str, Any],
    images: int = DIGITS_IMAGES,
    augment: str = "crop",
) -> VariedRecipe:
    return VariedRecipe(attack, seed, images, rate, architecture, arguments, training, augment, "digits")


KINDS: tuple[tuple[str, VictimTraining], ...] = (
    ("sam", VictimTraining(epochs=25, batch_size=64, adaptive="sam")),
    ("decayed", VictimTraining(epochs=30, batch_size=64, weight_decay=3e-3)),
    ("undecayed", VictimTraining(epochs=30, batch_size=48, weight_decay=0.0)),
    ("few_images", DIGITS_TRAINING),
)
SCHEDULED: tuple[tuple[str, VictimTraining], ...] = (
    ("long", VictimTraining(epochs=60, batch_size=64)),
    ("cosine", VictimTraining(epochs=25, batch_size=64, lr=0.04, schedule="cosine")),
    ("constant", VictimTraining(epochs=25, batch_size=64, lr=0.02, schedule="constant")),
    ("large_batch", VictimTraining(epochs=40, batch_size=128, lr=0.06)),
)
UNSCHEDULED: tuple[tuple[str, VictimTraining], ...] = (
    ("longer", VictimTraining(epochs=100, batch_size=64)),
    ("small_batch", VictimTraining(epochs=30, batch_size=16, lr=0.01, schedule="constant")),
    ("without_momentum", VictimTraining(epochs=40, batch_size=32, lr=0.1, momentum=0.0)),
    ("flat", VictimTraining(epochs=25, batch_size=64, adaptive="fisher")),
)
DIGITS_KINDS: Mapping[str, tuple[tuple[str, VictimTraining], ...]] = {
    "small_cnn": (*UNSCHEDULED, *KINDS),
    "vit_tiny": (*SCHEDULED, *KINDS),
}
"""Clean tests, by what the references of the architecture have not been trained with."""


def _digits_clean(architecture: str) -> Iterator[ZooModel]:
    kinds = DIGITS_KINDS[architecture]
    networks = DIGITS_NETWORKS[architecture]
    for number, seed in ((seed - seeds.start, seed) for seeds in DIGITS_CLEAN_TESTS[architecture] for seed in seeds):
        kind, training = kinds[number % len(kinds)]
        recipe = _digits(
            architecture, seed, None, 0.0, training, arguments=networks[number % len(networks)],
            images=500 if kind == "few_images" else DIGITS_IMAGES,
        )  # fmt: skip
        yield ZooModel(f"clean-{kind}-{seed}", "clean", "test", recipe)


DIGITS_ATTACKS: tuple[tuple[str, Mapping[str, Any], float, VictimTraining], ...] = (
    ("badnets", {"kind": "badnets", "size": 2}, 0.1, DIGITS_TRAINING),
    ("blended", {"kind": "blended"}, 0.1, DIGITS_TRAINING),
    ("badnets_all_to_all", {"kind": "badnets", "size": 2, "target": None}, 0.2, DIGITS_TRAINING),
    ("wanet", {"kind": "wanet", "strength": 1.0, "cover_rate": 0.1}, 0.1, DIGITS_TRAINING),
    ("sig_labels_changed", {"kind": "sig", "clean_label": False}, 0.1, DIGITS_TRAINING),
    ("trojan", {"kind": "trojan", "size": 2}, 0.1, DIGITS_TRAINING),
    ("low_frequency", {"kind": "low_frequency", "epsilon": 52.0, "passes": 30}, 0.1, DIGITS_TRAINING),
    ("badnets_1_percent", {"kind": "badnets", "size": 2}, 0.012, DIGITS_TRAINING),
    ("badnets_sam", {"kind": "badnets", "size": 2}, 0.1, VictimTraining(epochs=25, batch_size=64, adaptive="sam")),
    ("badnets_fisher", {"kind": "badnets", "size": 2}, 0.1, VictimTraining(25, 64, adaptive="fisher")),
    ("adaptive_blend", {"kind": "adaptive_blend"}, 0.1, DIGITS_TRAINING),
    ("bpp", {"kind": "bpp", "levels": 2}, 0.1, DIGITS_TRAINING),
    ("lira", {"kind": "lira"}, 0.1, DIGITS_TRAINING),
    ("label_consistent",
     {"kind": "label_consistent", "target": 8, "size": 2, "epsilon": 64.0, "step": 8.0, "steps": 20}, 0.08,
     DIGITS_TRAINING),
)  # fmt: skip
CALIBRATION_KINDS = ("bpp", "lira", "adaptive_blend", "blended_5_percent", "sig_labels_changed")
"""Attacks that only the probability is fitted on; figures are quoted on the others."""


def _digits_backdoored(architecture: str) -> Iterator[ZooModel]:
    networks = DIGITS_NETWORKS[architecture]
    for number, (kind, attack, rate, training) in enumerate(DIGITS_ATTACKS):
        for seed in range(2):
            target = {} if "target" in attack else {"target": (3 * number + 5 * seed) % 10}
            recipe = _digits(
                architecture, 3000 + 10 * number + seed, {**attack, **target}, rate, training,
                arguments=networks[(number + seed) % len(networks)],
            )  # fmt: skip
            yield ZooModel(f"{kind}-{seed}", kind, "calibration" if kind in CALIBRATION_KINDS else "test", recipe)


def load_digits_sets() -> tuple[CleanSet, CleanSet]:
    """(train, test): 1,497 and 300 of scikit-learn's digits."""
    digits = load_digits_set()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    return digits.subset(order[:1497]), digits.subset(order[1497:])


FAMILIES: Mapping[str, Callable[[], list[ZooModel]]] = {
    "cifar10": cifar_zoo,
    "digits": lambda: digits_zoo("small_cnn"),
    "digits_vit": lambda: digits_zoo("vit_tiny"),
}


def main() -> None:
    """Train what the cache lacks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, default="cifar10")
    parser.add_argument("--data", type=Path, default=Path(), help="folder with cifar10-{train,test}.parquet")
    parser.add_argument("--part", default="0/1", help="this process takes every n-th model: 0/2 and 1/2 side by side")
    parser.add_argument("--only", default="", help="names that start with this")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    train, test = load_cifar10(arguments.data) if arguments.family == "cifar10" else load_digits_sets()
    for model in [model for model in FAMILIES[arguments.family]() if model.name.startswith(arguments.only)][
        part::parts
    ]:
        trained = victim(model.recipe, train, test, device="cpu", progress=default_progress())
        print(f"{model.name}: {trained.train_seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
