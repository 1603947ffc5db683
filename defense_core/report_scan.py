"""What a report says of the scans: of the file before it was loaded, of the network, and how sharp its minimum is.

The backdoor scan's evidence ``scan`` is read like this; whatever is missing is left out::

    verdict, findings                  as in all evidence; one finding per detector
    results.p_value                    of the combined test, in [0, 1]
    results.suspects                   labels of suspected target classes
    results.pictures[*]                {title, note, alt, png}: inverted triggers and the like; png is base64
    results.coverage[*]                sentences: what the scan would have found, and what it says nothing about
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from defense_core.report_text import at, count, items_at, mappings_at, number, plain, text

MAX_PICTURES, MAX_PICTURE_BYTES = 24, 64_000
"""Together less than half of what a report may weigh, 3 MB, once they stand there as base64."""
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class DetectorRow:
    """One detector's answer."""

    name: str
    verdict: str
    value: str
    bound: str
    why: str


@dataclass(frozen=True)
class Picture:
    """A picture; ``data`` is a PNG file as base64, ``alt`` says what it shows."""

    title: str
    note: str
    alt: str
    data: str


@dataclass(frozen=True)
class ScanPart:
    """The backdoor scan of the network."""

    verdict: str
    p_value: float | None
    suspects: tuple[str, ...]
    detectors: tuple[DetectorRow, ...]
    pictures: tuple[Picture, ...]
    coverage: tuple[str, ...]


@dataclass(frozen=True)
class SharpnessRow:
    """One measure of how sharp the loss is around the weights; larger is sharper."""

    measure: str
    before: float | None
    after: float | None
    control: float | None


def scan_part(evidence: Mapping[str, Mapping[str, Any]]) -> ScanPart | None:
    """The backdoor scan; ``None`` where none is part of the evidence."""
    if "scan" not in evidence:
        return None
    scan = at(evidence, "scan")
    names = items_at(evidence, "fetch", "results", "class_names")
    verdict = text(at(scan, "verdict"), 10)
    return ScanPart(
        verdict=verdict if verdict in ("PASS", "FAIL", "UNKNOWN") else "UNKNOWN",
        p_value=number(at(scan, "results", "p_value")),
        suspects=tuple(_class_name(label, names) for label in items_at(scan, "results", "suspects")[:50]),
        detectors=tuple(
            DetectorRow(
                name=text(row.get("rule"), 80),
                verdict=text(row.get("verdict"), 10),
                value=plain(row.get("value")),
                bound=text(row.get("bound"), 120),
                why=text(row.get("why")),
            )
            for row in mappings_at(scan, "findings")[:100]
        ),
        pictures=tuple(
            picture
            for row in mappings_at(scan, "results", "pictures")[:MAX_PICTURES]
            if (picture := _picture(row)) is not None
        ),
        coverage=tuple(text(each) for each in items_at(scan, "results", "coverage")[:20]),
    )


def sharpness(evidence: Mapping[str, Mapping[str, Any]], *, selected: str, control: str) -> tuple[SharpnessRow, ...]:
    """``results.sharpness`` of the evaluations, ``{measure: value}``, side by side; empty where nobody measured it."""
    measured = [at(evidence, f"evaluate.{name}", "results", "sharpness") for name in ("before", selected, control)]
    measures = {str(key) for each in measured if isinstance(each, Mapping) for key in each}
    rows = [
        SharpnessRow(text(measure, 60).replace("_", " "), *(number(at(each, measure)) for each in measured))
        for measure in sorted(measures)[:20]
    ]
    return tuple(row for row in rows if (row.before, row.after, row.control) != (None, None, None))


def artifact_scan_sentence(evidence: Mapping[str, Mapping[str, Any]]) -> str:
    """What was said of the file before it was loaded; empty where nothing was."""
    scan = at(evidence, "fetch", "results", "artifact_scan")
    verdict = text(at(scan, "verdict"), 40)
    files, found = count(at(scan, "files")), len(items_at(scan, "findings"))
    if not verdict:
        return ""
    looked = f"{files} file{'' if files == 1 else 's'}" if files is not None else "files"
    return f"{verdict}: {looked} looked at before loading, {found or 'no'} finding{'' if found == 1 else 's'}"


def _class_name(label: Any, names: list[Any]) -> str:
    index = count(label)
    return text(names[index], 40) if index is not None and index < len(names) else f"class {text(label, 20)}"


def _picture(row: Mapping[str, Any]) -> Picture | None:
    """A picture, if it is a PNG of bearable size: only what this very check has decoded goes into the page."""
    data = row.get("png")
    if not isinstance(data, str) or len(data) > 2 * MAX_PICTURE_BYTES:
        return None
    try:
        raw = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not raw.startswith(_PNG) or len(raw) > MAX_PICTURE_BYTES:
        return None
    title = text(row.get("title"), 80)
    alt = text(row.get("alt"), 300) or title or "Picture without a description"
    return Picture(title, text(row.get("note"), 200), alt, base64.b64encode(raw).decode())
