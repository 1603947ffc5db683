"""Results files and Markdown tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.results import FOLDER, runs_of

Rows = Sequence[Mapping[str, Any]]


def load(name: str) -> dict[str, Any] | None:
    """A results file; ``None`` where it has not been measured yet."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def grid(rows: Rows, columns: Sequence[str]) -> str:
    """Rows as a Markdown table of ``columns``."""
    return table(columns, ([text(row.get(column)) for column in columns] for row in rows))


def measured(name: str, columns: Sequence[str]) -> str:
    """All rows of a results file, with the command and the machine."""
    return figures(name, lambda rows: grid(rows, columns))


def figures(name: str, draw: Callable[[Rows], str]) -> str:
    """What ``draw`` makes of the rows of a results file, with the command and the machine."""
    content = load(name)
    return "Not yet measured.\n" if content is None else draw(content["rows"]) + source(content)


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    drawn = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    return "\n".join([*drawn, *("| " + " | ".join(line) + " |" for line in lines)]) + "\n"


def source(content: Mapping[str, Any]) -> str:
    """Where a results file comes from, run by run: the line under its table."""
    runs = dict.fromkeys(f"`{run['commit']}`, {run['device']}, {run['started'][:10]}" for run in runs_of(content))
    return f"\n`{content['command']}` at commit {'; '.join(runs)}.\n"


def text(value: Any) -> str:
    """A cell: three digits of a float, a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
