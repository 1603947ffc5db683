"""A policy over past evidence: which decisions would have been others, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime.decision_files import stated_circumstances
from components._runtime.evidence import DECISION, read_folder
from defense_core.config import canonical_json
from defense_core.errors import AccessDenied, EvidenceMismatch, EvidenceMissing, QuarantineError
from defense_core.files import reading, walk
from defense_core.policy import Decision, Policy, decide
from defense_core.report_text import at as value_at
from defense_core.report_text import items_at
from defense_core.verdict import Verdict


@dataclass(frozen=True)
class Replayed:
    """One past run under another policy.

    Attributes:
        folder: where its evidence lies.
        at: the time that it was decided at, again; ``None`` where nothing states one.
        was: the outcome then (``allow``, ``deny``, ``unknown``, ``observe``); ``None`` where none was recorded.
        becomes: the outcome under the policy; ``None`` where it cannot be decided at all.
        reasons: each rule that blocks now and did not, or did and does not, as a sentence.
        problem: why it could not be replayed or compared; empty if it could.
    """

    folder: str
    at: str | None
    was: str | None
    becomes: str | None
    reasons: tuple[str, ...] = ()
    problem: str = ""

    @property
    def verdict(self) -> Verdict:
        """PASS: the same outcome; FAIL: another; UNKNOWN: that cannot be told."""
        if self.was is None or self.becomes is None:
            return Verdict.UNKNOWN
        return Verdict.PASS if self.was == self.becomes else Verdict.FAIL


def find_runs(folder: Path) -> list[Path]:
    """The evidence folders at and below ``folder``, sorted.

    Raises:
        EvidenceMissing: there is none.
        AccessDenied: this account may not read a folder: what lies there would be left out without a word.
    """
    with reading(folder, EvidenceMissing, "a folder of runs", denied=AccessDenied):
        below = sorted(Path(parent) / name for parent, names, _ in walk(folder) for name in names)
        found = [path for path in (folder, *below) if (path / "fetch.json").is_file() or (path / DECISION).is_file()]
    if not found:
        raise EvidenceMissing(
            f"no run in {folder}", expected="a folder with fetch.json, or folders of such", hint="Name evidence folders"
        )
    return found


def replay_run(policy: Policy, folder: Path, at: str | None = None) -> Replayed:
    """Decide a past run again, by ``policy``.

    Args:
        at: time of the decision; ``None``: as the run was decided.
    """
    try:
        evidence = read_folder(folder)
        former = _former(folder, evidence)
        moment = at or former.get("decided_at") or _time_of(evidence)
        decision = _decide(policy, evidence, former, moment)
        was, blocked = _stated(former, str(folder))
    except QuarantineError as error:
        return Replayed(str(folder), at, None, None, problem=str(error))
    reasons = _reasons(blocked, decision)
    dropped = bool(former.get("approvals")) and not decision.approvals
    notes = ("Its approvals were given under another policy and do not count.",) if dropped else ()
    problem = "" if was else "No decision was recorded for this run."
    return Replayed(str(folder), moment, was, decision.outcome, (*reasons, *notes), problem)


def _former(folder: Path, evidence: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    path = folder / DECISION
    with reading(path, EvidenceMismatch, "a readable file", denied=AccessDenied):
        data = path.read_bytes() if path.is_file() else None
    if data is not None:
        import json

        given = stated_circumstances(data, str(path))
        return {**json.loads(data), "approvals": given["approvals"]}
    results = evidence["gate"].get("results") if "gate" in evidence else None
    if isinstance(results, Mapping) and results:
        given = stated_circumstances(canonical_json(results), str(folder / "gate.json"))
        return {**results, "approvals": given["approvals"]}
    return {}


def _time_of(evidence: Mapping[str, Mapping[str, Any]]) -> str | None:
    """When the gate began, or else the last step that states a time."""
    stated = {name: value_at(each, "environment", "started") for name, each in evidence.items()}
    started = {name: each for name, each in stated.items() if isinstance(each, str)}
    return started.get("gate") or max(started.values(), default=None)


def _stated(former: Mapping[str, Any], where: str) -> tuple[str | None, dict[str, str]]:
    """(the recorded outcome, the verdicts of the rules that blocked then); ``None`` where nothing was recorded.

    Raises:
        EvidenceMismatch: the record is damaged.
    """
    outcome, findings = former.get("outcome"), former.get("findings", [])
    if not isinstance(outcome, str | None):
        raise EvidenceMismatch(f"the decision of {where} is damaged", expected="an outcome", got=repr(outcome)[:80])
    rows = items_at(former, "findings")
    keys = ("rule", "effect", "verdict")
    if not isinstance(findings, list) or not all(isinstance(value_at(row, key), str) for row in rows for key in keys):
        raise EvidenceMismatch(
            f"the decision of {where} is damaged",
            expected=f"findings with {', '.join(keys)}",
            got=repr(findings)[:80],
            hint="Run the gate again; never edit a decision",
        )
    return outcome, {
        row["rule"]: row["verdict"] for row in rows if row["effect"] == "block" and row["verdict"] != "PASS"
    }


def _decide(policy: Policy, evidence: Mapping[str, Any], former: Mapping[str, Any], at: str | None) -> Decision:
    same_policy = former.get("policy_digest") == policy.digest
    approvals: Sequence[Any] = former.get("approvals", ()) if same_policy and at else ()
    return decide(policy, evidence, at=at, approvals=approvals)


def _reasons(blocked: Mapping[str, str], decision: Decision) -> tuple[str, ...]:
    blocks = {
        each.rule: each for each in decision.findings if each.effect == "block" and each.verdict is not Verdict.PASS
    }
    now = [
        f"{name}: {each.verdict.value}, {each.bound}. {each.why}"
        for name, each in blocks.items()
        if name not in blocked or blocked[name] != each.verdict.value
    ]
    gone = [f"{name}: blocks no longer (was {blocked[name]})." for name in blocked if name not in blocks]
    return (*now, *gone)
