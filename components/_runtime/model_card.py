"""The model card of a registered version: Markdown, from the report, short enough for a description.

Like the tags it is a cache for people. What counts are the signed files of the version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from defense_core.report_text import label, percent, span, text

if TYPE_CHECKING:
    # The report brings matplotlib along, which a card has no use for.
    from defense_core.evaluate.compare import ComparisonRow, Estimate
    from defense_core.report import Report

MAX_CHARACTERS = 4800
"""MLflow takes 5000."""
MAX_ROWS, MAX_RISKS = 12, 8
_SPECIAL = re.compile(r"([\\`*_{}\[\]#!|<>~$&])")


def model_card(report: Report) -> str:
    """The card: verdict, origin, figures with intervals, residual risk, and how to check it."""
    parts = [
        f"**{_said(report.headline)}**",
        _facts(report),
        _figures(report),
        "\n".join(["### What this does not show", *(f"- {_said(risk)}" for risk in report.risks[:MAX_RISKS])]),
        "Check it: `quarantine verify models:/NAME/VERSION --public-key SIGNER.pub`. This text is a cache; the "
        "signed evidence is in the version's folder `evidence/`.",
    ]
    card = "\n\n".join(part for part in parts if part)
    return card if len(card) <= MAX_CHARACTERS else card[: MAX_CHARACTERS - 2].rstrip("\\") + " …"


def _facts(report: Report) -> str:
    shown = {"Address", "SHA-256", "Network", "Data", "Model", "ONNX", "Policy", "Policy digest", "Evidence digest"}
    rows = [fact for fact in (*report.came_in, *report.goes_out, *report.policy) if fact.label in shown]
    lines = [f"- {row.label}: {_code(row.value) if row.kind == 'code' else _said(row.value)}" for row in rows]
    if report.method:
        lines.append(f"- Purified with: {_said(label(report.method)) if report.purified else 'nothing'}")
    lines += [f"- {what}: {_said(said)}" for what, said in _scans(report)]
    return "\n".join(lines)


def _scans(report: Report) -> Iterator[tuple[str, str]]:
    for what, scan in (("Backdoor scan", report.scan), ("Scan of the outgoing model", report.rescan)):
        if scan is not None:
            known = "" if scan.p_value is None else f" (p = {scan.p_value:.3g})"
            yield what, f"{scan.verdict}{known} {scan.sentence}".strip()
    if report.control is not None:
        yield "Positive control", f"{report.control.verdict} {report.control.sentence}"


def _figures(report: Report) -> str:
    rows = [row for row in report.figures if row.selected or row.role in ("before", "control")][:MAX_ROWS]
    if not rows:
        return ""
    head = ["| Model | Trigger | Accuracy | Attack success |", "|---|---|---|---|"]
    return "\n".join(head + [_row(row) for row in rows])


def _row(row: ComparisonRow) -> str:
    name = label(row.method) + (" (chosen)" if row.selected else " (control)" if row.role == "control" else "")
    return f"| {_said(name)} | {_said(row.probe or 'none known')} | {_estimate(row.acc)} | {_estimate(row.asr)} |"


def _estimate(estimate: Estimate) -> str:
    interval = span(estimate)
    return percent(estimate.value) + (f" ({interval})" if interval else "")


def _said(value: str) -> str:
    """Text of a stranger, without a meaning in Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", text(value))


def _code(value: str) -> str:
    return "`" + text(value, 300).replace("`", "'") + "`"
