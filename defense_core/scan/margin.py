"""MM-BD: the largest margin that any image at all reaches in each class; no data needed.

Wang et al., *MM-BD: Post-training detection of backdoor attacks with arbitrary backdoor pattern types using a maximum
margin statistic*, IEEE S&P 2024 (arXiv 2205.06900), eq. 1: for each class *c*

    maximise  f_c(x) - max_{k != c} f_k(x)   over all images x in [0, 1]^d

from random starts. Training with a trigger lets the logits of the target class grow far beyond what the features of
the other classes allow, whatever the trigger looks like. What differs from the paper: logarithms of margins, which a
temperature or a weight decay shifts all alike; the gap below the j-th largest for j up to 3, so that several targets
stand out too; steps in units of the pixel range, whatever the network's normalisation; and no fitted gamma tail, whose
p-values are wrong for ten classes: the pool of clean models says what is unusual.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from defense_core.config import require
from defense_core.inference import items_at_once
from defense_core.scan.base import Observation, Subject, outlying, shortlist

FLOOR = 0.5
"""Added to the robust deviation of the log margins: about the deviation between the classes of a clean model (0.3 to
0.6 measured). The deviation of nine numbers is a poor estimate by itself; where it comes out small by chance, ordinary
classes would stand out. Repeating the search with other starts moves a log margin by 0.02 to 0.1."""
SMALLEST = 1e-3
"""Margins below this share of the largest count as this share: their logarithm says nothing more."""
SETTLED = 0.8
"""The margins at this share of the steps show, beside the last, whether the search has settled."""
SETTLED_GAIN = 0.05
"""A search has settled where the last fifth of its steps raised the median class by at most about 5 %."""
MOMENTUM = 0.9


@dataclass(frozen=True)
class MarginConfig:
    """Settings of the search.

    Attributes:
        starts: random images, the same for every class.
        steps: ascent steps from each, with momentum.
        step_size: root mean square of the first step's changes, as a share of the pixel range; falls linearly to zero.
        screening_steps: steps from one start for each class where there are too many classes for all of them.
    """

    starts: int = 4
    steps: int = 110
    step_size: float = 0.1
    screening_steps: int = 40

    def __post_init__(self) -> None:
        require(self.starts >= 1, "starts", "1 or more", self.starts)
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(0 < self.step_size <= 1, "step_size", "in (0, 1]", self.step_size)
        require(self.screening_steps >= 1, "screening_steps", "1 or more", self.screening_steps)


def margin(subject: Subject, config: MarginConfig = MarginConfig()) -> Observation:
    """Search the largest margin of every class, or of the ``SHORTLISTED`` most promising of many.

    The class scores are the logarithms of the largest margins, the statistic how far the highest stand above the
    others.

    Raises:
        NonFiniteOutputs: the model answers NaN or Inf.
        OutOfTime: the scan's time is used up.
        Cancelled: a stop was requested.
    """
    every = tuple(range(subject.num_classes))
    starts = torch.rand(config.starts, *subject.task.input_size, generator=subject.generator())
    classes = shortlist([0.0] * len(every))
    if len(classes) < len(every):
        brief = replace(config, steps=config.screening_steps)
        first, _ = _search(subject, every, starts[:1], brief, name="margin: screening")
        classes = shortlist(first[:, 0].tolist())
    margins, earlier = _search(subject, classes, starts, config, name="margin")
    return _observation(classes, margins, earlier)


def margins_of(logits: Tensor, classes: Tensor) -> Tensor:
    """``f_c(x) - max_{k != c} f_k(x)``, (N,).

    Args:
        logits: (N, K); log-probabilities give the same margins.
        classes: c of each row, int64 (N,).
    """
    own = logits.gather(1, classes[:, None])
    others = logits.scatter(1, classes[:, None], -math.inf)
    return (own - others.max(1, keepdim=True).values).squeeze(1)


def _search(
    subject: Subject, classes: tuple[int, ...], starts: Tensor, config: MarginConfig, *, name: str
) -> tuple[Tensor, Tensor]:
    """Largest margins (classes, starts), float64, CPU, and those reached after the share ``SETTLED`` of the steps."""
    chunks = at_once(classes, starts)
    with subject.progress.phase(name, total=config.steps * len(chunks)) as phase:
        found = [_ascend(subject, chunk, starts, config, phase.advance) for chunk in chunks]
    last, earlier = (torch.cat(parts).double().cpu() for parts in zip(*found, strict=True))
    return last, earlier


def at_once(classes: Sequence[int], starts: Tensor) -> tuple[Tensor, ...]:
    """The classes in parts, int64, that are searched in one batch, with all ``starts`` (N, C, H, W) of each."""
    parts: tuple[Tensor, ...] = torch.tensor(classes).split(items_at_once(starts, len(starts)))
    return parts


def stepped(images: Tensor, velocity: Tensor, gradient: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [0, 1] and velocity after a step up the gradient, with momentum.

    A step of a length of its own: gradients differ by orders of magnitude between models, classes and images.
    """
    size = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    velocity = MOMENTUM * velocity + (1 - MOMENTUM) * gradient / size.clamp_min(torch.finfo(size.dtype).tiny)
    return (images.detach() + step_size * velocity).clamp(0, 1), velocity


