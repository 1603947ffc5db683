"""Evidence mappings: how a step writes down what went in, what came out and what it found."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from components._runtime.pod import accelerator
from components._runtime.small_files import read_small
from defense_core import __version__
from defense_core.config import canonical_json, to_mapping
from defense_core.errors import AccessDenied, EvidenceMismatch, EvidenceMissing
from defense_core.evidence import EVIDENCE_SCHEMA
from defense_core.files import reading, write_atomic
from defense_core.verdict import Finding, Verdict

DECISION, POLICY = "decision.json", "policy.json"
"""Files that lie beside the evidence in a decision's folder."""
REPORT_PAGE, REPORT_DATA = "report.html", "report.json"
"""The report, which lies beside the evidence in a run's store."""
PROMOTION = "promotion.json"
"""The signed statement of the promotion, which lies there too: it is made after the release."""
BESIDE = (DECISION, POLICY, REPORT_DATA, PROMOTION)
_SHAPE: Mapping[str, type] = {"inputs": dict, "outputs": dict, "results": dict, "findings": list}
_NAMES: Mapping[type, str] = {dict: "an object", list: "a list"}
_OF_ATTEMPT = ("started", "seconds", "accelerator")
IMAGE_DIGEST_VARIABLE = "QUARANTINE_IMAGE_DIGEST"
"""Environment variable, set where the image runs: the image's own digest, ``sha256:<hex>``."""
MAX_DEPTH = 100
"""Levels of lists and objects in evidence; steps write about ten, and what walks it calls itself for each."""
FAILED = ".failed.json"
"""How the name of a failure record ends."""


@dataclass(frozen=True)
class Clock:
    """When a step began.

    Attributes:
        started: ISO 8601, UTC, whole seconds.
        origin_s: monotonic seconds.
    """

    started: str
    origin_s: float

    @classmethod
    def start(cls) -> Clock:
        """A clock that starts now."""
        return cls(datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic())

    def environment(self, *, device: str, seed: int) -> dict[str, Any]:
        """The ``environment`` block: ``device`` is what the step ran on, ``accelerator`` what its pod was given (or
        null), ``seconds`` the time since the start."""
        return {
            "version": __version__,
            "torch": metadata.version("torch"),
            "device": device,
            "accelerator": accelerator(),
            "seed": seed,
            "image": os.environ.get(IMAGE_DIGEST_VARIABLE) or None,
            "started": self.started,
            "seconds": round(time.monotonic() - self.origin_s, 3),
        }


