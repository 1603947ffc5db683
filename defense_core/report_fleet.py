"""The fleet: every version of every model on one page, with its decision, its trend, and drift.

Drift is where what is served and what was decided part: an alias points at a version that no allow
decision covers, a version's tags say something else than its own evidence, or its evidence does not give the
decision that it states.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from defense_core import report_text as words
from defense_core.config import canonical_json, to_mapping
from defense_core.evaluate.compare import ComparisonRow, Estimate
from defense_core.report import Report
from defense_core.report_charts import TrendPoint, trend_chart
from defense_core.report_page import safe_svg, script, template

FLEET_SCHEMA = 1
MAX_CHARTS = 12
NO_EVIDENCE = "no evidence"
NO_FIGURE = Estimate()


@dataclass(frozen=True)
class FleetVersion:
    """One version of one model, or one run that registered none.

    Attributes:
        model: name of the registered model, or of the file that came in.
        version: its number; empty for a run that registered none.
        aliases: names that point at it.
        outcome: as in a report, or ``no evidence`` where nothing covers it.
        headline: the verdict in one sentence.
        policy: name of the policy.
        method: the chosen method.
        started: ISO 8601, UTC; empty where it is not known.
        origin: address of what came in.
        accuracy, accuracy_before: on clean images.
        success, success_before: of the known trigger that works best.
        scan: verdict of the backdoor scan; empty where there was none.
        evidence_digest: what the decision rests on.
        problems: what does not fit together, one sentence each.
    """

    model: str
    version: str
    aliases: tuple[str, ...]
    outcome: str
    headline: str
    policy: str = ""
    method: str = ""
    started: str = ""
    origin: str = ""
    accuracy: Estimate = NO_FIGURE
    accuracy_before: Estimate = NO_FIGURE
    success: Estimate = NO_FIGURE
    success_before: Estimate = NO_FIGURE
    scan: str = ""
    evidence_digest: str = ""
    problems: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the page calls it."""
        return f"{self.model}, version {self.version}" if self.version else self.model

    @property
    def covered(self) -> bool:
        """Whether an allow decision covers it and nothing contradicts that."""
        return self.outcome == "allow" and not self.problems


@dataclass(frozen=True)
class Drift:
    """Where what is served and what was decided part."""

    where: str
    why: str


@dataclass(frozen=True)
class Fleet:
    """Everything that the page says."""

    headline: str
    versions: tuple[FleetVersion, ...]
    drift: tuple[Drift, ...]

    def to_mapping(self) -> dict[str, Any]:
        """JSON types."""
        return {"schema": FLEET_SCHEMA, **to_mapping(self)}

    def to_json(self) -> bytes:
        """Canonical bytes."""
        return canonical_json(self.to_mapping())


def version_of_report(
    report: Report, *, model: str, version: str = "", aliases: Sequence[str] = (), problems: Sequence[str] = ()
) -> FleetVersion:
    """A version as its evidence describes it.

    Args:
        report: made from the version's evidence.
        problems: what was found beside it, for example tags that contradict it.
    """
    chosen = [row for row in report.figures if row.selected]
    before = [row for row in report.figures if row.role == "before"]
    facts = {fact.label: fact.value for fact in (*report.policy, *report.came_in, *report.environment)}
    chain = [f"The chain of digests is broken at {', '.join(report.broken)}."] if report.broken else []
    return FleetVersion(
        model=words.text(model, 128),
        version=words.text(version, 40),
        aliases=tuple(sorted(words.text(alias, 80) for alias in aliases)),
        outcome=report.outcome,
        headline=report.headline,
        policy=facts.get("Policy", ""),
        method=report.method,
        started=facts.get("Started", ""),
        origin=facts.get("Address", ""),
        accuracy=chosen[0].acc if chosen else NO_FIGURE,
        accuracy_before=before[0].acc if before else NO_FIGURE,
        success=_worst(chosen),
        success_before=_worst(before),
        scan=report.scan.verdict if report.scan else "",
        evidence_digest=facts.get("Evidence digest", ""),
        problems=(*(words.text(each) for each in problems), *chain),
    )


