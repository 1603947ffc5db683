"""What the parts of a report hold. Figures are fractions in [0, 1]; ``None`` is a figure that is not there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Tone = Literal["pass", "fail", "unknown", "neutral"]


@dataclass(frozen=True)
class Fact:
    """A labelled value; ``kind`` says how it is set."""

    label: str
    value: str
    kind: Literal["text", "code"] = "text"


@dataclass(frozen=True)
class Tile:
    """One figure of the first screen."""

    label: str
    value: str
    before: str
    note: str
    tone: Tone


@dataclass(frozen=True)
class RuleRow:
    """One rule of the decision."""

    rule: str
    verdict: str
    effect: str
    value: str
    bound: str
    why: str


@dataclass(frozen=True)
class FailedStep:
    """A step that failed, and why."""

    step: str
    error: str
    message: str
    hint: str


@dataclass(frozen=True)
class ClassRow:
    """Accuracy on one class, in [0, 1]."""

    label: int
    name: str
    before: float | None
    after: float | None
    drop: float | None
    trials: int


@dataclass(frozen=True)
class CurvePoint:
    """One epoch."""

    step: float
    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Curve:
    """One phase of one method."""

    phase: str
    points: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class MemberRow:
    """A purifier whose model may stand in a mean.

    Attributes:
        method: its name.
        averaged: whether it does.
        expected_drop: of accuracy, for which it may be left out; ``None`` where it is not known.
        why: why it left no model; empty where it did.
    """

    method: str
    averaged: bool
    expected_drop: float | None
    why: str


@dataclass(frozen=True)
class Training:
    """What a method did and how long it took; ``members`` where it averages what others made."""

    method: str
    control: bool
    curves: tuple[Curve, ...]
    seconds: float | None
    members: tuple[MemberRow, ...] = ()


@dataclass(frozen=True)
class LayerChange:
    """Units of one layer that a method changed, of how many (``None``: not recorded), and weights set to zero."""

    layer: str
    units: int
    total: int | None
    weights: int | None


@dataclass(frozen=True)
class ParityRow:
    """One set of images, answered by the network and by the ONNX file."""

    name: str
    images: int | None
    max_abs_diff: float | None
    bound_abs: float | None
    argmax_agreement: float | None
    bound_agreement: float | None
    passed: bool


@dataclass(frozen=True)
class CandidateRow:
    """A candidate of the selection."""

    method: str
    chosen: bool
    control: bool
    accuracy: float | None
    residual: float | None
    why: str
