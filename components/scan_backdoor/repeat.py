"""A model whose bytes were scanned already: the first scan's words stand, and it is said that they are repeated."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components._runtime.evidence import read_evidence
from defense_core.files import sha256_file
from defense_core.verdict import Finding, Verdict

RESULT = "scan.json"
CIRCUMSTANCES = ("version", "torch", "image", "device")
"""What a scan depends on besides its inputs, as the evidence's environment has it."""


@dataclass(frozen=True)
class Outcome:
    """What a scan says, whether it was made or repeated.

    Attributes:
        scan: digest of the evidence that is repeated; empty where nothing is.
    """

    verdict: Verdict
    results: Mapping[str, Any]
    findings: tuple[Finding, ...]
    scan: str = ""


def repeated(
    earlier: Path, folder: Path, name: str, *, inputs: Mapping[str, Any], environment: Mapping[str, Any]
) -> Outcome | None:
    """The scan in ``earlier`` as the outcome of the scan called ``name``; its triggers and pictures go to ``folder``.

    Args:
        inputs: digests of the model, the images, the settings and the pool of the scan that is wanted.
        environment: where it would be made.

    Returns:
        ``None`` where anything that the outcome depends on is another: scan again.

    Raises:
        EvidenceMissing, EvidenceMismatch: ``earlier`` holds no scan.
    """
    first = read_evidence(earlier / RESULT)
    made = first["environment"]
    if first["inputs"] != inputs or any(made.get(key) != environment[key] for key in CIRCUMSTANCES):
        return None
    shutil.copytree(earlier, folder, ignore=shutil.ignore_patterns(RESULT), dirs_exist_ok=True)
    said = f"same bytes as scanned: {inputs['model']}"
    sentence, *others = (_renamed(each, name) for each in first["findings"])
    findings = (replace(sentence, why=f"{sentence.why} ({said})"), *others)
    return Outcome(
        Verdict(first["verdict"]),
        {**first["results"], "repeats": said},
        findings,
        scan=sha256_file(earlier / RESULT),
    )


def _renamed(finding: Mapping[str, Any], name: str) -> Finding:
    rule = f"{name}.{finding['rule'].partition('.')[2]}"
    return Finding(**{**finding, "rule": rule, "verdict": Verdict(finding["verdict"])})
