"""Universal additive perturbations as a detector: the bounded-amplitude arm of trigger inversion.

Where :mod:`defense_core.scan.patch` looks for a small mask, this looks for a change of every pixel that is too faint to
turn a clean model (Moosavi-Dezfooli et al., CVPR 2017, targeted). Blended, sinusoidal and low-frequency triggers are of
that form, and many others leave a shortcut that such a change finds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from defense_core.config import require
from defense_core.scan.base import InvertedTrigger, Observation, Subject, outlying
from defense_core.scan.sampling import halves, others
from defense_core.universal import Search, universal_perturbations

FLOOR = 0.1
"""Of the class scores' deviation, in standard deviations of the clean logits."""


@dataclass(frozen=True)
class AdditiveConfig:
    """How the perturbations are searched.

    Attributes:
        epsilon: bound on every pixel's change, grey levels.
        steps: signed-gradient steps.
        batch_size: images a class and step.
    """

    epsilon: float = 6.0
    steps: int = 30
    batch_size: int = 16

    def __post_init__(self) -> None:
        require(0 < self.epsilon <= 255, "epsilon", "in (0, 255]", self.epsilon)
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)


@torch.no_grad()
def additive(subject: Subject, config: AdditiveConfig) -> Observation:
    """One perturbation a class, found on half of the images and judged on the other half.

    A class's score is the mean margin of its logit over the best other one on perturbed images of other classes, in
    standard deviations of the logits of the unperturbed images: free of the logits' scale.
    """
    searched, judged = halves(subject, subject.generator())
    search = Search(config.epsilon, config.steps, config.batch_size, subject.seed)
    with torch.enable_grad():
        found = universal_perturbations(
            subject.model, searched, task=subject.task, device=subject.device, progress=subject.progress, search=search
        )
    pixels = judged.images.float()
    scale = float(subject.logits(pixels / 255).std().clamp_min(1e-6))
    scores, shares = [], []
    for target, change in zip(found.targets, found.changes.to(subject.device), strict=True):
        logits = subject.logits((pixels[others(judged, target)] + change) / 255)
        rivals = logits.clone()
        rivals[:, target] = -torch.inf
        margins = logits[:, target] - rivals.amax(1)
        scores.append(float(margins.mean()) / scale)
        shares.append(float((margins > 0).float().mean()))
    statistic, members = outlying(scores, floor=FLOOR)
    best = members[0] if members else 0
    triggers = tuple(
        InvertedTrigger(target, "additive", change) for target, change in zip(found.targets, found.changes, strict=True)
    )
    return Observation(
        "additive",
        statistic,
        f"The same change of at most {config.epsilon:g} grey levels a pixel sends {shares[best]:.0%} of the images to "
        f"class {found.targets[best]}, and {sorted(shares)[len(shares) // 2]:.0%} to the median class",
        class_scores=tuple(scores),
        classes=found.targets,
        targets=tuple(found.targets[each] for each in members),
        triggers=triggers,
        facts={"reached": shares, "epsilon": config.epsilon},
    )
