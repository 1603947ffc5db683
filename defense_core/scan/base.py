"""What every detector gets and gives: the frozen model with clean images, and an observation with a score per class."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from defense_core.checkpoints import Checkpoints
from defense_core.config import require
from defense_core.data import CleanSet
from defense_core.errors import NonFiniteOutputs, QuarantineError, StateDictMismatch
from defense_core.inference import autocast, channels_last
from defense_core.loop import working_copy
from defense_core.progress import Phase, Progress
from defense_core.scan import centring
from defense_core.scan.bounded import bounded_change
from defense_core.task import ImageClassification
from defense_core.universal import MAX_TARGETS

TriggerKind = Literal["patch", "additive", "generated"]
MANY_CLASSES = 2 * MAX_TARGETS
"""With more classes than this, a detector looks at a short list: see :func:`shortlist`."""
SHORTLISTED = MAX_TARGETS
LARGEST_LOGIT = 1e15
"""What is larger is no logit: squares, differences and sums over a batch stay finite in float32 below it."""
DRAWS = 0
"""Seed of everything that a scan draws. No option: a verdict that another number may change is one that somebody may
repeat until it suits; and the references of a pool were read with the same draws."""
GAPS_TRIED = 3
"""A model may have up to this many target classes and still stand out (MM-BD, section on several targets)."""


class OutOfTime(QuarantineError):
    """The time that the operator gave to a scan is used up."""


@dataclass(frozen=True)
class Deadline:
    """When a scan must stop.

    Attributes:
        at_s: ``time.monotonic()`` of the end; infinite: no limit.
    """

    at_s: float = math.inf

    @property
    def is_set(self) -> bool:
        """Whether there is one at all."""
        return self.at_s < math.inf

    @classmethod
    def after(cls, budget_s: float) -> Deadline:
        """The deadline ``budget_s`` seconds from now; 0 means none."""
        return cls(time.monotonic() + budget_s) if budget_s else cls()

    def check(self) -> None:
        """Called at every step of every detector.

        Raises:
            OutOfTime: the time is over.
        """
        if time.monotonic() > self.at_s:
            raise OutOfTime(
                "the scan's time is used up",
                expected="an end within the budget",
                got="more to do",
                hint="Give it more seconds (--budget-s) or a faster device",
            )


class _TimedPhase:
    def __init__(self, phase: Phase, deadline: Deadline) -> None:
        self._phase, self._deadline = phase, deadline

    def advance(self, steps: int = 1, **metrics: float) -> None:
        self._deadline.check()
        self._phase.advance(steps, **metrics)

    def __enter__(self) -> Self:
        self._phase.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._phase.__exit__(kind, error, trace)


@dataclass(frozen=True, eq=False)
class TimedProgress:
    """Progress that is also where a scan notices that its time is over."""

    progress: Progress
    deadline: Deadline

    @property
    def checkpoints(self) -> Checkpoints:
        """Those of the progress that this wraps."""
        return self.progress.checkpoints

    def phase(self, name: str, total: int | None = None) -> Phase:
        """As of :class:`defense_core.progress.Progress`; ``advance`` may raise :class:`OutOfTime`."""
        return _TimedPhase(self.progress.phase(name, total), self.deadline)


@dataclass(frozen=True, eq=False)
class Subject:
    """A model under scan.

    Attributes:
        model: eval mode, on ``device``, no parameter requires a gradient; a copy of what the caller has, centred.
        task: input transform and number of classes.
        images: clean images that a detector may search with; ``None`` where the user has none.
        seed: every random draw of a detector comes from a generator of this seed.
    """

    model: nn.Module
    task: ImageClassification
    images: CleanSet | None
    device: torch.device
    progress: Progress
    deadline: Deadline = Deadline()
    seed: int = DRAWS

    @property
    def num_classes(self) -> int:
        """K."""
        return self.task.num_classes

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits (N, K), float32, of pixels in [0, 1], float32 (N, C, H, W); values outside are clipped, so that no
        gradient comes from there. Counts as one step for the deadline.

        Raises:
            NonFiniteOutputs: the model answers NaN or Inf.
            StateDictMismatch: it does not answer one logit a class.
            OutOfTime: the scan's time is used up.
        """
        self.deadline.check()
        with autocast(self.model, "auto", self.device)():
            outputs: Tensor = self.model(channels_last(self.task.inputs(pixels.clamp(0, 1))))
        if outputs.dim() != 2 or outputs.shape != (len(pixels), self.num_classes):
            raise StateDictMismatch(
                "the model's outputs are not one logit a class",
                expected=f"({len(pixels)}, {self.num_classes})",
                got=tuple(outputs.shape),
                hint="State the model's own number of classes",
            )
        outputs = outputs.float()
        # Written so that NaN is refused too. The difference and the square of what is let through are finite.
        if not bool((outputs.abs() < LARGEST_LOGIT).all()):
            raise NonFiniteOutputs(
                "the model's outputs are not finite",
                expected=f"logits below {LARGEST_LOGIT:g}",
                got="NaN, Inf or more",
                hint="A model that answers NaN to an image cannot be scanned",
            )
        return outputs

    def generator(self) -> torch.Generator:
        """A fresh CPU generator of ``seed``."""
        return torch.Generator().manual_seed(self.seed)


