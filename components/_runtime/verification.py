"""``verify``: everything in a release folder is checked again, offline, from the signatures to the decision.

===================  ==================================================================================
finding              holds where
===================  ==================================================================================
``verify.signature`` ``model.sig`` is the bytes that were written, and the trusted key signed it
``verify.files``     the folder holds exactly the files that were signed, byte for byte
``verify.statement`` each step has its statement, in its envelope, and it says what the evidence says
``verify.chain``     what a step took in came out of an earlier one; nothing reordered, nothing dropped
``verify.model``     the bundle and the ONNX file are those that were decided on
``verify.decision``  policy and evidence give the same decision, byte for byte
``verify.approval``  who is said to have approved a rule signed that (where a decision rests on approvals)
``require.…``        what the policy demands to be signed is signed
``verify.policy``    it was decided by the policy that was expected (where one is named)
``verify.registry``  tags and aliases say what the signed files say (for ``models:/name/version``)
``verify.promotion`` the promotion statement says what lies here and in the registry (where there is one)
===================  ==================================================================================

Each finding that does not hold names the file and the difference. No clock is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from components._runtime.approvals import FOLDER
from components._runtime.bundle_files import DESCRIPTION, listed_files
from components._runtime.decided_files import identity_of_decision, release_of
from components._runtime.decision_files import DecisionFolder, replay_decision
from components._runtime.evidence import DECISION, POLICY, read_folder
from components._runtime.model_signature import SIGNATURE
from components._runtime.release import ATTESTATIONS, BOM_FOLDER, BUNDLE_FOLDER, EVIDENCE_FOLDER, ML_BOM, ONNX_NAME
from components._runtime.signing_keys import TrustedSigner
from components._runtime.verification_approvals import approval_findings
from components._runtime.verification_chain import chain_problems, read_statements
from components._runtime.verification_files import Check, FileFinding, check_files
from defense_core.errors import AccessDenied, EvidenceMismatch, EvidenceMissing, SourceNotFound
from defense_core.evidence import parse_evidence
from defense_core.files import reading
from defense_core.policy import Policy, signature_findings
from defense_core.verdict import Verdict, combine

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey


@dataclass(frozen=True)
class Verification:
    """What was checked and found.

    Attributes:
        what: the folder or address.
        findings: one for each check that holds, one for each difference otherwise.
        decision: ``allow``, ``deny``, ``unknown`` or ``observe``, as the evidence gives it again; empty if it does not.
        policy: the policy's name.
        signer: identifier of the key; empty where the signature does not hold.
        files: how many were hashed.
        bytes: how many those are.
    """

    what: str
    findings: tuple[FileFinding, ...]
    decision: str
    policy: str
    signer: str
    files: int
    bytes: int

    @property
    def verdict(self) -> Verdict:
        """PASS only where every check holds."""
        return combine(finding.verdict for finding in self.findings)

    @property
    def differences(self) -> list[FileFinding]:
        """The findings that do not hold."""
        return [finding for finding in self.findings if finding.verdict is not Verdict.PASS]


def verify_release(
    folder: Path,
    trusted: TrustedSigner,
    *,
    policy: Policy | None = None,
    approvers: Mapping[str, SSlibKey] = MappingProxyType({}),
    what: str = "",
    further: Callable[[Check], None] = lambda check: None,
) -> Verification:
    """Check a release folder.

    Args:
        trusted: whose signature counts.
        policy: the policy that must have decided; ``None``: whichever did.
        approvers: whose approvals count, by name.
        what: how the folder is called in the result.
        further: more checks on the same findings.

    Returns:
        The findings; a folder that is damaged in whatever way gives findings, no error.

    Raises:
        SourceNotFound: there is no such folder.
        AccessDenied: this account may not look for it.
        ConfigError: the key or certificate that is trusted is not usable.
    """
    folder = Path(folder)
    trusted.check()
    with reading(folder, SourceNotFound, "a release", denied=AccessDenied):
        there = folder.is_dir()
    if not there:
        raise SourceNotFound(f"{folder} is no folder", expected="a release", got="nothing", hint="Name its folder")
    check = Check(folder, trusted)
    check_files(check)
    if check.whole:
        _check_decision(check)
        _check_statements(check)
        _check_model(check)
        _check_required(check)
        if check.replayed is not None:
            check.findings += approval_findings(check.replayed, approvers)
    else:
        # A link or a pipe is named and never followed.
        why = "The evidence was not read, because the folder holds what is no plain file."
        check.findings.append(FileFinding("verify.decision", Verdict.UNKNOWN, None, "plain files only", why))
    if policy is not None:
        _check_policy(check, policy)
    further(check)
    decision = check.replayed.decision if check.replayed else None
    return Verification(
        what=what or str(folder),
        findings=tuple(check.findings),
        decision=decision.outcome if decision else "",
        policy=decision.policy_name if decision else "",
        signer=str(check.signed.key.keyid) if check.signed else "",
        files=len(check.hashed),
        bytes=check.bytes,
    )


# -- decision, statements, model ---------------------------------------------------------


def _check_decision(check: Check) -> None:
    evidence = check.folder / EVIDENCE_FOLDER
    with check.part(
        "verify.decision", "the same bytes", "Policy and evidence give the same decision again.", f"evidence/{DECISION}"
    ):
        check.replayed = replay_decision(evidence)
        identity_of_decision(check.replayed)
        for name in _unaccounted(check, check.replayed):
            why = f"{name} is unexpected: it is of no step, and the decision does not name it."
            check.differ("verify.decision", name, expected="no such file", got=check.hashed[name], why=why)


def _unaccounted(check: Check, replayed: DecisionFolder) -> list[str]:
    """Files among the evidence that neither the decision nor a later check looks at."""
    known = {f"{EVIDENCE_FOLDER}/{name}.json" for name in replayed.evidence}
    known |= {f"{EVIDENCE_FOLDER}/{name}" for name in (DECISION, POLICY)} | {f"{BOM_FOLDER}/{ML_BOM}"}
    folders = (f"{EVIDENCE_FOLDER}/{FOLDER}/", f"{ATTESTATIONS}/")
    return sorted(
        name
        for name in check.hashed
        if name.startswith(f"{EVIDENCE_FOLDER}/") and name not in known and not name.startswith(folders)
    )


def _check_statements(check: Check) -> None:
    key = check.signers_key
    if key is None:
        return
    folder = check.folder / ATTESTATIONS
    said = "Each step's statement says what its evidence says."
    with check.part("verify.statement", "one a step, signed", said, EVIDENCE_FOLDER):
        evidence = _evidence(check)
        named = {name: check.hashed[f"evidence/{name}.json"] for name in evidence}
        check.statements = read_statements(folder, evidence, named, key)
        for problem in check.statements.problems:
            check.differ(
                "verify.statement", problem.file, expected=problem.expected, got=problem.got, why=problem.sentence
            )
    said = "What each step took in came out of an earlier one."
    with check.part("verify.chain", "one chain", said, EVIDENCE_FOLDER):
        for problem in chain_problems(_evidence(check), check.hashed.get(f"evidence/{DECISION}", "no such file")):
            check.differ("verify.chain", problem.file, expected=problem.expected, got=problem.got, why=problem.sentence)


def _evidence(check: Check) -> Mapping[str, dict[str, Any]]:
    if check.replayed is not None:
        return check.replayed.evidence
    found = read_folder(check.folder / EVIDENCE_FOLDER)
    parse_evidence(found)
    return found


def _check_model(check: Check) -> None:
    if check.replayed is None:
        return
    said = "Bundle and ONNX file are those that were decided on."
    with check.part("verify.model", "the decided model", said, BUNDLE_FOLDER):
        release = release_of(check.folder, check.replayed)
        promised = {
            f"{BUNDLE_FOLDER}/{DESCRIPTION}": release.bundle_digest,
            ONNX_NAME: release.onnx_digest,
            **{f"{BUNDLE_FOLDER}/{name}": value for name, value in listed_files(check.folder / BUNDLE_FOLDER).items()},
        }
        for name, value in promised.items():
            got = check.hashed.get(name, "no such file")
            if got != value:
                check.differ("verify.model", name, expected=value, got=got)


def _check_required(check: Check) -> None:
    """What the policy demands to be signed; nothing is recorded where it demands nothing."""
    if check.replayed is None:
        return
    held = {
        "model": check.signed is not None,
        "attestations": check.statements is not None and not check.statements.problems,
    }
    for finding in signature_findings(check.replayed.policy, [name for name, good in held.items() if good]):
        check.findings.append(FileFinding(**vars(finding), file="" if finding.verdict is Verdict.PASS else SIGNATURE))


def _check_policy(check: Check, policy: Policy) -> None:
    with check.part(
        "verify.policy", policy.digest, f"It was decided by the policy {policy.name}.", "evidence/policy.json"
    ):
        if check.replayed is None:
            raise EvidenceMissing("the decision cannot be made again", expected=f"one by {policy.name}", got="none")
        if check.replayed.decision.policy_digest != policy.digest:
            raise EvidenceMismatch(
                "it was decided by another policy",
                expected=f"{policy.name}, {policy.digest}",
                got=f"{check.replayed.decision.policy_name}, {check.replayed.decision.policy_digest}",
            )


def signed_destination(check: Check) -> Mapping[str, Any]:
    """Where the release statement says that this was to be registered; empty where there is none."""
    if check.statements is None or check.statements.release is None:
        return {}
    destination: Mapping[str, Any] = json.loads(check.statements.release)["predicate"]["destination"]
    return destination
