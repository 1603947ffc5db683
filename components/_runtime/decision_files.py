"""A decision as a folder: what was decided, by which policy, on which evidence. It can be replayed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime.evidence import DECISION, POLICY, read_folder, write_evidence
from defense_core.config import canonical_json
from defense_core.errors import EvidenceMismatch, EvidenceMissing
from defense_core.files import write_atomic
from defense_core.policy import Decision, decide, parse_policy


@dataclass(frozen=True)
class DecisionFolder:
    """A decision that was made again from its policy and evidence, and came out the same.

    Attributes:
        folder: where it lies.
        decision: the decision.
        evidence: what it rests on, by name.
    """

    folder: Path
    decision: Decision
    evidence: Mapping[str, dict[str, Any]]


def write_decision(
    folder: Path, evidence: Mapping[str, Mapping[str, Any]], policy: Mapping[str, Any], decision: Decision
) -> None:
    """Write evidence, policy and decision into the existing ``folder``."""
    for name, mapping in evidence.items():
        write_evidence(folder / f"{name}.json", mapping)
    write_atomic(folder / POLICY, canonical_json(policy) + b"\n")
    write_atomic(folder / DECISION, decision.to_json() + b"\n")


def replay_decision(folder: Path) -> DecisionFolder:
    """Read a decision and make it again.

    Raises:
        EvidenceMissing: a file is not there.
        EvidenceMismatch: a file is damaged, or the policy and evidence give another decision.
        PolicyError: the policy is malformed.
    """
    folder = Path(folder)
    evidence = read_folder(folder)
    try:
        policy = json.loads((folder / POLICY).read_bytes())
        stated = (folder / DECISION).read_bytes()
    except FileNotFoundError as error:
        raise EvidenceMissing(f"{error.filename} is missing", hint="Run the gate again") from error
    except ValueError as error:
        raise EvidenceMismatch(f"{folder / POLICY} is damaged", expected="JSON", got=error) from error
    decision = decide(parse_policy(policy), evidence)
    if decision.to_json() + b"\n" != stated:
        raise EvidenceMismatch(
            f"{folder / DECISION} is not what its policy and evidence give",
            expected=f"{decision.outcome} by {decision.policy_name}",
            got="another decision",
            hint="Run the gate again; never edit a decision",
        )
    return DecisionFolder(folder, decision, evidence)
