"""The before / after / control table, once, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from defense_core.errors import EvidenceMismatch

Role = Literal["before", "after", "control"]

HEADINGS = ("model", "role", "probe", "ACC", "ASR", "RA", "DER")
"""Column headings that belong to :meth:`ComparisonRow.cells`."""

NOT_MEASURED = "n/a"


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval; all three are ``None`` where it is not defined."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    def text(self, digits: int = 3) -> str:
        """``0.012 [0.005, 0.031]``, or ``n/a`` where there is no figure."""
        if self.value is None:
            return NOT_MEASURED
        if self.low is None or self.high is None:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


@dataclass(frozen=True)
class ComparisonRow:
    """One model under one probe.

    Attributes:
        method: ``before`` or the purification method's name.
        role: ``before``, ``after``, or ``control`` (plain fine-tuning).
        selected: whether this model was chosen.
        probe: the probe's name; ``None`` where no probe is known.
        acc, asr, ra, der: figures in [0, 1] with 95 % intervals.
    """

    method: str
    role: Role
    selected: bool
    probe: str | None
    acc: Estimate
    asr: Estimate
    ra: Estimate
    der: Estimate

    def cells(self, digits: int = 3) -> tuple[str, ...]:
        """Text under :data:`HEADINGS`; the chosen model carries an asterisk."""
        figures = (each.text(digits) for each in (self.acc, self.asr, self.ra, self.der))
        return (self.method + (" *" if self.selected else ""), self.role, self.probe or NOT_MEASURED, *figures)


def compare(
    results: Mapping[str, Mapping[str, Any]], *, selected: str | None, control: str = "fine_tuning"
) -> tuple[ComparisonRow, ...]:
    """One row per model and probe: before first, then the chosen, the others by name, the control last.

    Args:
        results: the ``results`` of each evaluate evidence file, by method name (``before`` for
            the untouched model).
        selected: the chosen method, or ``None`` where nothing was chosen.
        control: the name of the plain fine-tuning control.

    Raises:
        EvidenceMismatch: a mapping is not the results of an evaluation.
    """

    def place(method: str) -> tuple[int, str]:
        return (0 if method == "before" else 3 if method == control else 1 if method == selected else 2, method)

    rows: list[ComparisonRow] = []
    for method in sorted(results, key=place):
        role: Role = "before" if method == "before" else "control" if method == control else "after"
        try:
            rows.extend(_rows(method, role, method == selected, results[method]))
        except (KeyError, TypeError, AttributeError) as error:
            raise EvidenceMismatch(
                f"evaluate.{method} does not hold the results of an evaluation",
                expected="acc and probes with asr, ra and der",
                got=f"{type(error).__name__}: {error}",
                hint="Evaluate this model again",
            ) from error
    return tuple(rows)


def _rows(method: str, role: Role, selected: bool, results: Mapping[str, Any]) -> list[ComparisonRow]:
    acc = _estimate(results["acc"])
    if not results["probes"]:
        return [ComparisonRow(method, role, selected, None, acc, Estimate(), Estimate(), Estimate())]
    return [
        ComparisonRow(
            method, role, selected, probe["name"], acc, _estimate(probe["asr"]), _estimate(probe["ra"]), _der(probe)
        )
        for probe in results["probes"]
    ]


def _der(probe: Mapping[str, Any]) -> Estimate:
    interval = probe.get("der_interval")
    return Estimate(probe["der"]) if interval is None else _estimate(interval)


def _estimate(figure: Mapping[str, Any]) -> Estimate:
    return Estimate(figure["value"], figure["low"], figure["high"])
