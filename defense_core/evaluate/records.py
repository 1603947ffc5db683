"""What an evaluation says: counts per class and per probe, and their form in an evidence file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from defense_core.evaluate.metrics import Interval, PairedCounts, Proportion, largest


@dataclass(frozen=True)
class ClassAccuracy:
    """Accuracy on the images of one class; ``paired`` only beside a reference model."""

    label: int
    acc: Proportion
    paired: PairedCounts | None = None

    @property
    def drop(self) -> float | None:
        """Accuracy lost on this class; ``None`` without a reference or without images."""
        return None if self.paired is None else self.paired.drop

    def to_results(self) -> dict[str, Any]:
        """The row of this class in ``results.classes``."""
        before = None if self.paired is None else self.paired.before.value
        return {
            "label": self.label,
            "acc": self.acc.value,
            "acc_before": before,
            "drop": self.drop,
            "trials": self.acc.trials,
        }


@dataclass(frozen=True)
class ProbeResult:
    """One probe on all samples whose label is not already what the attacker wants.

    Attributes:
        asr: answers that are what the attacker wants.
        ra: answers that are the true label, on the same triggered images.
        asr_paired, ra_paired: the same samples under the reference model and this one.
        der: defence effectiveness rating; ``None`` without a reference.
        der_interval: its interval.
    """

    name: str
    kind: str
    target: int | None
    asr: Proportion
    ra: Proportion
    asr_paired: PairedCounts | None = None
    ra_paired: PairedCounts | None = None
    der: float | None = None
    der_interval: Interval | None = None

    def to_results(self) -> dict[str, Any]:
        """The row of this probe in ``results.probes``."""
        span = self.der_interval
        return {
            "name": self.name,
            "kind": self.kind,
            "target": self.target,
            "asr": self.asr.to_results(),
            "ra": self.ra.to_results(),
            "asr_before": None if self.asr_paired is None else self.asr_paired.before.to_results(),
            "ra_before": None if self.ra_paired is None else self.ra_paired.before.to_results(),
            "der": self.der,
            "der_interval": None if span is None else {"value": self.der, "low": span.low, "high": span.high},
        }


@dataclass(frozen=True)
class Evaluation:
    """What was measured. Figures that are not defined are ``None``."""

    acc: Proportion
    paired: PairedCounts | None
    classes: tuple[ClassAccuracy, ...]
    probes: tuple[ProbeResult, ...]

    @property
    def acc_drop(self) -> float | None:
        """Clean accuracy lost against the reference."""
        return None if self.paired is None else self.paired.drop

    @property
    def class_acc_drop_max(self) -> float | None:
        """The largest loss of any class; ``None`` without a reference or where a class has no image."""
        return largest(row.drop for row in self.classes)

    def to_results(self) -> dict[str, Any]:
        """The ``results`` of an evaluate evidence file (JSON types only)."""
        return {
            "images": self.acc.trials,
            "acc": self.acc.to_results(),
            "acc_before": None if self.paired is None else self.paired.before.to_results(),
            "acc_drop": self.acc_drop,
            "acc_drop_interval": None if self.paired is None else self.paired.to_results(),
            "class_acc_drop_max": self.class_acc_drop_max,
            "classes": [row.to_results() for row in self.classes],
            "probes": [row.to_results() for row in self.probes],
            "asr_max": self._asr_max(),
        }

    def _asr_max(self) -> dict[str, float] | None:
        rows = [row.asr.to_results() for row in self.probes]
        value, high = largest(row["value"] for row in rows), largest(row["high"] for row in rows)
        return None if value is None or high is None else {"value": value, "high": high}
