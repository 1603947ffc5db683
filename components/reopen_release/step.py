"""Reopen: the release of a former run, checked, becomes the inputs of gate and sign again."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from components._runtime.decided_files import identity_of_decision, release_of
from components._runtime.decision_files import decision_bytes
from components._runtime.evidence import Clock, compose
from components._runtime.model_signature import SIGNATURE
from components._runtime.promotion import MAX_BYTES
from components._runtime.release import ATTESTATIONS, BOM_FOLDER, BUNDLE_FOLDER, EVIDENCE_FOLDER, ONNX_NAME
from components._runtime.resumption import Resumption, acquire_release, check_former
from components._runtime.signing_keys import TrustedSigner
from defense_core.evidence import BEFORE_DECISION
from defense_core.files import atomic_directory, sha256_bytes
from defense_core.progress import NullProgress, Progress
from defense_core.verdict import Finding, Verdict


def reopen_release(
    request: Resumption,
    bundle: Path,
    onnx: Path,
    decision: Path,
    *,
    trusted: TrustedSigner | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fetch the release of a former run and lay out what it consists of.

    Args:
        request: what the promote run was asked.
        bundle, onnx, decision: folders that become the model, the folder of ``model.onnx``, and the former decision
            with its evidence.
        trusted: whose signature promotion lets pass; see :func:`components._runtime.resumption.check_former`.

    Returns:
        Evidence ``reopen``, and the evidence of the former run's steps up to its decision.

    Raises:
        SourceError, RegistryUnavailable: it cannot be fetched.
        EvidenceMissing, EvidenceMismatch, DigestMismatch: it is not whole, or not signed by whom you trust.
        ConfigError: a signature is there, or demanded, and no key is named.
    """
    clock = Clock.start()
    with tempfile.TemporaryDirectory(prefix="quarantine-reopen-") as scratch:
        folder = acquire_release(
            request.release, Path(scratch), max_bytes=MAX_BYTES, progress=progress or NullProgress()
        )
        former = check_former(folder, request, trusted)
        release = release_of(folder, former)
        _lay_out(folder, bundle, onnx, decision)
        signed = (folder / SIGNATURE).is_file()
    outcome = former.decision.outcome
    evidence = compose(
        "reopen",
        clock,
        inputs={
            "source": former.decision.subject.source,
            "model": release.bundle_digest,
            "onnx": release.onnx_digest,
            "policy": identity_of_decision(former).policy,
            "decision": sha256_bytes(decision_bytes(former.decision)),
        },
        results={
            "release": request.release,
            "outcome": outcome,
            "decided_at": former.decision.decided_at,
            "signed": signed,
        },
        findings=[Finding("reopen.whole", Verdict.PASS, outcome, "a whole release", "The former release is whole.")],
    )
    return evidence, [each for each in former.evidence.values() if each["step"] in BEFORE_DECISION]


def _lay_out(folder: Path, bundle: Path, onnx: Path, decision: Path) -> None:
    # Statements and the bill of materials belong to the former release; the new one gets its own.
    former = shutil.ignore_patterns(*(Path(part).name for part in (ATTESTATIONS, BOM_FOLDER)))
    with atomic_directory(bundle) as made:
        shutil.copytree(folder / BUNDLE_FOLDER, made, dirs_exist_ok=True)
    with atomic_directory(onnx) as made:
        shutil.copyfile(folder / ONNX_NAME, made / ONNX_NAME)
    with atomic_directory(decision) as made:
        shutil.copytree(folder / EVIDENCE_FOLDER, made, ignore=former, dirs_exist_ok=True)