def version_without_evidence(
    model: str, version: str, *, aliases: Sequence[str], problem: str, decided: bool = False
) -> FleetVersion:
    """A version that nothing covers; ``problem`` says why.

    Args:
        decided: whether it states a decision, which its evidence then does not give.
    """
    return FleetVersion(
        model=words.text(model, 128),
        version=words.text(version, 40),
        aliases=tuple(sorted(words.text(alias, 80) for alias in aliases)),
        outcome=NO_EVIDENCE,
        headline=words.text(problem),
        problems=(words.text(problem),) if decided else (),
    )


def build_fleet(versions: Iterable[FleetVersion]) -> Fleet:
    """The fleet: newest version of each model first, and what drifted."""
    rows = tuple(sorted(versions, key=_place))
    drift = tuple(_drift(rows))
    served = sum(bool(row.aliases) for row in rows)
    models = len({row.model for row in rows})
    counted = f"{_many(len(rows), 'version')} of {_many(models, 'model')}, {served} served by an alias"
    if not rows:
        headline = "No version was found."
    elif drift:
        headline = f"Drift in {_many(len({each.where for each in drift}), 'place')}: {counted}."
    else:
        headline = f"No drift: {counted}."
    return Fleet(headline, rows, drift)


def render_fleet(fleet: Fleet) -> str:
    """The page: one self-contained HTML document. Its one script filters the table and reaches nothing."""
    code = script("fleet.js")
    charts = {model: safe_svg(drawing) for model, drawing in _charts(fleet).items() if drawing}
    return template("fleet.html.j2").render(
        fleet=fleet,
        charts=charts,
        outcomes=sorted({row.outcome for row in fleet.versions}),
        models=sorted({row.model for row in fleet.versions}),
        script=Markup(code),  # noqa: S704 - a file of this package
        script_hash=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
    )


# -- parts -----------------------------------------------------------------------------


def _drift(rows: Iterable[FleetVersion]) -> Iterable[Drift]:
    for row in rows:
        served = ", ".join(row.aliases)
        if row.aliases and row.outcome != "allow":
            why = f"The alias {served} points at it, and no allow decision covers it: {row.headline}"
            yield Drift(row.name, why)
            if row.outcome == NO_EVIDENCE:
                continue  # its one problem is the headline
        for problem in row.problems:
            yield Drift(row.name, problem)


def _worst(rows: Iterable[ComparisonRow]) -> Estimate:
    measured = [row.asr for row in rows if row.asr.value is not None]
    return max(measured, key=lambda each: each.value or 0.0, default=NO_FIGURE)


def _place(row: FleetVersion) -> tuple[str, int, str]:
    number = int(row.version) if row.version.isdecimal() else 0
    # Times are ISO 8601: their letters, inverted, sort the newest first.
    return row.model, -number, "".join(chr(0x10FFFF - ord(sign)) for sign in row.started)


def _many(amount: int, what: str) -> str:
    return f"{amount} {what}{'' if amount == 1 else 's'}"


def _charts(fleet: Fleet) -> dict[str, str]:
    """A trend for each model with two versions that were measured; the models with most versions first."""
    by_model: dict[str, list[FleetVersion]] = {}
    for row in reversed(fleet.versions):
        if row.accuracy.value is not None:
            by_model.setdefault(row.model, []).append(row)
    ranked = sorted(by_model.items(), key=lambda item: (-len(item[1]), item[0]))
    return {
        model: trend_chart(
            [TrendPoint(row.version or row.started[:10], row.accuracy, row.success) for row in rows],
            name=f"trend{index}",
        )
        for index, (model, rows) in enumerate(ranked[:MAX_CHARTS])
        if len(rows) > 1
    }
