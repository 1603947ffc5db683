"""A decision as a folder: what was decided, by which policy, on which evidence. It can be replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime import approvals as signed_files
from components._runtime.approvals import SignedApproval
from components._runtime.evidence import DECISION, POLICY, read_folder, write_evidence
from components._runtime.small_files import read_small
from defense_core.config import canonical_json, from_mapping
from defense_core.errors import ConfigError, EvidenceMismatch, EvidenceMissing
from defense_core.files import write_atomic
from defense_core.policy import Approval, Decision, Policy, decide, parse_policy


@dataclass(frozen=True)
class DecisionFolder:
    """A decision that was made again from its policy and evidence, and came out the same.

    Attributes:
        folder: where it lies.
        decision: the decision.
        evidence: what it rests on, by name, and the gate's own.
        policy: the policy that decided.
    """

    folder: Path
    decision: Decision
    evidence: Mapping[str, dict[str, Any]]
    policy: Policy

    @property
    def requires_signature(self) -> bool:
        """Whether the policy lets nothing be released unsigned."""
        return bool(self.policy.require.signatures)


def write_decision(
    folder: Path,
    evidence: Mapping[str, Mapping[str, Any]],
    policy: Mapping[str, Any],
    decision: Decision,
    approvals: Sequence[SignedApproval] = (),
) -> None:
    """Write evidence, policy, decision and the signed approvals it rests on into the existing ``folder``."""
    for index, signed in enumerate(approvals):
        write_atomic(folder / signed_files.FOLDER / signed_files.file_name(index, signed.approval), signed.envelope)
    for name, mapping in evidence.items():
        write_evidence(folder / f"{name}.json", mapping)
    write_atomic(folder / POLICY, canonical_json(policy) + b"\n")
    write_atomic(folder / DECISION, decision_bytes(decision))


def decision_bytes(decision: Decision) -> bytes:
    """What ``decision.json`` holds."""
    return decision.to_json() + b"\n"


def replay_decision(folder: Path) -> DecisionFolder:
    """Read a decision and make it again, at the time that it states.

    Signatures of approvals are not checked here, which takes the approvers' keys; see
    :func:`components._runtime.approvals.open_approval`.

    Raises:
        EvidenceMissing: a file is not there.
        EvidenceMismatch: a file is damaged or too large, or policy, evidence and approvals give another decision.
        PolicyError: the policy is malformed.
    """
    folder = Path(folder)
    evidence = read_folder(folder)
    try:
        policy = json.loads(read_small(folder / POLICY))
        stated = read_small(folder / DECISION)
    except FileNotFoundError as error:
        raise EvidenceMissing(f"{error.filename} is missing", hint="Run the gate again") from error
    except (ValueError, RecursionError) as error:
        raise EvidenceMismatch(f"{folder / POLICY} is damaged", expected="JSON", got=error) from error
    parsed = parse_policy(policy)
    given = stated_circumstances(stated, str(folder / DECISION))
    signed_files.approval_files(folder, given["approvals"])
    decision = decide(parsed, evidence, **given)
    if decision_bytes(decision) != stated:
        raise EvidenceMismatch(
            f"{folder / DECISION} is not what its policy and evidence give",
            expected=f"{decision.outcome} by {decision.policy_name}",
            got="another decision",
            hint="Run the gate again; never edit a decision",
        )
    return DecisionFolder(folder, decision, evidence, parsed)


def stated_circumstances(data: bytes, where: str) -> dict[str, Any]:
    """What a decision says it was made with beside policy and evidence: ``at``, ``approvals``, ``supersedes``.

    Args:
        data: the bytes of ``decision.json``.

    Raises:
        EvidenceMismatch: it is damaged.
    """
    try:
        mapping = json.loads(data)
        approvals = tuple(from_mapping(Approval, each) for each in mapping.get("approvals", []))
        given = {"at": mapping.get("decided_at"), "approvals": approvals, "supersedes": mapping.get("supersedes")}
    except (ValueError, AttributeError, TypeError, RecursionError, ConfigError) as error:
        raise EvidenceMismatch(f"{where} is damaged", expected="a decision", got=error) from error
    for key in ("decided_at", "supersedes"):
        if not isinstance(mapping.get(key), str | None):
            got = repr(mapping[key])[:80]
            raise EvidenceMismatch(f"{where} is damaged", expected=f"text or null as {key}", got=got)
    return given
