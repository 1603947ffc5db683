"""A bounded generator shared by all classes: triggers that depend on the image, warp it or cover all of it.

The arm of trigger inversion for what no patch describes (FeatureRE, Wang et al., NeurIPS 2022; UNICORN, ICLR 2023;
BTI-DBF, Xu et al., ICLR 2024), made cheap: one small residual network with an embedding of the class, a faint picture
and a smooth warp of each class's own, all trained together on clean images. The change is held to a fixed mean squared
error, and the score is how far held-out images go to the class under it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.inference import items_at_once
from defense_core.progress import Phase
from defense_core.scan.base import InvertedTrigger, Observation, Subject, outlying, shortlist
from defense_core.scan.bounded import bounded_change
from defense_core.scan.sampling import drawn, halves, others
from defense_core.universal import CONVINCED

DETECTOR = "generator"
FLOOR = 0.1
"""Added to the scores' deviation, in standard deviations of the clean logits."""
FILTERS = 8
KEPT = 4
"""Triggers handed on: of the most suspicious class, and others to compare it with."""
WARP_CELLS = 4
"""Side of the coarse grid of displacements that a warp is interpolated from."""
SCREENING_PASSES, SCREENING_IMAGES, SCREENED_AT_ONCE = 4, 3, 64
"""With many classes, so often each class is trained, on so many images, before the short list is made."""


@dataclass(frozen=True)
class GeneratorConfig:
    """How the generator is trained.

    Attributes:
        change: bound on the root mean square of the change of a 3 x 32 x 32 image, grey levels; other sizes: see
            :meth:`budget`.
        steps: Adam steps.
        batch_size: clean images a class and step.
        lr: Adam's step for the shared network; the pictures and warps of the classes take ``own_lr``.
        own_lr: see there.
        judged: held-out images a class, at most.
    """

    change: float = 8.0
    steps: int = 110
    batch_size: int = 10
    lr: float = 0.01
    own_lr: float = 0.05
    judged: int = 64

    def __post_init__(self) -> None:
        require(0 < self.change <= 255, "change", "in (0, 255]", self.change)
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(self.lr > 0, "lr", "above 0", self.lr)
        require(self.own_lr > 0, "own_lr", "above 0", self.own_lr)
        require(self.judged >= 1, "judged", "1 or more", self.judged)

    def budget(self, input_size: tuple[int, int, int]) -> float:
        """The bound for images of this size, grey levels. Halfway between one root mean square and one Euclidean norm
        for all sizes: the more pixels, the less each has to change."""
        return min(255.0, self.change * math.sqrt(math.sqrt(3 * 32 * 32 / math.prod(input_size))))


def generator(subject: Subject, config: GeneratorConfig) -> Observation:
    """Train the generator for every class, or for the most promising of many, and judge it on held-out images.

    A class's score is the mean margin of its logit over the best other one on changed images of other classes, in
    standard deviations of the logits of the unchanged images: free of the logits' scale.

    Raises:
        DataError: there are fewer than two clean images.
    """
    draws = subject.generator()
    search, judge = halves(subject, draws)
    classes = tuple(range(subject.num_classes))
    screened = shortlist([0.0] * len(classes))
    brief = 0 if len(screened) == len(classes) else SCREENING_PASSES * math.ceil(len(classes) / SCREENED_AT_ONCE)
    with subject.progress.phase(DETECTOR, total=config.steps + brief) as phase:
        if brief:
            classes = _screened(subject, search, config, draws, phase)
        network = BoundedGenerator(subject, len(classes), config, draws)
        every = torch.arange(len(classes))
        for step in range(config.steps):
            network.rate((1 - step / config.steps) ** 0.5)
            _step(subject, search, network, classes=classes, rows=every, batch_size=config.batch_size, draws=draws)
            phase.advance()
    return _observation(subject, judge, network, classes, config=config, draws=draws)


