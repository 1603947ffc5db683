"""Trigger inversion: the smallest patch that sends every image to a class.

Wang et al., *Neural Cleanse*, IEEE S&P 2019: for each class *t* a mask m in [0, 1] and a pattern p minimise
``CE(f((1 - m) x + m p), t) + lambda_t |m|_1`` over clean images of other classes; the class that a backdoor leads to
needs a much smaller mask than the others. Here all classes are searched in one batch, each with its own lambda, and
the score is taken on images that the search has not seen. With many classes a few short rounds leave only the most
promising (the idea of K-Arm, Shen et al., ICML 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.inference import items_at_once
from defense_core.progress import Phase
from defense_core.scan.base import (
    MANY_CLASSES,
    SHORTLISTED,
    InvertedTrigger,
    Observation,
    Subject,
    outlying,
)
from defense_core.scan.inversion import Descent, Inversion, Patches
from defense_core.scan.sampling import halves, others

DETECTOR = "patch"
PUBLISHED_INDEX = 2.0
"""Neural Cleanse calls a model backdoored above this anomaly index."""
SCREENING = ((128, 6, 2), (SHORTLISTED, 12, 4))
"""(classes kept, steps, images a class and step) of the rounds before the search, with more than ``MANY_CLASSES``."""
SIZE_FLOOR = 0.1
"""Added to the deviation of the log sizes: sizes that differ by a tenth say nothing, whatever the others do."""
SMALLEST_PIXELS = 0.5
"""Masks below half a pixel count as half a pixel: the logarithm of less measures only how long the search went on."""
MISS_COST = 2.0
"""What an attack that fails adds to the log size: ``MISS_COST`` times what its mean probability lacks of the rate
wanted. One that always fails counts as six times as large as it is."""


@dataclass(frozen=True)
class PatchConfig:
    """How a patch is searched.

    Attributes:
        steps: Adam steps a class, less where its mask shrinks no more.
        batch_size: clean images a class and step.
        lr: Adam's step, in logits of mask and pattern.
        success: attack success rate below which a mask counts as larger than it is.
        growth: factor on a class's lambda at each step at which the attack succeeds; it falls by ``growth ** 1.5``
            otherwise.
        patience: steps without a mask 3 % smaller than the best, after which a class is finished.
        judged: held-out images a class, at most.
    """

    steps: int = 120
    batch_size: int = 8
    lr: float = 0.3
    success: float = 0.9
    growth: float = 1.2
    patience: int = 30
    judged: int = 64

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.lr > 0, "lr", "above 0", self.lr)
        require(0 < self.success <= 1, "success", "in (0, 1]", self.success)
        require(self.growth > 1, "growth", "above 1", self.growth)
        require(self.patience >= 1, "patience", "1 or more", self.patience)
        require(self.judged >= 1, "judged", "1 or more", self.judged)

    def descent(self, batch_size: int, patience: int) -> Descent:
        """The search holds a higher success on its own images, because unseen ones lose some."""
        return Descent(batch_size, self.lr, (1 + self.success) / 2, self.growth, patience)


def patch(subject: Subject, config: PatchConfig) -> Observation:
    """Search the smallest patch of every class and compare them.

    Raises:
        DataError: there are fewer than two clean images.
    """
    generator = subject.generator()
    search, judge = halves(subject, generator)
    total = config.steps + (sum(steps for _, steps, _ in SCREENING) if subject.num_classes > MANY_CLASSES else 0)
    with subject.progress.phase(DETECTOR, total=total) as phase:
        classes = _screened(subject, search, config, generator, phase)
        smallest, last = _searched(subject, search, classes, config=config, generator=generator, phase=phase)
    judged = [_judged(subject, judge, classes, found, config=config, generator=generator) for found in (smallest, last)]
    costs = [_log_size(found, sure, config.success) for found, (_, sure) in zip((smallest, last), judged, strict=True)]
    better = (costs[1] < costs[0])[:, None, None, None]
    patches = Patches(torch.where(better, last.logits, smallest.logits))
    rates = torch.where(better.flatten(), judged[1][0], judged[0][0]).tolist()
    scores = tuple((-torch.minimum(costs[0], costs[1])).tolist())
    return _observation(scores, classes, patches, rates)


def anomaly_index(norms: Sequence[float]) -> float:
    """Neural Cleanse's verdict as published: how many deviations (1.4826 MAD) the smallest mask norm lies below the
    median; above ``PUBLISHED_INDEX`` the model is called backdoored."""
    values = torch.tensor(norms, dtype=torch.float64)
    median = float(values.quantile(0.5))
    deviation = 1.4826 * float((values - median).abs().quantile(0.5))
    return (median - float(values.min())) / deviation if deviation else 0.0


def _observation(
    scores: tuple[float, ...], classes: tuple[int, ...], patches: Patches, rates: list[float]
) -> Observation:
    statistic, members = outlying(scores, floor=SIZE_FLOOR)
    order = sorted(range(len(scores)), key=lambda row: -scores[row])
    first = order[0]
    pixels = patches.masks.sum((1, 2, 3)).tolist()
    typical = float(torch.tensor(pixels).median())
    index = anomaly_index(pixels)
    return Observation(
        DETECTOR,
        statistic,
        f"a patch of {pixels[first]:.1f} pixels sends {rates[first]:.0%} of unseen images to class {classes[first]}; "
        f"the typical class needs {typical:.1f} pixels",
        scores,
        classes,
        tuple(classes[row] for row in members),
        triggers=tuple(
            InvertedTrigger(
                classes[row], "patch", 255 * patches.patterns[row].cpu().float(), patches.masks[row].cpu().float()
            )
            for row in order
        ),
        facts={
            "anomaly_index": index,
            "published_verdict": index > PUBLISHED_INDEX,
            "mask_pixels": [round(value, 3) for value in pixels],
            "success": [round(rate, 4) for rate in rates],
        },
    )


def _screened(
    subject: Subject, search: CleanSet, config: PatchConfig, generator: torch.Generator, phase: Phase
) -> tuple[int, ...]:
    """The classes worth a full search: all of a few, the easiest of many."""
    classes = tuple(range(subject.num_classes))
    if len(classes) <= MANY_CLASSES:
        return classes
    for kept, steps, batch_size in SCREENING:
        if len(classes) > kept:
            state = _inversion(subject, search, classes, config.descent(batch_size, patience=steps), generator)
            for _ in range(steps):
                state.step()
                phase.advance()
            easiest = state.losses.argsort(stable=True)[:kept].sort().values.tolist()
            classes = tuple(classes[row] for row in easiest)
        else:
            phase.advance(steps)
    return classes


def _searched(
    subject: Subject,
    search: CleanSet,
    classes: tuple[int, ...],
    *,
    config: PatchConfig,
    generator: torch.Generator,
    phase: Phase,
) -> tuple[Patches, Patches]:
    """The smallest patches that succeeded in the search, and the last ones."""
    state = _inversion(subject, search, classes, config.descent(config.batch_size, config.patience), generator)
    for step in range(config.steps):
        if not state.active.any():
            phase.advance(config.steps - step)
            break
        state.step()
        phase.advance()
    return Patches(state.best), Patches(state.logits)


@torch.no_grad()
def _judged(
    subject: Subject,
    judge: CleanSet,
    classes: tuple[int, ...],
    patches: Patches,
    *,
    config: PatchConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Success of each patch on held-out images of other classes, and the mean probability of its class there, which
    unlike the success has no steps: both float32 (T,)."""
    rates, probabilities = [], []
    at_once = items_at_once(judge.images, 1)
    for row, target in enumerate(classes):
        pool = others(judge, target)
        index = pool[torch.randperm(len(pool), generator=generator)[: config.judged]].to(judge.images.device)
        one = Patches(patches.logits[row : row + 1])
        hits, sure = 0, 0.0
        for some in index.split(at_once):
            outputs = subject.logits(one.on(judge.images[some].float()[None] / 255).flatten(0, 1))
            hits += int((outputs.argmax(1) == target).sum())
            sure += float(outputs.softmax(1)[:, target].sum())
        rates.append(hits / len(index))
        probabilities.append(sure / len(index))
    device = patches.logits.device
    return torch.tensor(rates, device=device), torch.tensor(probabilities, device=device)


def _log_size(patches: Patches, probabilities: Tensor, success: float) -> Tensor:
    """Logarithm of the share of the image that each mask covers, plus the price of the success that it lacks (T,)."""
    masks = patches.masks
    shares = masks.mean((1, 2, 3)).clamp_min(SMALLEST_PIXELS / masks[0].numel())
    return shares.log() + MISS_COST * (success - probabilities).clamp_min(0)


def _inversion(
    subject: Subject, search: CleanSet, classes: tuple[int, ...], descent: Descent, generator: torch.Generator
) -> Inversion:
    return Inversion(
        subject,
        search,
        [others(search, target) for target in classes],
        targets=classes,
        descent=descent,
        generator=generator,
    )
