"""Two runs side by side: what was the same, what changed, and which figures lie further apart than chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from defense_core import report_text as words
from defense_core.config import canonical_json, to_mapping
from defense_core.evaluate.compare import ComparisonRow, Estimate
from defense_core.report import Report
from defense_core.report_page import template
from defense_core.report_records import Fact

COMPARISON_SCHEMA = 1
_MEASURES = (("ACC", "acc"), ("ASR", "asr"), ("RA", "ra"), ("DER", "der"))


@dataclass(frozen=True)
class Side:
    """One of the two runs."""

    name: str
    outcome: str
    headline: str
    started: str
    evidence_digest: str


@dataclass(frozen=True)
class Difference:
    """One labelled value of both runs; empty where a run does not have it."""

    label: str
    first: str
    second: str
    kind: str

    @property
    def same(self) -> bool:
        """Whether both runs say the same."""
        return self.first == self.second


@dataclass(frozen=True)
class FigureChange:
    """One figure of one model in both runs.

    Attributes:
        model: ``before``, or the method.
        probe: the trigger; empty for figures on clean images.
        measure: ACC, ASR, RA or DER.
        change: second less first, in [-1, 1]; ``None`` where one is missing.
        apart: whether the 95 % intervals do not touch; ``None`` where one is missing.
    """

    model: str
    probe: str
    measure: str
    first: Estimate
    second: Estimate
    change: float | None
    apart: bool | None


@dataclass(frozen=True)
class RuleChange:
    """One rule's result in both runs, and what that did to the decision; empty where a run did not have the rule."""

    rule: str
    first: str
    second: str
    why: str
    first_effect: str = ""
    second_effect: str = ""

    @property
    def same(self) -> bool:
        """Whether both runs say the same."""
        return (self.first, self.first_effect) == (self.second, self.second_effect)


@dataclass(frozen=True)
class RunComparison:
    """Everything that the page of a comparison says."""

    headline: str
    detail: str
    first: Side
    second: Side
    facts: tuple[Difference, ...]
    figures: tuple[FigureChange, ...]
    rules: tuple[RuleChange, ...]

    def to_mapping(self) -> dict[str, Any]:
        """JSON types."""
        return {"schema": COMPARISON_SCHEMA, **to_mapping(self)}

    def to_json(self) -> bytes:
        """Canonical bytes: the same two runs give the same comparison."""
        return canonical_json(self.to_mapping())


def compare_reports(first: Report, second: Report, *, names: tuple[str, str]) -> RunComparison:
    """Compare two runs.

    Args:
        names: how the page calls them.
    """
    figures = tuple(_figures(first.figures, second.figures))
    rules = tuple(_rules(first, second))
    return RunComparison(
        headline=_headline(first, second, names),
        detail=_detail(figures, rules, models=[_value(each.came_in, "SHA-256") for each in (first, second)]),
        first=_side(first, names[0]),
        second=_side(second, names[1]),
        facts=tuple(_facts(first, second)),
        figures=figures,
        rules=rules,
    )


def render_comparison(comparison: RunComparison) -> str:
    """The page: one self-contained HTML document."""
    return template("compare.html.j2").render(comparison=comparison)


# -- parts -----------------------------------------------------------------------------


def _side(report: Report, name: str) -> Side:
    started = _value(report.environment, "Started")
    return Side(words.text(name, 120), report.outcome, report.headline, started, report.evidence_digest)


def _headline(first: Report, second: Report, names: tuple[str, str]) -> str:
    a, b = (words.text(name, 120) for name in names)
    if first.outcome == second.outcome:
        return f"Both runs ended the same way: {_ended(first)}."
    return f"The runs ended differently: {a} {_ended(first)}, {b} {_ended(second)}."


def _ended(report: Report) -> str:
    named = {"allow": "allowed", "deny": "denied", "unknown": "undecided", "observe": "observed only"}
    return named.get(report.outcome, report.outcome)


def _detail(figures: tuple[FigureChange, ...], rules: tuple[RuleChange, ...], *, models: Sequence[str]) -> str:
    apart = [f"{words.label(row.model)} {row.measure}" for row in figures if row.apart]
    changed = [row.rule for row in rules if not row.same]
    if not all(models):
        said = ["Whether the incoming model is the same is not known."]
    else:
        same = len(set(models)) == 1
        said = ["The incoming model is the same." if same else "The incoming models are different ones."]
    if apart:
        said.append(f"Apart by more than their 95 % intervals: {', '.join(dict.fromkeys(apart))}.")
    elif figures and all(row.apart is None for row in figures):
        said.append("No figure can be compared.")
    elif figures:
        said.append("All 95 % intervals overlap, so the differences may be chance.")
    if changed:
        said.append(f"Rules with another result: {', '.join(changed)}.")
    return " ".join(said)


def _facts(first: Report, second: Report) -> Iterable[Difference]:
    for part in ("came_in", "goes_out", "policy", "environment"):
        pair: tuple[tuple[Fact, ...], tuple[Fact, ...]] = (getattr(first, part), getattr(second, part))
        kinds = {fact.label: fact.kind for facts in pair for fact in facts}
        for label, kind in kinds.items():
            yield Difference(label, _value(pair[0], label), _value(pair[1], label), kind)


def _value(facts: tuple[Fact, ...], label: str) -> str:
    return next((fact.value for fact in facts if fact.label == label), "")


def _figures(first: tuple[ComparisonRow, ...], second: tuple[ComparisonRow, ...]) -> Iterable[FigureChange]:
    sides = [{(row.method, row.probe): row for row in rows} for rows in (first, second)]
    # Accuracy is on clean images: the same in each of a model's rows, whatever the probe.
    clean = [{row.method: row.acc for row in reversed(rows)} for rows in (first, second)]
    keys = list(dict.fromkeys((row.method, row.probe) for row in (*first, *second)))
    seen: set[str] = set()
    for method, probe in keys:
        for measure, field in _MEASURES:
            if measure == "ACC" and method in seen:
                continue
            if measure == "ACC":
                pair = [side.get(method, Estimate()) for side in clean]
            else:
                pair = [
                    getattr(side[method, probe], field) if (method, probe) in side else Estimate() for side in sides
                ]
            if any(each.value is not None for each in pair):
                shown = "" if measure == "ACC" else probe or ""
                yield FigureChange(method, shown, measure, pair[0], pair[1], _change(*pair), _apart(*pair))
        seen.add(method)


def _change(first: Estimate, second: Estimate) -> float | None:
    return None if first.value is None or second.value is None else second.value - first.value


def _apart(first: Estimate, second: Estimate) -> bool | None:
    ends = (first.low, first.high, second.low, second.high)
    if any(end is None for end in ends):
        return None
    low_a, high_a, low_b, high_b = (float(end or 0.0) for end in ends)
    return high_a < low_b or high_b < low_a


def _rules(first: Report, second: Report) -> Iterable[RuleChange]:
    sides = [{row.rule: row for row in report.rules} for report in (first, second)]
    rows = []
    for rule in dict.fromkeys((*sides[0], *sides[1])):
        a, b = (side.get(rule) for side in sides)
        why = (b or a).why if (b or a) else ""  # type: ignore[union-attr]
        results = [(each.verdict, each.effect) if each else ("", "") for each in (a, b)]
        rows.append(RuleChange(rule, results[0][0], results[1][0], why, results[0][1], results[1][1]))
    return sorted(rows, key=lambda row: row.same)
