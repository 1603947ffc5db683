"""How to do a run again, as commands that can be pasted into a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from defense_core.config import to_mapping
from defense_core.purify import METHODS
from defense_core.report_text import at, command, mappings_at, number, text

SCAN_RATE = 0.05
"""What ``quarantine scan`` takes where nobody says otherwise."""
SHIPPED_POLICIES = ("strict", "standard", "observe")


@dataclass(frozen=True)
class Command:
    """A command and what it is for."""

    why: str
    line: str


def commands(evidence: Mapping[str, Mapping[str, Any]], *, policy: str) -> tuple[Command, ...]:
    """Commands that repeat the run and check its parts.

    Places of the clean set, probes and policy are not in the evidence, only their digests: they
    appear as names to be replaced.
    """
    fetch = at(evidence, "fetch", "results")
    found = []
    if address := _address(fetch):
        found.append(Command("Run the whole pipeline again on the same bytes", _run(evidence, fetch, address, policy)))
    digest = text(at(evidence, "fetch", "inputs", "source"), 100)
    if address.startswith("s3://") and digest:
        # The file is whatever the operator downloads; the digest is what counts.
        found.append(
            Command(f"Check a copy of the model that came in; it has to print {digest}", "sha256sum MODEL_FILE")
        )
    if onnx := text(at(evidence, "export", "outputs", "onnx"), 100):
        found.append(Command(f"Check the ONNX file; it has to print {onnx}", "sha256sum model.onnx"))
    if evidence:
        line = command("quarantine gate", [("--policy", _policy(policy)), ("--evidence", "EVIDENCE_DIR")])
        found.append(Command("Decide again, offline, from the evidence alone", line))
    if version := _registered(at(evidence, "promote", "results")):
        line = command(f"quarantine verify {shlex.quote(version)}", [("--public-key", "SIGNER.pub")])
        found.append(Command("Check the registered version: files, signatures, statements, decision", line))
    return tuple(found)


def _address(fetch: Any) -> str:
    uri, version = text(at(fetch, "uri"), 1000), text(at(fetch, "version_id"), 200)
    return f"{uri}?versionId={version}" if uri.startswith("s3://") and version and "?" not in uri else uri


def _run(evidence: Mapping[str, Mapping[str, Any]], fetch: Any, address: str, policy: str) -> str:
    arguments = at(fetch, "architecture", "args")
    name = at(fetch, "architecture", "name")
    seeds = [seed for each in evidence.values() if isinstance(seed := at(each, "environment", "seed"), int)]
    methods = at(fetch, "methods")
    options: list[tuple[str, Any]] = [
        ("--model", address),
        ("--architecture", name if isinstance(name, str) else at(fetch, "architecture")),
        (
            "--architecture-args",
            json.dumps(arguments, sort_keys=True, default=str) if isinstance(arguments, Mapping) else None,
        ),
        ("--input-size", _numbers(at(fetch, "input_size"))),
        ("--mean", _numbers(at(fetch, "mean"))),
        ("--std", _numbers(at(fetch, "std"))),
        ("--clean", "CLEAN_SET"),
    ]
    if at(fetch, "test_images"):
        options.append(("--test", "TEST_SET"))
    probes = {
        text(probe.get("name"), 60) for each in evidence.values() for probe in mappings_at(each, "results", "probes")
    }
    options += [("--probe", f"{probe}.yaml") for probe in sorted(probes)]
    if isinstance(methods, (list, tuple)):
        options.append(("--methods", ",".join(text(method, 60) for method in methods)))
        options += [("--set", change) for method in methods for change in _changed_settings(evidence, text(method, 60))]
    options.append(("--scan-set", _changed_rate(evidence)))
    options += [("--policy", _policy(policy)), ("--seed", str(seeds[0]) if seeds else None)]
    return command("quarantine run", options)


def _policy(name: str) -> str:
    """A shipped policy goes by its name, another one by its file."""
    return name if name in SHIPPED_POLICIES else f"{name or 'POLICY'}.yaml"


def _registered(promotion: Any) -> str:
    name, version = text(at(promotion, "name"), 120), text(at(promotion, "version"), 40)
    return f"models:/{name}/{version}" if name and version else ""


def _numbers(value: Any) -> str:
    return ",".join(f"{each:g}" for each in value if number(each) is not None) if isinstance(value, list) else ""


def _changed_rate(evidence: Mapping[str, Mapping[str, Any]]) -> str:
    """The scan's false positive rate where it is not the usual one; its other settings are there by digest only."""
    rate = number(at(evidence, "scan", "results", "fpr"))
    return f"fpr={rate:g}" if rate is not None and rate != SCAN_RATE else ""


def _changed_settings(evidence: Mapping[str, Mapping[str, Any]], method: str) -> list[str]:
    """Settings that are not the method's own, as ``method.key=value``."""
    config = at(evidence, f"purify.{method}", "results", "config")
    row = METHODS.get(method)
    if not isinstance(config, Mapping) or row is None:
        return []
    own = to_mapping(row.config())
    return [
        f"{method}.{text(key, 60)}={json.dumps(value, default=str)}"
        for key, value in sorted(config.items(), key=lambda item: str(item[0]))
        if own.get(key) != value
    ]