def repeats(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two evidence mappings say the same and differ at most in when, how long and on which accelerator, which
    no attempt of a step shares with another."""
    return _without_attempt(one) == _without_attempt(other)


def _without_attempt(evidence: Mapping[str, Any]) -> dict[str, Any]:
    environment = evidence.get("environment")
    if not isinstance(environment, Mapping):
        return dict(evidence)
    return {**evidence, "environment": {key: value for key, value in environment.items() if key not in _OF_ATTEMPT}}


def compose(
    name: str,
    clock: Clock,
    *,
    inputs: Mapping[str, Any],
    results: Mapping[str, Any],
    outputs: Mapping[str, Any] | None = None,
    verdict: Verdict = Verdict.PASS,
    findings: Sequence[Finding] = (),
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """An evidence mapping, schema 1, JSON types only.

    Args:
        name: ``fetch``, ``purify.tsbd``, ``evaluate.before``…; the step is what precedes the dot.
        inputs: digests of what went in; ``source`` is that of the fetched artifact.
        outputs: digests of what came out.
    """
    evidence: dict[str, Any] = to_mapping(
        {
            "schema": EVIDENCE_SCHEMA,
            "step": name.partition(".")[0],
            "name": name,
            "inputs": inputs,
            "outputs": outputs or {},
            "results": results,
            "verdict": verdict,
            "findings": list(findings),
            "environment": clock.environment(device=device, seed=seed),
        }
    )
    return evidence


def write_evidence(path: Path, evidence: Mapping[str, Any]) -> None:
    """Write canonical JSON to ``path``, whole or not at all."""
    write_atomic(path, canonical_json(evidence) + b"\n")


def read_evidence(path: Path) -> dict[str, Any]:
    """One evidence file.

    Raises:
        EvidenceMissing: there is no such file.
        AccessDenied: this account may not read it.
        EvidenceMismatch: it is no file, too large, damaged, or of another schema.
    """
    with reading(path, EvidenceMismatch, "a readable file", denied=AccessDenied):
        if not Path(path).exists():
            raise EvidenceMissing(f"evidence {path} is missing", hint="Run the step that writes it")
        data = read_small(Path(path))
    return parse_evidence(data, str(path))


def parse_evidence(data: bytes, where: str) -> dict[str, Any]:
    """Evidence from bytes; ``where`` names them in messages. Raises as :func:`read_evidence`."""
    try:
        mapping = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, "JSON", str(error)) from error
    if is_deep(mapping):
        raise _damaged(where, f"lists and objects in {MAX_DEPTH} levels at most", "more")
    if not isinstance(mapping, dict) or mapping.get("schema") != EVIDENCE_SCHEMA or "name" not in mapping:
        raise _damaged(where, f"an object of schema {EVIDENCE_SCHEMA} with a name", str(mapping)[:80])
    for key, kind in _SHAPE.items():
        if not isinstance(mapping.get(key, kind()), kind):
            raise _damaged(where, f"{_NAMES[kind]} as {key}", type(mapping[key]).__name__)
    return mapping


def read_folder(folder: Path) -> dict[str, dict[str, Any]]:
    """Every evidence file ``<name>.json`` of a folder, by name; what lies beside them is left out.

    Raises:
        EvidenceMissing: the folder is not there, or holds none.
        AccessDenied: this account may not read it.
        EvidenceMismatch: a file is damaged or stands under another name.
    """
    folder = Path(folder)
    with reading(folder, EvidenceMissing, "a readable folder", denied=AccessDenied):
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    kept = (name for name in names if name.endswith(".json") and name not in BESIDE and not name.endswith(FAILED))
    found = {name.removesuffix(".json"): read_evidence(folder / name) for name in kept}
    for name, evidence in found.items():
        require_named(evidence, name, str(folder / f"{name}.json"))
    if not found:
        raise EvidenceMissing(
            f"no evidence in {folder}", expected="<step>.json files", hint="Name the run's evidence folder"
        )
    return found


def require_named(evidence: Mapping[str, Any], name: str, where: str) -> None:
    """Refuse evidence that calls itself otherwise than its file is called: what reads it makes paths and names of both.

    Raises:
        EvidenceMismatch: it does.
    """
    if evidence["name"] != name:
        raise _damaged(where, f"evidence of {name}", f"evidence of {evidence['name']}"[:200])


def is_absent(path: Path) -> bool:
    """Whether ``path`` is empty: what a step leaves in the place of evidence where nothing was asked of it."""
    return path.is_file() and not path.stat().st_size


def why_of(evidence: Mapping[str, Any]) -> str:
    """What the findings of ``evidence`` say, in one line; empty where it has none."""
    return "; ".join(str(finding["why"]) for finding in evidence["findings"])


def started_of(evidence: Mapping[str, Any]) -> str | None:
    """When the step that ``evidence`` speaks of began, as it says; ``None`` where it does not."""
    environment = evidence.get("environment")
    started = environment.get("started") if isinstance(environment, Mapping) else None
    return started if isinstance(started, str) else None


def source_of(evidence: Mapping[str, Any]) -> str:
    """The digest of the fetched artifact that ``evidence`` speaks of."""
    return str(evidence["inputs"]["source"])


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other deeper than :data:`MAX_DEPTH`."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        if not inside:
            return False
        level = [item for items in inside for item in items]
    return True


def _damaged(where: str, expected: str, got: str) -> EvidenceMismatch:
    return EvidenceMismatch(
        f"evidence {where} is damaged", expected=expected, got=got, hint="Run the step again; never edit evidence"
    )