def subject_of(
    model: nn.Module,
    images: CleanSet | None,
    *,
    task: ImageClassification,
    device: torch.device | str,
    progress: Progress,
    deadline: Deadline = Deadline(),
    seed: int = DRAWS,
    centred: bool = True,
) -> Subject:
    """A frozen copy of ``model``, ready for detectors; ``model`` itself is left as it is.

    Args:
        centred: the copy's last layer is centred over the classes (:mod:`defense_core.scan.centring`).
    """
    frozen = working_copy(model, device).eval()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    if centred:
        frozen = centring.centred(frozen, task)
    timed = TimedProgress(progress, deadline) if deadline.is_set else progress
    return Subject(frozen, task, images, torch.device(device), timed, deadline, seed)


@dataclass(frozen=True, eq=False)
class InvertedTrigger:
    """A trigger that was found by optimisation.

    Attributes:
        target: the class that it leads to.
        kind: ``patch``: ``(1 - mask) * image + mask * pattern``; ``additive``: ``image + pattern``, clipped;
            ``generated``: as :func:`defense_core.scan.bounded.bounded_change` says, clipped.
        pattern: float32 (C, H, W), grey levels; where ``generated``, what its changes have in common.
        mask: float32 (1, H, W) in [0, 1]; ``None`` where ``additive``.
        sources: classes that it leads away from; empty: any.
        parts: where ``generated``, of that change, for one class.
    """

    target: int
    kind: TriggerKind
    pattern: Tensor
    mask: Tensor | None = None
    sources: tuple[int, ...] = ()
    parts: Mapping[str, Tensor] = field(default_factory=lambda: MappingProxyType({}))

    def apply(self, images: Tensor) -> Tensor:
        """uint8 or float grey levels (N, C, H, W) with the trigger, as float32 grey levels."""
        pixels = images.float()
        pattern = self.pattern.to(pixels.device)
        if self.kind == "generated":
            parts = {name: part.to(pixels.device) for name, part in self.parts.items()}
            return (255 * bounded_change(pixels[None] / 255, parts)[0]).clamp(0, 255)
        if self.kind == "additive":
            return (pixels + pattern).clamp(0, 255)
        assert self.mask is not None
        mask = self.mask.to(pixels.device)
        return ((1 - mask) * pixels + mask * pattern).clamp(0, 255)


@dataclass(frozen=True, eq=False)
class Observation:
    """What one detector saw.

    Attributes:
        detector: its name.
        statistic: larger is more suspicious; comparable between models of one kind, not between detectors.
        class_scores: one number a class looked at, larger is more suspicious; empty where the detector has none.
        classes: the class of each score.
        targets: suspected target classes, the most suspicious first.
        pairs: suspected (source, target) pairs, where the detector knows sources.
        triggers: what it inverted, for the pictures, the confirmation and the re-scan.
        why: one plain sentence for somebody who is no researcher.
        facts: further JSON values.
    """

    detector: str
    statistic: float
    why: str
    class_scores: tuple[float, ...] = ()
    classes: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    triggers: tuple[InvertedTrigger, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        require(math.isfinite(self.statistic), f"statistic of {self.detector}", "a finite number", self.statistic)
        require(len(self.class_scores) == len(self.classes), "class_scores", "one a class", len(self.class_scores))

    @property
    def measured(self) -> bool:
        """Whether the detector could look at all: what it says of a model that it could not look at ranks nowhere."""
        return bool(self.facts.get("measured", True))


def unmeasured(detector: str, reason: str) -> Observation:
    """The observation of a detector that could not look at this model."""
    return Observation(
        detector, 0.0, f"Not measured on this model: {reason}", facts=MappingProxyType({"measured": False})
    )


def outlying(scores: Sequence[float], *, floor: float) -> tuple[float, tuple[int, ...]]:
    """How far the highest scores stand above the rest, and which they are.

    For j = 1..3 of the highest, the gap between the j-th and the next, in robust standard deviations (1.4826 MAD) of
    those below; the largest of the three counts (MM-BD's rule for several targets). With fewer than four scores the
    gap of the first is all there is.

    Args:
        scores: larger is more suspicious.
        floor: added to the deviation, in units of the scores; keeps a set of nearly equal scores from standing out.

    Returns:
        The statistic, and the indices of the scores that stand out, the highest first. 0 and nothing for a single
        score.
    """
    values = torch.tensor(scores, dtype=torch.float64)
    if len(values) < 2:
        return 0.0, ()
    order = values.argsort(descending=True, stable=True)
    best, members = -math.inf, 1
    for count in range(1, min(GAPS_TRIED, max(1, len(values) - 3)) + 1):
        rest = values[order[count:]]
        deviation = 1.4826 * float((rest - rest.median()).abs().median()) + floor
        gap = float(values[order[count - 1]] - rest.max()) / deviation
        if gap > best:
            best, members = gap, count
    return best, tuple(order[:members].tolist())


def shortlist(scores: Sequence[float]) -> tuple[int, ...]:
    """The classes that a detector looks at closely, ascending: all of them up to ``MANY_CLASSES``, else the
    ``SHORTLISTED`` with the highest first scores."""
    if len(scores) <= MANY_CLASSES:
        return tuple(range(len(scores)))
    return tuple(torch.tensor(scores).argsort(descending=True, stable=True)[:SHORTLISTED].sort().values.tolist())
