"""What a report says of the scans: of the file before it was loaded, of the network, and how sharp its minimum is.

The backdoor scan's evidence ``scan``, and ``rescan`` after purification, is read like this; whatever is missing is
left out::

    verdict, findings                  as in all evidence; the verdict in a sentence, then one finding per channel
    results.p_value                    of the combined test, in [0, 1]
    results.probability                calibrated P(backdoor), in [0, 1]
    results.channels[*]                {name, p_value, adjusted, targets}: adjusted for how many channels there are
    results.detectors[*].facts         of ``curvature``: log_trace, eigenvalue
    results.residuals[*]               of rescan: {detector, target, before, after, images} of each inverted trigger
    results.target_classes             labels of suspected target classes; of ``scan``: whose residuals count
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

from defense_core.report_text import at, count, items_at, mappings_at, number, plain_beside, text

MAX_PICTURES, MAX_PICTURE_BYTES = 24, 64_000
"""Together less than half of what a report may weigh, 3 MB, once they stand there as base64."""
_CURVATURE = {
    "log_trace": "Fisher trace in units of the weights, logarithm",
    "eigenvalue": "largest Hessian eigenvalue in units of the weights",
}
"""Facts of the detector ``curvature``."""
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
class ChannelRow:
    """One channel of the verdict: p-values in [0, 1], by rank and adjusted for the number of channels."""

    name: str
    verdict: str
    p_value: float | None
    adjusted: float | None
    suspects: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class ResidualRow:
    """What is left of one inverted trigger: its success, in [0, 1], on the incoming and on the outgoing model."""

    detector: str
    target: str
    before: float | None
    after: float | None
    images: int | None
    suspected: bool


@dataclass(frozen=True)
class ControlPart:
    """The positive control: a known backdoor in a copy of the model, scanned and purified like the model."""

    verdict: str
    sentence: str


@dataclass(frozen=True)
class Picture:
    """A picture; ``data`` is a PNG file as base64, ``alt`` says what it shows."""

    title: str
    note: str
    alt: str
    data: str


@dataclass(frozen=True)
class ScanPart:
    """A backdoor scan of a network; ``detectors`` are findings that belong to no channel, but for the sentence."""

    verdict: str
    sentence: str
    p_value: float | None
    probability: float | None
    suspects: tuple[str, ...]
    channels: tuple[ChannelRow, ...]
    detectors: tuple[DetectorRow, ...]
    residuals: tuple[ResidualRow, ...]
    pictures: tuple[Picture, ...]
    coverage: tuple[str, ...]


@dataclass(frozen=True)
class SharpnessRow:
    """One measure of how sharp the loss is around the weights; larger is sharper."""

    measure: str
    before: float | None
    after: float | None
    control: float | None


def scan_part(evidence: Mapping[str, Mapping[str, Any]], step: str = "scan") -> ScanPart | None:
    """The backdoor scan ``scan``, or ``rescan``; ``None`` where it is no part of the evidence."""
    if step not in evidence:
        return None
    scan = at(evidence, step)
    names = items_at(evidence, "fetch", "results", "class_names")
    findings = {text(row.get("rule"), 80): row for row in mappings_at(scan, "findings")[:100]}
    channels = tuple(_channel(row, step, findings, names) for row in mappings_at(scan, "results", "channels")[:20])
    told = {f"{step}.verdict", *(f"{step}.{each.name}" for each in channels)}
    suspected = {count(label) for label in items_at(evidence, "scan", "results", "target_classes")[:50]}
    return ScanPart(
        verdict=_verdict(at(scan, "verdict")),
        sentence=text(findings.get(f"{step}.verdict", {}).get("why")),
        p_value=number(at(scan, "results", "p_value")),
        probability=number(at(scan, "results", "probability")),
        suspects=tuple(_class_name(label, names) for label in items_at(scan, "results", "suspects")[:50]),
        channels=channels,
        detectors=tuple(_detector(name, row) for name, row in findings.items() if name not in told),
        residuals=tuple(_residual(row, names, suspected) for row in mappings_at(scan, "results", "residuals")[:50]),
        pictures=tuple(
            picture
            for row in mappings_at(scan, "results", "pictures")[:MAX_PICTURES]
            if (picture := _picture(row)) is not None
        ),
        coverage=tuple(text(each) for each in items_at(scan, "results", "coverage")[:20]),
    )


def control_part(evidence: Mapping[str, Mapping[str, Any]]) -> ControlPart | None:
    """The positive control; ``None`` where none is part of the evidence."""
    control = at(evidence, "control")
    said = [text(row.get("why")) for row in mappings_at(control, "findings")]
    sentence = text(at(control, "results", "sentence")) or (said[0] if said else "")
    return ControlPart(_verdict(at(control, "verdict")), sentence) if sentence else None


def sharpness(evidence: Mapping[str, Mapping[str, Any]], *, selected: str, control: str) -> tuple[SharpnessRow, ...]:
    """What the scans before and after measured around the weights, and ``results.sharpness`` of the evaluations,
    ``{measure: value}``, side by side; empty where nobody measured it."""
    before, after = (_curvature(at(evidence, step)) for step in ("scan", "rescan"))
    rows = [
        SharpnessRow(said, number(at(before, key)), number(at(after, key)), None) for key, said in _CURVATURE.items()
    ]
    measured = [at(evidence, f"evaluate.{name}", "results", "sharpness") for name in ("before", selected, control)]
    measures = {str(key) for each in measured if isinstance(each, Mapping) for key in each}
    rows += [
        SharpnessRow(text(measure, 60).replace("_", " "), *(number(at(each, measure)) for each in measured))
        for measure in sorted(measures)[:20]
    ]
    return tuple(row for row in rows if (row.before, row.after, row.control) != (None, None, None))


def _curvature(scan: Any) -> Any:
    """Facts of the detector ``curvature``, if it could measure."""
    found = (each for each in mappings_at(scan, "results", "detectors") if each.get("name") == "curvature")
    facts = at(next(found, None), "facts")
    return facts if at(facts, "measured") is True else None


def artifact_scan_sentence(evidence: Mapping[str, Mapping[str, Any]]) -> str:
    """What was said of the file before it was loaded; empty where nothing was."""
    scan = at(evidence, "fetch", "results", "artifact_scan")
    verdict = text(at(scan, "verdict"), 40)
    files, found = count(at(scan, "files")), len(items_at(scan, "findings"))
    if not verdict:
        return ""
    looked = f"{files} file{'' if files == 1 else 's'}" if files is not None else "files"
    return f"{verdict}: {looked} looked at before loading, {found or 'no'} finding{'' if found == 1 else 's'}"


def _channel(
    row: Mapping[str, Any], step: str, findings: Mapping[str, Mapping[str, Any]], names: list[Any]
) -> ChannelRow:
    name = text(row.get("name"), 60)
    finding = findings.get(f"{step}.{name}", {})
    return ChannelRow(
        name=name,
        verdict=_verdict(finding.get("verdict")),
        p_value=number(row.get("p_value")),
        adjusted=number(row.get("adjusted")),
        suspects=tuple(_class_name(label, names) for label in items_at(row, "targets")[:20]),
        why=text(finding.get("why")),
    )


def _detector(name: str, row: Mapping[str, Any]) -> DetectorRow:
    return DetectorRow(
        name=name,
        verdict=text(row.get("verdict"), 10),
        value=plain_beside(row.get("value"), text(row.get("bound"), 120)),
        bound=text(row.get("bound"), 120),
        why=text(row.get("why")),
    )


def _residual(row: Mapping[str, Any], names: list[Any], suspected: set[int | None]) -> ResidualRow:
    label = row.get("target")
    return ResidualRow(
        detector=text(row.get("detector"), 60),
        target=_class_name(label, names),
        before=number(row.get("before")),
        after=number(row.get("after")),
        images=count(row.get("images")),
        suspected=count(label) is not None and count(label) in suspected,
    )


def _verdict(value: Any) -> str:
    shown = text(value, 10)
    return shown if shown in ("PASS", "FAIL", "UNKNOWN") else "UNKNOWN"


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
