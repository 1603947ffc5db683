"""Tables of ``purification-cpu.json`` and ``purification-gpu.json`` for the docs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Rows = Sequence[Row]
Table = tuple[tuple[str, ...], list[list[str]]]

SELECTED = "**selected**"


def by_method(rows: Rows) -> Table:
    """Means over attacks and seeds of each method, and of whatever was selected; the best ASR first."""
    columns = ("method", "runs", "ACC drop", "ASR", "worst ASR", "RA", "DER", "seconds")
    lines = []
    for method, members in _methods(rows):
        worst = max(members, key=lambda row: float(row["asr_after"]))
        lines.append(
            [
                method,
                str(len(members)),
                f"{_mean(members, _drop):.3f}",
                f"{_mean(members, 'asr_after'):.3f}",
                f"{worst['asr_after']:.3f} ({worst['attack']})",
                f"{_mean(members, 'ra_after'):.3f}",
                f"{_mean(members, 'der'):.3f}",
                f"{_mean(members, 'seconds'):.1f}",
            ]
        )
    return columns, lines


def by_attack(rows: Rows) -> Table:
    """ASR after (ACC drop) of each method against each attack, means over seeds."""
    methods = list(_methods(rows))
    attacks = list(dict.fromkeys(row["attack"] for row in rows))
    columns = ("attack", "before", *(method for method, _ in methods))

    def cell(members: Rows) -> str:
        return f"{_mean(members, 'asr_after'):.2f} ({_mean(members, _drop):+.2f})" if members else "–"

    lines = []
    for attack in attacks:
        of_attack = [row for row in rows if row["attack"] == attack]
        cells = [cell([row for row in members if row["attack"] == attack]) for _, members in methods]
        lines.append([attack, f"{_mean(of_attack, 'asr_before'):.2f}", *cells])
    return columns, lines


def victims(rows: Rows) -> Table:
    """ACC, ASR and RA of the backdoored models."""
    first = {row["attack"]: row for row in reversed(rows)}
    order = dict.fromkeys(row["attack"] for row in rows)
    figures = ("acc_before", "asr_before", "ra_before")
    return ("attack", "ACC", "ASR", "RA"), [
        [name, *(f"{first[name][field]:.3f}" for field in figures)] for name in order
    ]


def part(rows: Rows, *, clean_fraction: float, architecture: str) -> list[Row]:
    """Rows of one network and size of the clean set that ended with a model."""
    return [
        row
        for row in rows
        if row["clean_fraction"] == clean_fraction and row["architecture"] == architecture and "diverged" not in row
    ]


def diverged(rows: Rows) -> list[Row]:
    """Rows whose method gave no model."""
    return [row for row in rows if "diverged" in row]


def _methods(rows: Rows) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    selected = [row for row in rows if row["selected"]]
    if selected:
        yield SELECTED, selected
    yield from sorted(groups.items(), key=lambda item: _mean(item[1], "asr_after"))


def _drop(row: Row) -> float:
    return float(row["acc_before"]) - float(row["acc_after"])


def _mean(rows: Rows, figure: str | Callable[[Row], float]) -> float:
    return statistics.fmean(float(row[figure]) if isinstance(figure, str) else figure(row) for row in rows)
