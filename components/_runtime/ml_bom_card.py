"""The model cards of an ML-BOM: metrics with intervals, what was done, data by digest, residual risk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from defense_core.evidence import UNPURIFIED
from defense_core.report_scan import control_part, scan_part
from defense_core.report_text import at, count, items_at, label, mappings_at, number, residual_risks, text

Evidences = Mapping[str, Mapping[str, Any]]
MAX_CLASSES = 1000


def model_card(evidence: Evidences) -> dict[str, Any]:
    """The card of the model that goes out; without a chosen model it holds no metrics, and says so."""
    method = text(at(evidence, "select", "results", "method"), 60)
    measured = at(evidence, f"evaluate.{method}", "results")
    card = _card(evidence, measured)
    card["modelParameters"]["datasets"] = _datasets(evidence, method)
    card["considerations"] = {
        "technicalLimitations": list(
            residual_risks(
                measured, scanned="scan" in evidence, exported=at(evidence, "export", "results"), method=method
            )
        ),
        "performanceTradeoffs": [*_tradeoffs(evidence, method, measured), *scan_sentences(evidence)],
    }
    card["properties"] = _method_properties(evidence, method)
    return card


def incoming_card(evidence: Evidences) -> dict[str, Any]:
    """The card of the model as it came in."""
    return _card(evidence, at(evidence, "evaluate.before", "results"))


def prop(name: str, value: str) -> dict[str, str]:
    """A CycloneDX property."""
    return {"name": name, "value": value}


def _card(evidence: Evidences, measured: Any) -> dict[str, Any]:
    fetch = at(evidence, "fetch", "results")
    shape = "×".join(str(each) for each in items_at(fetch, "input_size"))
    classes = count(at(fetch, "num_classes"))
    names = [text(each, 60) for each in items_at(fetch, "class_names")]
    return {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "image classification",
            "modelArchitecture": text(at(fetch, "architecture", "name"), 120) or "unknown",
            "inputs": [{"format": f"float32 tensor N×{shape or 'unknown'}"}],
            "outputs": [{"format": f"float32 logits N×{classes or 'unknown'}"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": list(_metrics(measured, names))},
    }


# -- figures ---------------------------------------------------------------------------


def _metrics(measured: Any, names: list[str]) -> Iterator[dict[str, Any]]:
    yield from _metric("accuracy", "clean images", at(measured, "acc"))
    for row in mappings_at(measured, "classes")[:MAX_CLASSES]:
        index = count(row.get("label"))
        if index is not None:
            name = names[index] if index < len(names) else f"class {index}"
            yield from _metric("accuracy", f"clean images of {name}", {"value": row.get("acc")})
    for probe in mappings_at(measured, "probes"):
        where = f"images with trigger {text(probe.get('name'), 60)} ({text(probe.get('kind'), 40)})"
        yield from _metric("attack success rate", where, probe.get("asr"))
        yield from _metric("robust accuracy", where, probe.get("ra"))
        yield from _metric("defence effectiveness rating", where, {"value": probe.get("der")})


def _metric(kind: str, where: str, estimate: Any) -> Iterator[dict[str, Any]]:
    """One metric; none where there is no figure. CycloneDX holds numbers as text."""
    value, low, high = (number(at(estimate, key)) for key in ("value", "low", "high"))
    if value is None:
        return
    metric: dict[str, Any] = {"type": kind, "value": f"{value:.6g}", "slice": where}
    if low is not None and high is not None:
        metric["confidenceInterval"] = {"lowerBound": f"{low:.6g}", "upperBound": f"{high:.6g}"}
    yield metric


def _tradeoffs(evidence: Evidences, method: str, measured: Any) -> list[str]:
    said = []
    drop, worst = number(at(measured, "acc_drop")), number(at(measured, "class_acc_drop_max"))
    if drop is not None and method != UNPURIFIED:
        change = f"lost {100 * drop:.1f}" if drop > 0 else f"gained {-100 * drop:.1f}"
        said.append(f"Purification with {label(method)} {change} points of accuracy on clean images.")
    if worst is not None and method != UNPURIFIED:
        said.append(f"The class that lost most lost {100 * worst:.1f} points.")
    for name, each in sorted(evidence.items()):
        control = at(evidence, f"purify.{name.partition('.')[2]}", "results", "control") is True
        accuracy = number(at(each, "results", "acc", "value"))
        if name.startswith("evaluate.") and control and accuracy is not None:
            success = number(at(each, "results", "asr_max", "value"))
            more = "" if success is None else f", attack success {100 * success:.1f} %"
            said.append(f"The control, {label(name.partition('.')[2])}: accuracy {100 * accuracy:.1f} %{more}.")
    return said


def scan_sentences(evidence: Evidences) -> list[str]:
    """What the scans before and after, and the positive control, said; empty where there was none."""
    said = []
    for step, what in (("scan", "incoming"), ("rescan", "outgoing")):
        scan = scan_part(evidence, step)
        if scan is not None:
            known = "" if scan.p_value is None else f", p = {scan.p_value:.3g}"
            why = f": {scan.sentence}" if scan.sentence else ""
            said.append(f"Backdoor scan of the {what} model: {scan.verdict}{known}{why}.")
    control = control_part(evidence)
    if control is not None:
        said.append(f"Positive control: {control.verdict}: {control.sentence}.")
    return said


# -- what was done, on which data ------------------------------------------------------


def _method_properties(evidence: Evidences, method: str) -> list[dict[str, str]]:
    purified = at(evidence, f"purify.{method}")
    named = {
        "method": method or "none",
        "method_summary": at(purified, "results", "summary"),
        "method_config": json.dumps(at(purified, "results", "config") or {}, sort_keys=True, default=str),
        "method_config_digest": at(purified, "inputs", "config"),
        "selection_rule": at(evidence, "select", "results", "rule"),
        "scan": at(evidence, "scan", "verdict"),
        "rescan": at(evidence, "rescan", "verdict"),
        "control": at(evidence, "control", "verdict"),
        "seed": at(purified, "environment", "seed"),
        "device": at(purified, "environment", "device"),
        "torch": at(purified, "environment", "torch"),
    }
    return [prop(f"quarantine:{name}", said) for name, value in named.items() if (said := text(value, 2000))]


def _datasets(evidence: Evidences, method: str) -> list[dict[str, Any]]:
    """Every set of images that the evidence names by digest; what the model was trained on is not known."""
    fetch = at(evidence, "fetch")
    used = (
        ("clean set", "trusted images, as they were fetched", at(fetch, "inputs", "clean"), "clean_images"),
        ("test set", "held-out images, as they were fetched", at(fetch, "inputs", "test"), "test_images"),
        (
            "purification splits",
            "what the method trained and chose on",
            at(evidence, f"purify.{method}", "inputs", "clean"),
            "",
        ),
        ("measured images", "what the figures rest on", at(evidence, f"evaluate.{method}", "inputs", "clean"), ""),
    )
    rows = []
    for name, what, value, counted in used:
        if known := text(value, 100):
            images = count(at(fetch, "results", counted)) if counted else None
            rows.append(
                {
                    "type": "dataset",
                    "name": name,
                    "description": f"{what}; {images} images" if images else what,
                    "contents": {"properties": [prop("quarantine:digest", known)]},
                }
            )
    return rows
