"""What the commands print: tables on a terminal, JSON for machines, errors as sentences."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from defense_core.config import to_mapping
from defense_core.errors import QuarantineError, visible
from defense_core.rounding import rounded

STYLES = {"PASS": "green", "FAIL": "red", "UNKNOWN": "yellow", "allow": "green", "deny": "red", "unknown": "yellow"}


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Tell the command, which otherwise would end with rich's exit code 1; here that means FAIL."""
        raise BrokenPipeError


out = _Console(highlight=False, soft_wrap=True)
err = _Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output; characters that it has no bytes for are escaped."""
    told = to_mapping(value)
    text = json.dumps(told, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(told, indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")


def print_error(error: QuarantineError, *, as_json: bool) -> None:
    """The error as a sentence on standard error, or as JSON on standard output."""
    if as_json:
        print_json(error.to_mapping())
    else:
        err.print(f"[red]error:[/red] {escape(str(error))}")


def table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table; cells are data, never markup."""
    drawn = Table(*headings, title=title, title_justify="left", header_style="bold")
    for row in rows:
        drawn.add_row(*(coloured(str(cell)) for cell in row))
    # Piped output has no width of its own; a table that is cut loses the figures.
    console = out if out.is_terminal else _Console(highlight=False, width=max(out.width, 160))
    console.print(drawn)


def coloured(text: str) -> str:
    """Verdicts in their colour, everything else as it is, but for what would steer the terminal."""
    style = STYLES.get(text)
    return f"[{style}]{text}[/{style}]" if style else escape(visible(text))


def print_comparison(evidence: Mapping[str, Mapping[str, Any]], *, selected: str | None) -> None:
    """ACC, ASR, RA and DER with intervals: before, after and control; or of one model, which has no such role."""
    # This brings torch, which takes seconds to import and half a gigabyte; every command imports this module.
    from defense_core.evaluate.compare import HEADINGS, compare

    measured = {
        name.removeprefix("evaluate."): each["results"]
        for name, each in evidence.items()
        if name.startswith("evaluate.") and each["results"]
    }
    rows = [row.cells() for row in compare(measured, selected=selected)]
    if len(measured) == 1:
        role = HEADINGS.index("role")
        headings, *rows = [(*cells[:role], *cells[role + 1 :]) for cells in (HEADINGS, *rows)]
        table("Measured (95 % intervals)", headings, rows)
    elif measured:
        table("Before, after and control (95 % intervals; * selected)", HEADINGS, rows)


def print_findings(findings: Sequence[Mapping[str, Any]]) -> None:
    """One row a rule; with what it does to the decision where the findings are a decision's."""
    decided = ["effect"] if any("effect" in each for each in findings) else []
    rows = [
        (
            each["rule"],
            each["verdict"],
            *(each.get(key, "–") for key in decided),
            shown(each["value"], each["bound"]),
            each["bound"],
            each["why"],
        )
        for each in findings
    ]
    if rows:
        table("Rules", ("rule", "verdict", *decided, "value", "bound", "why"), rows)


def shown(value: object, bound: str = "") -> str:
    """A value for a table cell, shortened; of a float so much that it shows on which side of ``bound`` it lies."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return rounded(value, bound)
    text = str(value) if not isinstance(value, (list, dict)) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "…"
