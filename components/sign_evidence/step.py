"""Sign: the decided model, its evidence and a statement per step become one folder, which is signed as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from components._runtime.decided_files import identity_of_decision, release_of
from components._runtime.decision_files import DecisionFolder, replay_decision
from components._runtime.envelopes import seal
from components._runtime.evidence import DECISION, Clock, compose
from components._runtime.ml_bom import write_ml_bom
from components._runtime.model_signature import sign_folder
from components._runtime.plan import parse_json
from components._runtime.release import (
    ATTESTATIONS,
    BOM_FOLDER,
    BUNDLE_FOLDER,
    EVIDENCE_FOLDER,
    ONNX_NAME,
    Parts,
    Release,
    check_release,
    stage,
)
from components._runtime.signing_keys import KEY_VARIABLE, SigningKey
from components._runtime.statements import Destination, file_name, release_statement, step_statements
from components._runtime.verification_chain import chain_problems
from defense_core.config import require
from defense_core.errors import EvidenceMismatch, EvidenceMissing
from defense_core.files import atomic_directory, sha256_file, write_atomic
from defense_core.policy import parse_policy
from defense_core.verdict import Finding, Verdict


def sign_evidence(
    model: Path,
    onnx: Path,
    decision: Path,
    out: Path,
    *,
    destination: Destination,
    key: SigningKey | None,
    policy: str = "",
) -> dict[str, Any]:
    """Write the release folder, which promotion registers exactly as it is.

    Args:
        model: the selected bundle.
        onnx: folder that holds ``model.onnx``.
        decision: folder that the gate wrote; its copy is made again from its policy and evidence before it is signed.
        out: folder that becomes the release.
        destination: what it is signed for.
        key: ``None``: the release stays unsigned. What is signed must be a whole chain: each step took in what an
            earlier one gave.
        policy: JSON, what the run was asked to decide by; empty: whatever decided. The decision's folder brings its
            own, and with it whatever its writer wants allowed.

    Returns:
        Evidence ``sign`` with ``results`` ``signed``, ``key_id`` and ``statements``.

    Raises:
        EvidenceMismatch: decision, evidence and files do not belong together, or another policy decided; nothing is
            left.
        EvidenceMissing: the decision names no model, or the policy demands signatures and there is no key.
    """
    clock = Clock.start()
    require((Path(onnx) / ONNX_NAME).is_file(), "onnx", f"a folder with {ONNX_NAME}", str(onnx))
    count = 0
    with atomic_directory(out) as folder:
        stage(Parts(Path(onnx) / ONNX_NAME, Path(model), Path(decision)), folder)
        # What is checked is the copy, which is what is signed.
        replayed = replay_decision(folder / EVIDENCE_FOLDER)
        _require_key(replayed, key)
        _require_policy(replayed, policy)
        if key is not None:
            _require_chain(replayed)
        identity = identity_of_decision(replayed)
        release = release_of(folder, replayed)
        check_release(release)
        write_ml_bom(folder / BOM_FOLDER, replayed.evidence)
        if key is not None:
            count = _attest(release, replayed, destination, key, clock)
            sign_folder(folder, key)
    # Nothing here depends on the signature's bytes: a retried step signs anew and says the same.
    signed = key is not None
    said = f"Signed with the key {key.key_id}" if key is not None else f"Not signed: {KEY_VARIABLE} names no key"
    return compose(
        "sign",
        clock,
        inputs={
            "source": replayed.decision.subject.source,
            "model": release.bundle_digest,
            "onnx": release.onnx_digest,
            "policy": identity.policy,
        },
        results={"signed": signed, "key_id": key.key_id if key is not None else None, "statements": count},
        findings=[Finding("sign.signed", Verdict.PASS, signed, "a key, where the policy demands one", f"{said}.")],
    )


def _require_key(replayed: DecisionFolder, key: SigningKey | None) -> None:
    if key is None and replayed.requires_signature:
        raise EvidenceMissing(
            "the policy demands a signature and there is no key",
            expected=f"{KEY_VARIABLE} to name a private key",
            got="nothing",
            hint="Make a pair with `quarantine keygen --out DIR`, or mount the secret into the sign step",
        )


def _require_policy(replayed: DecisionFolder, asked: str) -> None:
    if not asked:
        return
    expected = parse_policy(parse_json(asked, "policy")).digest
    if replayed.policy.digest != expected:
        raise EvidenceMismatch(
            "another policy decided than the run was asked for",
            expected=expected,
            got=f"{replayed.policy.digest}, which is called {replayed.policy.name}",
            hint="Nothing was signed; find out who wrote the decision, and run again",
        )


def _require_chain(replayed: DecisionFolder) -> None:
    problems = chain_problems(replayed.evidence, sha256_file(replayed.folder / DECISION))
    if problems:
        raise EvidenceMismatch(
            "the evidence is no chain from what was fetched to what was decided",
            expected=problems[0].expected,
            got="; ".join(each.sentence for each in problems[:5]),
            hint="Nothing was signed; the files are not all of one run, or somebody changed one",
        )


def _attest(release: Release, replayed: DecisionFolder, destination: Destination, key: SigningKey, clock: Clock) -> int:
    """Write one signed statement per step, and that of the release; how many."""
    evidence = release.folder / EVIDENCE_FOLDER
    digests = {name: sha256_file(evidence / f"{name}.json") for name in replayed.evidence}
    statements = step_statements(replayed.evidence, digests)
    outputs = {f"{BUNDLE_FOLDER}/bundle.json": release.bundle_digest, ONNX_NAME: release.onnx_digest}
    environment = clock.environment(device="cpu", seed=0)
    statements.append(release_statement(statements, destination, outputs=outputs, environment=environment))
    for index, statement in enumerate(statements):
        path = release.folder / ATTESTATIONS / file_name(index, statement.name)
        write_atomic(path, seal(statement.payload, key))
    return len(statements)
