"""Tables of ``purification-cpu.json`` and ``purification-gpu.json`` for the docs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.purification import APART, CANDIDATES, comparable, completed, group_of, grouped
from defense_core.purify.soup import METHOD, SoupConfig

Row = Mapping[str, Any]
Rows = Sequence[Row]
Table = tuple[tuple[str, ...], list[list[str]]]

SELECTED = "**selected**"
SETS = (
    CANDIDATES,
    APART,
    ("tsbd", "fip", "fast_fip", "nft", "ngf"),
    ("tsbd", "nft", "ngf"),
    ("fast_fip", "nft", "ngf"),
    ("nft", "ngf"),
)
"""What else a run might be asked for; the first is the default of ``quarantine run``."""
MEANS = ("runs", "ACC drop", "ASR", "worst ASR", "RA", "DER", "seconds")


def by_method(rows: Rows) -> Table:
    """Means over attacks and seeds of each method, and of whatever was selected; the best ASR first."""
    return ("method", *MEANS), [[method, *means(members)] for method, members in _methods(rows)]


def means(members: Rows) -> list[str]:
    """Cells of ``MEANS``."""
    worst = max(members, key=lambda row: float(row["asr_after"]))
    return [
        str(len(members)),
        f"{_mean(members, _drop):.3f}",
        f"{_mean(members, 'asr_after'):.3f}",
        f"{worst['asr_after']:.3f} ({worst['attack']})",
        f"{_mean(members, 'ra_after'):.3f}",
        f"{_mean(members, 'der'):.3f}",
        f"{_mean(members, 'seconds'):.1f}",
    ]


def by_set(rows: Rows) -> Table:
    """Means of what is chosen among the methods of each set, by the rule of a run with these methods."""
    chosen = {names: selected(completed(rows, names), names) for names in SETS}
    lines = [[", ".join(names), *means(members)] for names, members in chosen.items() if members]
    return ("chosen among", *MEANS), lines


def on_same_runs(rows: Rows, names: Sequence[str] = CANDIDATES) -> Table:
    """Means of each of ``names``, and of what is chosen among the first of them and among all, over the same runs."""
    rows = [row for members in _whole(rows, names).values() for row in members]
    parts = {f"{SELECTED} of {len(some)}": selected(completed(rows, some), some) for some in (names[:-1], names)}
    parts |= {name: [row for row in rows if row["method"] == name] for name in names}
    return ("method", *MEANS), [[name, *means(members)] for name, members in parts.items() if members]


def selected(rows: Rows, candidates: Sequence[str] = CANDIDATES) -> list[Row]:
    """The rows that were chosen, each with the seconds of all that it was chosen among: what such a run costs.

    Only where all of them ended with a model and were asked about the same perturbations: a choice among fewer is
    another one.
    """
    seconds = {group: _cost(members) for group, members in _whole(rows, candidates).items()}
    return [{**row, "seconds": seconds[group_of(row)]} for row in rows if row["selected"] and group_of(row) in seconds]


def _cost(members: Rows) -> float:
    """Seconds of a run with the methods of ``members``, which mixes a soup of what the others made."""
    seconds = {row["method"]: float(row["seconds"]) for row in members}
    averaged = SoupConfig().members
    if METHOD.name in seconds and set(averaged) <= set(seconds):
        seconds[METHOD.name] = max(0.0, seconds[METHOD.name] - sum(seconds[name] for name in averaged))
    return sum(seconds.values())


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


def victims(rows: Rows, floor: Mapping[str, Row]) -> Table:
    """ACC, ASR and RA of the backdoored models, what the same triggers do to a clean one, and the means.

    Args:
        floor: rows of ``floor.json`` by attack.
    """
    first = {row["attack"]: row for row in reversed(rows)}
    names = list(dict.fromkeys(row["attack"] for row in rows))

    def cells(some: Sequence[str]) -> list[str]:
        poisoned = (
            f"{_mean([first[name] for name in some], f'{figure}_before'):.3f}" for figure in ("acc", "asr", "ra")
        )
        if not all(name in floor for name in some):
            return [*poisoned, "–", "–"]
        return [*poisoned, *(f"{_mean([floor[name] for name in some], figure):.3f}" for figure in ("asr", "ra"))]

    columns = ("attack", "ACC", "ASR", "RA", "ASR on a clean model", "RA there")
    return columns, [*([name, *cells([name])] for name in names), ["mean", *cells(names)]]


def part(rows: Rows, *, clean_fraction: float, architecture: str) -> list[Row]:
    """Rows of one network and size of the clean set that ended with a model."""
    return [
        row
        for row in rows
        if row["clean_fraction"] == clean_fraction and row["architecture"] == architecture and "diverged" not in row
    ]


def _whole(rows: Rows, names: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of ``names`` by group, where all of them were asked about the same perturbations."""
    found = {group: comparable(members, names) for group, members in grouped(rows).items()}
    return {group: members for group, members in found.items() if len(members) == len(names)}


def _methods(rows: Rows) -> Iterator[tuple[str, list[Row]]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["method"], []).append(row)
    chosen = selected(rows)
    if chosen:
        yield SELECTED, chosen
    yield from sorted(groups.items(), key=lambda item: _mean(item[1], "asr_after"))


def _drop(row: Row) -> float:
    return float(row["acc_before"]) - float(row["acc_after"])


def _mean(rows: Rows, figure: str | Callable[[Row], float]) -> float:
    return statistics.fmean(float(row[figure]) if isinstance(figure, str) else figure(row) for row in rows)
