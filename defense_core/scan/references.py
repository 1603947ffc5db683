"""Make a calibration pool: train clean reference models, or take some, and keep what the detectors read on them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import nn

from defense_core import config
from defense_core.architectures import initialise
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.loop import Schedule, Tuning, finished, tune, working_copy
from defense_core.progress import Progress
from defense_core.scan.detectors import DETECTORS, FEW, MANY, Regime, Settings, regime_of
from defense_core.scan.observe import Observed, observe, wanted
from defense_core.scan.pool import Pool, Reading, Reference, Stratum, reading_of
from defense_core.scan.sampling import spread_over_classes
from defense_core.task import Augment, ImageClassification


@dataclass(frozen=True)
class ReferenceTraining:
    """The middle of the recipes that references are trained with; each reference varies it.

    Attributes:
        epochs: passes over its images.
        batch_size, lr, weight_decay: as in :class:`defense_core.loop.Tuning`.
    """

    epochs: int = 15
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "epochs", "1 or more", self.epochs)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        require(self.weight_decay >= 0, "weight_decay", "0 or more", self.weight_decay)

    def varied(self, number: int) -> tuple[Tuning, float, Augment]:
        """(schedule, share of the images, augmentation) of reference ``number``: half to one and a half times the
        epochs, half to all of the images, and other rates, schedules, decays, batches and augmentations, all drawn by
        the number. A rate that stays is a quarter of one that falls to zero.

        A pool whose models were all trained alike gives false alarms on a clean model that was trained otherwise.
        """
        draw = random.Random(number)  # noqa: S311 - recipes, not secrets
        schedule: Schedule = draw.choice(get_args(Schedule))
        tuning = Tuning(
            epochs=max(1, round(self.epochs * draw.uniform(0.5, 1.5))),
            batch_size=max(2, round(self.batch_size * draw.choice((0.5, 1.0, 2.0)))),
            lr=self.lr * draw.choice((0.5, 1.0)) * (0.25 if schedule == "constant" else 1.0),
            weight_decay=self.weight_decay * draw.choice((0.2, 1.0, 2.0)),
            schedule=schedule,
        )
        augment: tuple[Augment, ...] = ("none", "crop", "crop_flip")
        return tuning, draw.uniform(0.5, 1.0), draw.choice(augment)


def train_reference(
    network: nn.Module,
    data: CleanSet,
    number: int,
    training: ReferenceTraining,
    *,
    task: ImageClassification,
    device: torch.device | str,
    progress: Progress,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one clean reference from fresh weights; the model and its recipe.

    Raises:
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    tuning, share, augment = training.varied(number)
    generator = torch.Generator().manual_seed(number)
    kept = torch.randperm(len(data), generator=generator)[: max(2, round(share * len(data)))]
    model = initialise(working_copy(network, "cpu"), number).to(device)
    tune(
        model,
        data.subset(kept),
        task=replace(task, augment=augment),
        tuning=tuning,
        seed=number,
        device=device,
        progress=progress,
        name=f"train reference {number}",
    )
    recipe = {"seed": number, "images": len(kept), "augment": augment, **config.to_mapping(tuning)}
    return finished(model, f"reference {number}"), recipe


def read_reference(
    name: str,
    model: nn.Module,
    recipe: Mapping[str, Any],
    clean: CleanSet,
    settings: Settings,
    *,
    number: int,
    task: ImageClassification,
    device: torch.device | str,
    progress: Progress,
) -> Reference:
    """What the detectors read on one clean model, in every regime that ``clean`` allows.

    Args:
        number: of the reference; draws which of the images it is read on. Users scan with images of their own, and
            references that were all read on the same ones lie closer together than models on different images do.
        clean: images that the model was not trained on.
    """
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(number))
    order = order[spread_over_classes(clean.subset(order))]  # as a scan takes those that it searches with
    readings: dict[str, dict[str, Reading]] = {}
    covariates: dict[str, float] = {}
    regimes: tuple[Regime, ...] = ("few", "many") if regime_of(clean) == "many" else (regime_of(clean),)
    for regime in regimes:
        # What looks at the model alone says the same in every regime.
        fresh = [detector for detector in wanted(("none", regime)) if detector not in readings.get("none", {})]
        own = clean.subset(order[: MANY if regime == "many" else FEW])
        observed = observe(model, own, regime, settings, task=task, device=device, progress=progress, only=fresh)
        covariates.update(observed.covariates)
        file_readings(readings, observed, regime)
    return Reference(name, dict(recipe), covariates, readings)


def file_readings(readings: dict[str, dict[str, Reading]], observed: Observed, regime: Regime) -> None:
    """Add what was observed to ``readings``, by regime: a detector that looks at the model alone stands under
    ``none``; one that could not look at this kind of model, nowhere."""
    for detector, observation in observed.observations.items():
        if not observation.measured:
            continue
        where = "none" if DETECTORS[detector].regimes == ("none",) else regime
        readings.setdefault(where, {})[detector] = reading_of(observation)


def pool_of(references: Iterable[Reference], stratum: Stratum, settings: Settings) -> Pool:
    """The pool of ``references``; without a probability, which takes backdoored models."""
    return Pool(stratum, config.digest(settings), tuple(references), {})
