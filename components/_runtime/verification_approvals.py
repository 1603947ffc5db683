"""The signatures of the approvals that a decision rests on, checked against the keys of named approvers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from components._runtime.approvals import FOLDER, approval_files, open_approval
from components._runtime.decision_files import DecisionFolder
from components._runtime.small_files import read_small
from components._runtime.verification_files import FileFinding
from defense_core.errors import EvidenceMismatch
from defense_core.verdict import Verdict

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

RULE = "verify.approval"


def approval_findings(replayed: DecisionFolder, approvers: Mapping[str, SSlibKey]) -> list[FileFinding]:
    """One finding for each approval of a decision that was made again; none where nobody approved anything.

    Args:
        approvers: whose approvals count: public key by name. Without any, every approval is unknown: there is no
            default identity.
    """
    findings = []
    stated = replayed.decision.approvals
    for approval, path in zip(stated, approval_files(replayed.folder, stated), strict=True):
        file = f"evidence/{FOLDER}/{path.name}"
        bound = f"signed by {approval.identity}"
        if not approvers:
            why = f"Whether {approval.identity} signed it was not checked: name the key by --approver-key."
            findings.append(FileFinding(RULE, Verdict.UNKNOWN, None, bound, why, file))
            continue
        try:
            open_approval(read_small(path), approvers, file)
        except EvidenceMismatch as error:
            findings.append(FileFinding(RULE, Verdict.FAIL, error.got, bound, str(error), file))
        else:
            why = f"{approval.identity} approved {approval.rule}: {approval.reason}"
            findings.append(FileFinding(RULE, Verdict.PASS, approval.identity, bound, why, file))
    return findings
