"""How to do a run again, as commands that can be pasted into a shell."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from defense_core.config import to_mapping
from defense_core.limits import LoadLimits
from defense_core.purify import METHODS
from defense_core.report_text import at, can_be_shown, command, count, items_at, mappings_at, number, text, verbatim

SCAN_RATE = 0.05
"""What ``quarantine scan`` takes where nobody says otherwise."""
USUAL_DEVICE, USUAL_ALIAS = "auto", "champion"
SHIPPED_POLICIES = ("strict", "standard", "observe")


@dataclass(frozen=True)
class Command:
    """A command and what it is for."""

    why: str
    line: str


def commands(evidence: Mapping[str, Mapping[str, Any]], *, policy: str) -> tuple[Command, ...]:
    """Commands that repeat the run and check its parts.

    Places of the clean set, pool, probes and policy are not in the evidence, only their digests: they
    appear as names to be replaced.
    """
    fetch = at(evidence, "fetch", "results")
    found = []
    names = {verbatim(each.get("identity")) for each in mappings_at(evidence, "gate", "results", "approvals")}
    approvers = [("--approver-key", f"{name}={name}.pub") for name in sorted(names)]
    if address := _address(fetch):
        found.append(Command("Run the whole pipeline again on the same bytes", _run(evidence, fetch, address, policy)))
    digest = _hex(at(evidence, "fetch", "inputs", "source"))
    if address.startswith("s3://") and digest:
        # The file is whatever the operator downloads; the digest is what counts.
        found.append(
            Command(f"Check a copy of the model that came in; it has to print {digest}", "sha256sum MODEL_FILE")
        )
    if onnx := _hex(at(evidence, "export", "outputs", "onnx")):
        found.append(Command(f"Check the ONNX file; it has to print {onnx}", "sha256sum model.onnx"))
    if evidence:
        given = [("--approval", "APPROVAL.json") for _ in approvers[:1]]
        decided_at = at(evidence, "gate", "results", "decided_at")
        options = [("--policy", _policy(policy)), ("--evidence", "EVIDENCE_DIR"), ("--at", decided_at)]
        options += [*given, *approvers]
        line = command("quarantine gate", options)
        found.append(Command("Decide again, offline, from the evidence alone", line))
    if version := _registered(at(evidence, "promote", "results")):
        line = command(f"quarantine verify {shlex.quote(version)}", [("--public-key", "SIGNER.pub"), *approvers])
        found.append(Command("Check the registered version: files, signatures, statements, decision", line))
    return tuple(found)


def _hex(value: Any) -> str:
    """A digest as ``sha256sum`` prints it."""
    return text(value, 100).removeprefix("sha256:")


def _address(fetch: Any) -> str:
    uri, version = verbatim(at(fetch, "uri")), verbatim(at(fetch, "version_id"))
    return f"{uri}?versionId={version}" if uri.startswith("s3://") and version and "?" not in uri else uri


def _run(evidence: Mapping[str, Mapping[str, Any]], fetch: Any, address: str, policy: str) -> str:
    arguments = at(fetch, "architecture", "args")
    name = at(fetch, "architecture", "name")
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
        verbatim(probe.get("name")) for each in evidence.values() for probe in mappings_at(each, "results", "probes")
    }
    options += [("--probe", f"{probe}.yaml") for probe in sorted(probes)]
    asked = at(fetch, "asked")
    if isinstance(methods, (list, tuple)):
        options.append(("--methods", ",".join(verbatim(method) for method in methods)))
        options += [("--set", change) for change in _method_settings(evidence, methods, asked)]
    if at(evidence, "fetch", "inputs", "pool"):
        options.append(("--pool", "POOL"))
    options += [("--scan-set", change) for change in _scan_settings(evidence, asked)]
    options += [("--policy", _policy(policy)), ("--seed", _seed(evidence))]
    return command("quarantine run", [*options, *_asked_options(asked), *_destination(evidence)])


def _seed(evidence: Mapping[str, Mapping[str, Any]]) -> str:
    """The seed that the run was asked for, which fetch states; steps that draw nothing state 0."""
    seed = count(at(evidence, "fetch", "environment", "seed"))
    return "" if seed is None else str(seed)


def _method_settings(evidence: Mapping[str, Mapping[str, Any]], methods: Sequence[Any], asked: Any) -> list[str]:
    if isinstance(configs := at(asked, "configs"), Mapping):
        return _assignments(configs)
    return [change for method in methods for change in _changed_settings(evidence, verbatim(method))]


def _scan_settings(evidence: Mapping[str, Mapping[str, Any]], asked: Any) -> list[str]:
    """What the scan was asked; evidence of earlier releases tells its rate only."""
    if isinstance(given := at(asked, "scan"), Mapping):
        return _assignments(given)
    return [change for change in [_changed_rate(evidence)] if change]


def _asked_options(asked: Any) -> list[tuple[str, Any]]:
    """Options that say what was not left at its default."""
    limits = at(asked, "loading", "limits")
    device = verbatim(at(asked, "device"))
    return [
        ("--licence", at(asked, "licence")),
        ("--class-names", ",".join(verbatim(each) for each in items_at(asked, "class_names"))),
        ("--augment", at(asked, "augment")),
        ("--device", device if device != USUAL_DEVICE else ""),
        *(("--trusted-module", each) for each in items_at(asked, "loading", "trusted_modules")),
        ("--sha256", at(asked, "loading", "sha256")),
        ("--max-bytes", _changed_limit(limits, "max_bytes")),
        ("--max-parameters", _changed_limit(limits, "max_parameters")),
        ("--load-timeout-s", _changed_limit(limits, "timeout_s")),
    ]


def _changed_limit(limits: Any, name: str) -> str:
    value = number(at(limits, name))
    return "" if value is None or value == getattr(LoadLimits(), name) else f"{value:.15g}"


def _destination(evidence: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any]]:
    """Where the version went; without a registered one nobody knows."""
    promoted = at(evidence, "promote", "results")
    alias = at(promoted, "alias")
    return [("--register", at(promoted, "name")), ("--alias", alias if alias != USUAL_ALIAS else "")]


def _assignments(settings: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """``a.b=1`` for every leaf, in the order of their names."""
    found: list[str] = []
    for key, value in sorted(settings.items(), key=lambda item: str(item[0])):
        name = f"{prefix}{verbatim(key)}"
        if isinstance(value, Mapping):
            found += _assignments(value, f"{name}.")
        else:
            found.append(f"{name}={json.dumps(value, default=str)}")
    return found


def _policy(name: str) -> str:
    """A shipped policy goes by its name, another one by its file."""
    return name if name in SHIPPED_POLICIES else f"{name or 'POLICY'}.yaml"


def _registered(promotion: Any) -> str:
    name, version = verbatim(at(promotion, "name")), verbatim(at(promotion, "version"))
    return f"models:/{name}/{version}" if name and version and can_be_shown(name + version) else ""


def _numbers(value: Any) -> str:
    """Numbers as they were, to the last digit: another mean makes another model."""
    known = [found for each in value if (found := number(each)) is not None] if isinstance(value, list) else []
    return ",".join(str(int(each)) if each.is_integer() else repr(each) for each in known)


def _changed_rate(evidence: Mapping[str, Mapping[str, Any]]) -> str:
    """The scan's false positive rate where it is not the usual one; its other settings are there by digest only."""
    rate = number(at(evidence, "scan", "results", "fpr"))
    return f"fpr={rate!r}" if rate is not None and rate != SCAN_RATE else ""


def _changed_settings(evidence: Mapping[str, Mapping[str, Any]], method: str) -> list[str]:
    """Settings that are not the method's own, as ``method.key=value``."""
    config = at(evidence, f"purify.{method}", "results", "config")
    row = METHODS.get(method)
    if not isinstance(config, Mapping) or row is None:
        return []
    own = to_mapping(row.config())
    return [
        f"{method}.{verbatim(key)}={json.dumps(value, default=str)}"
        for key, value in sorted(config.items(), key=lambda item: str(item[0]))
        if own.get(key) != value
    ]