class BoundedGenerator:
    """The parts of :func:`defense_core.scan.bounded.bounded_change` for all classes, as they are trained.

    Args:
        count: number of classes T.
        draws: the first weights come from it.
    """

    def __init__(self, subject: Subject, count: int, config: GeneratorConfig, draws: torch.Generator) -> None:
        channels, height, width = subject.task.input_size
        device = subject.device

        def weights(*shape: int, scale: float) -> Tensor:
            return (scale * torch.randn(*shape, generator=draws)).to(device).requires_grad_(True)

        budget = config.budget(subject.task.input_size) / 255
        self._budget = torch.tensor(budget, device=device)
        self._convolutions = [
            weights(FILTERS, channels, 3, 3, scale=(2 / (9 * channels)) ** 0.5),
            weights(FILTERS, FILTERS, 3, 3, scale=(2 / (9 * FILTERS)) ** 0.5),
            weights(channels, FILTERS, 3, 3, scale=0.3 * (1 / (9 * FILTERS)) ** 0.5),
        ]
        # For each class a scale and a shift of the filters of both hidden layers.
        self._embedding = weights(count, 4, FILTERS, scale=0.3)
        self._pictures = weights(count, channels, height, width, scale=0.01)
        self._warps = weights(count, 2, WARP_CELLS, WARP_CELLS, scale=0.1)
        self._parameters = [*self._convolutions, self._embedding, self._pictures, self._warps]
        rates = [config.lr] * 3 + [config.own_lr] * 3
        rates[4] *= budget  # a picture is as large as the change, not as 1
        self._rates = rates
        self._adam = torch.optim.Adam(
            [{"params": [each], "lr": rate} for each, rate in zip(self._parameters, rates, strict=True)],
            betas=(0.7, 0.95),
        )

    def rate(self, share: float) -> None:
        """Set the step sizes to a share of the configured ones."""
        for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
            group["lr"] = share * rate

    def on(self, rows: Tensor, pixels: Tensor) -> Tensor:
        """Images (T, B, C, H, W) in [0, 1], changed for the classes ``rows`` (int64, T)."""
        return bounded_change(pixels, self._parts(rows.to(pixels.device)))

    def _parts(self, rows: Tensor) -> dict[str, Tensor]:
        first, second, last = self._convolutions
        return {
            "first": first,
            "second": second,
            "last": last,
            "budget": self._budget,
            "embedding": self._embedding[rows],
            "picture": self._pictures[rows],
            "warp": self._warps[rows],
        }

    def trigger(self, row: int) -> Mapping[str, Tensor]:
        """The parts of :func:`defense_core.scan.bounded.bounded_change` for one class, on the CPU."""
        rows = torch.tensor([row], device=self._pictures.device)
        return {name: part.detach().cpu().clone() for name, part in self._parts(rows).items()}

    def descend(self, losses: Sequence[Tensor]) -> None:
        """Accumulate the gradients of some losses, to be followed by :meth:`step`."""
        torch.autograd.backward(list(losses))

    def step(self) -> None:
        """One Adam step along the accumulated gradients."""
        self._adam.step()
        self._adam.zero_grad()


def _step(
    subject: Subject,
    search: CleanSet,
    network: BoundedGenerator,
    *,
    classes: Sequence[int],
    rows: Tensor,
    batch_size: int,
    draws: torch.Generator,
) -> Tensor:
    """One step for the classes at ``rows``; returns their mean losses, CPU."""
    index = drawn([others(search, classes[row]) for row in rows.tolist()], batch_size, draws)
    at_once = items_at_once(search.images, batch_size)
    found = []
    for some, images in zip(rows.split(at_once), index.split(at_once), strict=True):
        pixels = search.images[images.to(search.images.device)].float() / 255
        wanted = torch.tensor([classes[row] for row in some.tolist()], device=subject.device)
        logits = subject.logits(network.on(some, pixels).flatten(0, 1))
        losses = subject.task.losses(logits, wanted.repeat_interleave(batch_size)).clamp_min(CONVINCED)
        network.descend([losses.view(len(some), -1).mean(1).sum() / len(rows)])
        found.append(losses.detach().view(len(some), -1).mean(1).cpu())
    network.step()
    return torch.cat(found)


def _screened(
    subject: Subject, search: CleanSet, config: GeneratorConfig, draws: torch.Generator, phase: Phase
) -> tuple[int, ...]:
    """The classes that a brief training of one generator for all of them reaches most easily."""
    classes = tuple(range(subject.num_classes))
    network = BoundedGenerator(subject, len(classes), config, draws)
    losses = torch.zeros(len(classes))
    for _ in range(SCREENING_PASSES):
        for rows in torch.randperm(len(classes), generator=draws).split(SCREENED_AT_ONCE):
            losses[rows] = _step(
                subject, search, network, classes=classes, rows=rows, batch_size=SCREENING_IMAGES, draws=draws
            )
            phase.advance()
    return shortlist((-losses).tolist())


@torch.no_grad()
def _observation(
    subject: Subject,
    judge: CleanSet,
    network: BoundedGenerator,
    classes: tuple[int, ...],
    *,
    config: GeneratorConfig,
    draws: torch.Generator,
) -> Observation:
    pixels = judge.images.float() / 255
    clean = torch.cat([subject.logits(part) for part in pixels.split(items_at_once(judge.images, 1))])
    scale = float(clean.std(dim=1).mean().clamp_min(1e-6))
    scores, shares, changes = [], [], []
    for row, target in enumerate(classes):
        pool = others(judge, target)
        mine = pixels[pool[torch.randperm(len(pool), generator=draws)[: config.judged]].to(pixels.device)]
        parts = [network.on(torch.tensor([row]), part[None])[0] for part in mine.split(items_at_once(judge.images, 1))]
        logits = torch.cat([subject.logits(part) for part in parts])
        rivals = logits.clone()
        rivals[:, target] = -torch.inf
        margins = logits[:, target] - rivals.amax(1)
        scores.append(float(margins.mean()) / scale)
        shares.append(float((margins > 0).float().mean()))
        changes.append(255 * (torch.cat(parts) - mine).mean(0).cpu())
    statistic, members = outlying(scores, floor=FLOOR)
    order = sorted(range(len(classes)), key=lambda row: -scores[row])
    first = order[0]
    budget = config.budget(subject.task.input_size)
    return Observation(
        DETECTOR,
        statistic,
        f"A learned change of {budget:.1f} grey levels sends {shares[first]:.0%} of unseen images to class "
        f"{classes[first]}, and {sorted(shares)[len(shares) // 2]:.0%} to the median class",
        tuple(scores),
        classes,
        tuple(classes[row] for row in members),
        triggers=tuple(
            InvertedTrigger(classes[row], "generated", changes[row], parts=network.trigger(row)) for row in order[:KEPT]
        ),
        facts={"reached": [round(share, 4) for share in shares], "change": budget},
    )
