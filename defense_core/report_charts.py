"""Charts as inline SVG: drawn by matplotlib, coloured by the page, the same bytes for the same figures.

Colours are written as place-holders and become the page's own variables, so one drawing serves the light
and the dark page and print. Text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from defense_core.evaluate.compare import ComparisonRow, Estimate
from defense_core.report_records import ClassRow, LayerChange, Training
from defense_core.report_text import label

INK, MUTED, LINE, ACCENT, SOFT, CONTROL, CARD = (f"#0{n}0{n + 1}0{n + 2}" for n in range(1, 8))
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    ACCENT: "accent",
    SOFT: "soft",
    CONTROL: "control",
    CARD: "card",
}

WIDTH_IN = 5.6
"""At 72 px an inch this is as wide as half a page; a phone shows it at four fifths."""

MAX_CLASSES, MAX_LAYERS, MAX_NAME = 24, 40, 26
"""What one chart holds; the tables beside it hold everything."""

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quarantine",
    "font.size": 11.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "text.parse_math": False,
    "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": False,
    "path.simplify": False,
}
_MARKS = {"before": ("o", CARD, MUTED), "after": ("o", ACCENT, ACCENT), "control": ("D", CARD, CONTROL)}


def estimates_chart(rows: Sequence[tuple[ComparisonRow, Estimate]], *, name: str, axis: str, probes: bool) -> str:
    """One dot a model (and probe) with its interval, best read from top to bottom.

    Args:
        rows: rows of the comparison and the figure to draw.
        name: unique among the charts of a page.
        axis: what the figure is.
        probes: whether the probe belongs to a row's name.
    """
    shown = [(row, estimate) for row, estimate in rows if estimate.value is not None]
    if not shown:
        return ""

    def draw(axes: Any) -> None:
        for place, (row, each) in enumerate(shown):
            mark, fill, edge = _MARKS[row.role]
            if each.low is not None and each.high is not None:
                axes.plot(
                    [100 * each.low, 100 * each.high], [place, place], color=edge, linewidth=2, solid_capstyle="butt"
                )
            value = 100 * float(each.value or 0)
            axes.plot(
                [value], [place], mark, markersize=8, markerfacecolor=fill, markeredgecolor=edge, markeredgewidth=2
            )
            side = -1 if value > 50 else 1
            ends = (each.high if side > 0 else each.low, each.value)
            start = 100 * float(next(end for end in ends if end is not None)) + side * 3
            axes.text(start, place, f"{value:.1f} %", ha="left" if side > 0 else "right", va="center", fontsize=11)
        names = [label(row.method) + (f", {row.probe}" if probes and row.probe else "") for row, _ in shown]
        axes.set_yticks(range(len(shown)), [_short(each) for each in names])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(-2, 102)
        axes.set_xticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel(axis)

    return _svg(draw, name=name, height_in=0.9 + 0.36 * len(shown))


def classes_chart(rows: Sequence[ClassRow], *, name: str) -> str:
    """Accuracy before (ring) and after (dot) per class, largest loss first."""
    shown = [row for row in rows if row.after is not None]
    shown = sorted(shown, key=lambda row: (-(row.drop or 0.0), row.label))[:MAX_CLASSES]
    if not shown:
        return ""

    def draw(axes: Any) -> None:
        for place, row in enumerate(shown):
            after = 100 * float(row.after or 0)
            if row.before is not None:
                before = 100 * row.before
                axes.plot([before, after], [place, place], color=SOFT, linewidth=4, solid_capstyle="butt")
                axes.plot(
                    [before],
                    [place],
                    "o",
                    markersize=8,
                    markerfacecolor=CARD,
                    markeredgecolor=MUTED,
                    markeredgewidth=2,
                )
            axes.plot([after], [place], "o", markersize=7, color=ACCENT)
        axes.set_yticks(range(len(shown)), [_short(row.name) for row in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        lowest = min(100 * min(v for v in (row.before, row.after) if v is not None) for row in shown)
        axes.set_xlim(max(-2.0, lowest - 8), 102)
        axes.set_xlabel("accuracy, %   (ring: before, dot: after)")

    return _svg(draw, name=name, height_in=0.9 + 0.29 * len(shown))


def training_chart(trained: Training, *, name: str) -> str:
    """Loss by epoch, one stretch a phase, laid end to end."""
    curves = [curve for curve in trained.curves if any(point.loss is not None for point in curve.points)]
    if not curves:
        return ""

    def draw(axes: Any) -> None:
        start = 0.0
        for index, curve in enumerate(curves):
            known = [
                (start + place, point.loss) for place, point in enumerate(curve.points, 1) if point.loss is not None
            ]
            points = _thinned(known)
            colour = (ACCENT, MUTED, CONTROL)[index % 3]
            style = ("-", "--", ":")[index % 3]
            axes.plot([x for x, _ in points], [y for _, y in points], style, color=colour, linewidth=2)
            axes.plot([points[-1][0]], [points[-1][1]], "o", color=colour, markersize=5)
            end = start + len(curve.points)
            if index:
                axes.axvline(start + 0.5, color=LINE, linewidth=1)
            axes.text((start + end + 1) / 2, 1.02, _short(curve.phase), transform=axes.get_xaxis_transform(),
                      ha="center", va="bottom", fontsize=11, color=MUTED)  # fmt: skip
            start = end
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss")
        axes.set_xlim(0.5, start + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.margins(y=0.12)

    return _svg(draw, name=name, height_in=2.5)


def layers_chart(rows: Sequence[LayerChange], *, name: str) -> str:
    """Units changed per layer, first layer on top; the pale bar is the whole layer where its size is known."""
    shown = list(rows)
    if len(shown) > MAX_LAYERS:
        kept = set(sorted(range(len(shown)), key=lambda index: -shown[index].units)[:MAX_LAYERS])
        shown = [row for index, row in enumerate(shown) if index in kept]
    if not shown:
        return ""

    def draw(axes: Any) -> None:
        places = range(len(shown))
        if all(row.total for row in shown):
            axes.barh(places, [row.total or 0 for row in shown], height=0.66, color=SOFT)
        axes.barh(places, [row.units for row in shown], height=0.66, color=ACCENT)
        longest = max(max(row.units, row.total or 0) for row in shown) or 1
        for place, row in enumerate(shown):
            of = f" of {row.total}" if row.total else ""
            axes.text(
                max(row.units, row.total or 0) + longest * 0.02, place, f"{row.units}{of}", va="center", fontsize=10.5
            )
        axes.set_yticks(places, [_short(row.layer.removesuffix(".weight")) for row in shown])
        axes.set_ylim(len(shown) - 0.4, -0.6)
        axes.set_xlim(0, longest * 1.25)
        axes.set_xlabel("units")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return _svg(draw, name=name, height_in=0.9 + 0.27 * len(shown))


@dataclass(frozen=True)
class TrendPoint:
    """One version in the order of time: its name, accuracy and attack success."""

    name: str
    accuracy: Estimate
    success: Estimate


def trend_chart(rows: Sequence[TrendPoint], *, name: str) -> str:
    """Accuracy (line, dots) and attack success (dashed, diamonds) of a model's versions, oldest left."""
    shown = list(rows)[-MAX_LAYERS:]
    if not any(row.accuracy.value is not None for row in shown):
        return ""

    def draw(axes: Any) -> None:
        for pick, mark, style, colour in (("accuracy", "o", "-", ACCENT), ("success", "D", "--", CONTROL)):
            found = [(place, getattr(row, pick)) for place, row in enumerate(shown)]
            found = [(place, each) for place, each in found if each.value is not None]
            for place, each in found:
                if each.low is not None and each.high is not None:
                    axes.plot([place, place], [100 * each.low, 100 * each.high], color=colour, linewidth=2)
            values = [100 * each.value for _, each in found]
            axes.plot([place for place, _ in found], values, style, marker=mark, markersize=6, color=colour)
        axes.set_xticks(range(len(shown)), [_short(row.name) for row in shown])
        if len(shown) > 8:
            axes.tick_params(axis="x", labelrotation=90)
        axes.set_xlim(-0.4, len(shown) - 0.6)
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100], ["0", "25", "50", "75", "100 %"])
        axes.set_xlabel("version   (dots: accuracy, diamonds: attack success)")

    return _svg(draw, name=name, height_in=2.6)


def _svg(draw: Any, *, name: str, height_in: float) -> str:
    # Labels may hold any script; matplotlib only needs a glyph to measure, and the page brings its own font.
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(WIDTH_IN, height_in), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="x", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        draw(axes)
        for item in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            item.set_parse_math(False)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _for_page(buffer.getvalue(), name)


def _for_page(drawing: str, name: str) -> str:
    """The ``svg`` element alone, with the page's colours and font, and identifiers of its own."""
    body = drawing[drawing.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--sans)", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = body.replace('href="#', f'href="#{name}-').replace("xlink:href", "href")
    body = re.sub(r' xmlns(:\w+)?="[^"]*"', "", body)
    return re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true" focusable="false">', body, count=1
    )


def _thinned(points: Sequence[Any], most: int = 400) -> Sequence[Any]:
    """Every so many points, at most ``most``, the last one among them."""
    every = -(-len(points) // most)
    return points if every <= 1 else points[(len(points) - 1) % every :: every]


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else name[: MAX_NAME - 1] + "…"