def _ascend(
    subject: Subject, classes: Tensor, starts: Tensor, config: MarginConfig, advance: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """The largest margins met on the way, (classes, starts), and those met until ``SETTLED``."""
    images = starts.to(subject.device).repeat(len(classes), 1, 1, 1)
    wanted = classes.to(subject.device).repeat_interleave(len(starts))
    velocity = torch.zeros_like(images)
    best = torch.full((len(images),), -math.inf, device=subject.device)
    earlier = best
    for step in range(config.steps):
        images.requires_grad_(True)
        reached = margins_of(subject.logits(images), wanted)
        (gradient,) = torch.autograd.grad(reached.sum(), images)
        best = torch.maximum(best, reached.detach())
        if step <= SETTLED * (config.steps - 1):
            earlier = best
        images, velocity = stepped(images, velocity, gradient, config.step_size * (1 - step / config.steps))
        advance()
    return best.view(len(classes), -1), earlier.view(len(classes), -1)


def _observation(classes: tuple[int, ...], margins: Tensor, earlier: Tensor) -> Observation:
    largest = margins.amax(1)
    scores = log_margins(largest)
    statistic, members = outlying(scores.tolist(), floor=FLOOR)
    named = tuple(classes[member] for member in members)
    rest = [score for index, score in enumerate(scores.tolist()) if index not in members]
    ratio = math.exp(float(scores[list(members)].min()) - max(rest)) if members and rest else 1.0
    gained = float((scores - log_margins(torch.minimum(earlier, margins).amax(1))).median())
    words = " and ".join(map(str, named))
    return Observation(
        detector="margin",
        statistic=statistic,
        why=(
            f"Some image convinces the model of class {words} {ratio:.1f} times as firmly as any image does of the "
            f"next class; the step is {statistic:.1f} times the usual difference between classes."
        ),
        class_scores=tuple(scores.tolist()),
        classes=classes,
        targets=named,
        facts=MappingProxyType(
            {
                "margins": [round(value, 4) for value in largest.tolist()],
                "mean_log_margin": float(scores.mean()),
                "log_gap": math.log(ratio),
                "spread_over_starts": float(log_margins(margins).std(1, correction=0).median()),
                "gained_lately": gained,
                "settled": gained <= SETTLED_GAIN,
            }
        ),
    )


def log_margins(margins: Tensor) -> Tensor:
    """Logarithms; what is below ``SMALLEST`` of the largest, zero and negative margins included, counts as that.

    All zero where no margin is positive: such a model prefers no class to another, for any image.
    """
    largest = float(margins.max())
    if largest <= 0:
        return torch.zeros_like(margins)
    return margins.clamp_min(SMALLEST * largest).log()
