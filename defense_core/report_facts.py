"""What came into a run and what leaves it, as a report's lists of facts, from whatever evidence is there.

Evidence is read as untrusted, as in :mod:`defense_core.report_sections`.
"""

from __future__ import annotations

from typing import Any

from defense_core.evidence import UNPURIFIED
from defense_core.report_records import Fact
from defense_core.report_sections import Evidences
from defense_core.report_text import at, count, items_at, label, size, text


def came_in(evidence: Evidences) -> tuple[Fact, ...]:
    """Address, version and digest of what was fetched."""
    fetch = at(evidence, "fetch")
    results = at(fetch, "results")
    parameters = count(at(results, "parameters"))
    network = [
        text(at(results, "architecture", "name") or at(results, "architecture"), 80),
        f"{parameters:,} parameters".replace(",", " ") if parameters else "",
        size(at(results, "bytes")),
    ]
    rows = [
        Fact("Address", text(at(results, "uri"), 400), "code"),
        Fact("Version id", text(at(results, "version_id"), 200), "code"),
        Fact("Registered files lay at", text(at(results, "registered_source"), 400), "code"),
        Fact("SHA-256", _hex(at(fetch, "inputs", "source") or _any_source(evidence)), "code"),
        Fact("Licence", _licence(results)),
        Fact("Network", ", ".join(part for part in network if part)),
        Fact("Data", ", ".join(part for part in _data_facts(results) if part)),
    ]
    return tuple(row for row in rows if row.value)


def _licence(results: Any) -> str:
    why = text(at(results, "licence_why"), 300)
    return text(at(results, "licence"), 200) or (f"not known: {why}" if why else "")


def _data_facts(results: Any) -> tuple[str, ...]:
    shape = [str(each) for each in items_at(results, "input_size") if count(each) is not None]
    known, images = count(at(results, "num_classes")), count(at(results, "clean_images"))
    return (
        f"{'×'.join(shape)} pixels" if shape else "",
        f"{known} classes" if known else "",
        f"{images} clean images" if images else "",
    )


def goes_out(evidence: Evidences, *, outcome: str, method: str) -> tuple[Fact, ...]:
    """What leaves the run: the chosen model and its ONNX file, and where they are registered."""
    promotion = at(evidence, "promote", "results")
    registered = text(at(promotion, "name"), 120)
    version = text(at(promotion, "version"), 40)
    allowed = "released" if registered else "allowed, not registered"
    state = {"allow": allowed, "observe": "observed only"}.get(outcome, "held back")
    bundle = _hex(at(evidence, "select", "outputs", "model"))
    onnx = _hex(at(evidence, "export", "outputs", "onnx") or at(evidence, "export", "results", "sha256"))
    rows = [
        Fact("State", state if bundle else "nothing goes out"),
        Fact("Purified with", "nothing" if method == UNPURIFIED else label(method) if method else ""),
        Fact("Registered as", f"{registered}, version {version}" if registered else ""),
        Fact("Model", bundle, "code"),
        Fact("ONNX", onnx, "code"),
        Fact("Format", _onnx_facts(at(evidence, "export", "results"))),
        Fact("Signature", _signature(at(evidence, "sign", "results"))),
    ]
    return tuple(row for row in rows if row.value)


def _signature(signed: Any) -> str:
    """Whether the release was signed, and by which key; empty where it was not tried."""
    if at(signed, "signed") is not True:
        return "none" if at(signed, "signed") is False else ""
    key = text(at(signed, "key_id"), 100).removeprefix("sha256:")
    return f"model and {count(at(signed, 'statements')) or 0} statements, key {key[:16]}"


def _onnx_facts(results: Any) -> str:
    opset = count(at(results, "opset"))
    parts = [f"opset {opset}" if opset else "", size(at(results, "bytes"))]
    dynamic = at(results, "dynamic_batch")
    parts.append("any batch size" if dynamic is True else "fixed batch size" if dynamic is False else "")
    return ", ".join(part for part in parts if part)


def _hex(value: Any) -> str:
    return text(value, 100).removeprefix("sha256:")


def _any_source(evidence: Evidences) -> Any:
    return next((found for name in sorted(evidence) if (found := at(evidence, name, "inputs", "source"))), None)
