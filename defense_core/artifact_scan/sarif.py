"""Findings as SARIF 2.1.0, for pages that show code-scanning results."""

from __future__ import annotations

import hashlib
import os
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from defense_core.artifact_scan.findings import RULES, ArtifactScan, ScanFinding, State

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_LEVELS = {State.DANGEROUS: "error", State.INCONCLUSIVE: "warning"}
# What code-scanning pages sort by, on the scale of CVSS.
_SEVERITY = {State.DANGEROUS: "9.0", State.INCONCLUSIVE: "5.0"}


def to_sarif(scan: ArtifactScan, *, version: str, base: str = "") -> dict[str, Any]:
    """The scan as one SARIF run, without times: the same files give the same log.

    Args:
        version: of this project.
        base: what goes before each file's path, relative to the repository that the page shows.
    """
    rules = sorted({finding.rule for finding in scan.findings})
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "Model Quarantine",
                        "semanticVersion": version,
                        "rules": [_rule(name) for name in rules],
                    }
                },
                "invocations": [{"executionSuccessful": True}],
                "artifacts": [
                    {
                        "location": {"uri": _uri(base, file.path)},
                        "length": file.bytes,
                        **({"hashes": {"sha-256": file.sha256.removeprefix("sha256:")}} if file.sha256 else {}),
                    }
                    for file in scan.files
                ],
                "results": [_result(finding, rules.index(finding.rule), base) for finding in scan.findings],
                "properties": {"verdict": scan.state.value, "scanners": dict(scan.scanners)},
                "columnKind": "unicodeCodePoints",
            }
        ],
    }


def _rule(name: str) -> dict[str, Any]:
    rule = RULES[name]
    return {
        "id": name,
        "name": "".join(part.capitalize() for part in name.split("-")),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": f"{rule.summary}. A file with this finding is {rule.state.value}."},
        "help": {"text": rule.advice},
        "defaultConfiguration": {"level": _LEVELS[rule.state]},
        "properties": {"tags": ["security"], "security-severity": _SEVERITY[rule.state]},
    }


def _result(finding: ScanFinding, index: int, base: str) -> dict[str, Any]:
    file, _, member = finding.where.partition("!/")
    physical: dict[str, Any] = {"artifactLocation": {"uri": _uri(base, file)}, "region": {"startLine": 1}}
    if finding.offset is not None and not member:
        physical["region"] = {"startLine": 1, "byteOffset": finding.offset}
    location: dict[str, Any] = {"physicalLocation": physical}
    if member:
        location["logicalLocations"] = [{"fullyQualifiedName": finding.where, "kind": "member"}]
    print_of = hashlib.sha256(f"{finding.rule}\0{finding.where}\0{finding.message}".encode()).hexdigest()
    return {
        "ruleId": finding.rule,
        "ruleIndex": index,
        "level": _LEVELS[finding.state],
        "message": {"text": f"{finding.where}: {finding.message}"},
        "locations": [location],
        "partialFingerprints": {"findingHash/v1": print_of},
    }


def _uri(base: str, path: str) -> str:
    # As bytes, because a folder's name need not be valid UTF-8.
    return quote(os.fsencode(PurePosixPath(base) / path))
