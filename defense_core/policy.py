"""Policy and evidence in, decision out: pure, offline, replayable.

The same policy and the same evidence give the same decision byte for byte, years later.
``UNKNOWN`` never passes: whatever is missing, null, NaN, of the wrong type or undecided itself
leaves the rule undecided, and an undecided blocking rule leaves the decision unknown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from defense_core.config import canonical_json, to_mapping
from defense_core.evidence import Evidence, Reading, evidence_digest, parse_evidence, read
from defense_core.policy_integrity import Subject, integrity_findings, selected_method, subject_of
from defense_core.policy_schema import Bound, Policy, Rule, parse_policy, show
from defense_core.verdict import Finding, Verdict, combine

__all__ = ["Bound", "Decision", "Policy", "Rule", "RuleFinding", "Subject", "decide", "parse_policy"]

DECISION_SCHEMA = 1

Outcome = Literal["allow", "deny", "unknown", "observe"]
Effect = Literal["block", "warn", "skipped"]


@dataclass(frozen=True)
class RuleFinding(Finding):
    """One rule, applied, and what it does to the decision.

    Attributes:
        effect: ``block`` counts; ``warn`` is reported only; ``skipped`` could not be decided
            for want of evidence, and the policy says that this may be.
    """

    effect: Effect


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Attributes:
        verdict: of the built-in and the blocking rules together.
        outcome: ``allow``, ``deny`` or ``unknown`` as the verdict says; ``observe`` whatever
            the verdict, where the policy promotes nothing.
        findings: the built-in rules, then the policy's in its order, one each.
        policy_name: the policy's name.
        policy_digest: digest of what the policy says.
        evidence_digest: digest of all evidence that was given.
        subject: what the decision is about.
    """

    verdict: Verdict
    outcome: Outcome
    findings: tuple[RuleFinding, ...]
    policy_name: str
    policy_digest: str
    evidence_digest: str
    subject: Subject

    @property
    def promotes(self) -> bool:
        """Whether the model may be promoted: only on ``allow``."""
        return self.outcome == "allow"

    def to_mapping(self) -> dict[str, Any]:
        """The decision as JSON types."""
        return {"schema": DECISION_SCHEMA, **to_mapping(self)}

    def to_json(self) -> bytes:
        """Canonical bytes: equal decisions, equal bytes."""
        return canonical_json(self.to_mapping())


def decide(policy: Policy, evidence: Mapping[str, Mapping[str, Any]]) -> Decision:
    """Apply every built-in rule and every rule of ``policy`` to ``evidence``.

    Args:
        policy: from :func:`parse_policy`.
        evidence: evidence files by name. Evidence of steps after the decision (gate, promote,
            report) is ignored, so a finished run's folder replays to the same decision.

    Raises:
        EvidenceMismatch: an evidence file is damaged or of another schema.
    """
    parsed = parse_evidence(evidence)
    method = selected_method(parsed)
    findings = (
        *(RuleFinding(**vars(finding), effect="block") for finding in integrity_findings(parsed)),
        *(_apply(rule, parsed, method) for rule in policy.rules),
    )
    verdict = combine(finding.verdict for finding in findings if finding.effect == "block")
    return Decision(
        verdict=verdict,
        outcome=_outcome(verdict) if policy.promote else "observe",
        findings=findings,
        policy_name=policy.name,
        policy_digest=policy.digest,
        evidence_digest=evidence_digest(evidence, parsed),
        subject=subject_of(parsed),
    )


def _outcome(verdict: Verdict) -> Outcome:
    outcomes: dict[Verdict, Outcome] = {Verdict.PASS: "allow", Verdict.FAIL: "deny", Verdict.UNKNOWN: "unknown"}
    return outcomes[verdict]


def _apply(rule: Rule, evidence: Mapping[str, Evidence], method: str | None) -> RuleFinding:
    step, _, which = rule.evidence.partition(".")
    if which == "selected" and method is None:
        return _undecided(rule, "no candidate was selected", absent=False)
    name = f"{step}.{method}" if which == "selected" else rule.evidence
    source = evidence.get(name)
    if source is None:
        return _undecided(rule, f"evidence {name} is missing", absent=True)
    if source.verdict is Verdict.UNKNOWN:
        return _undecided(rule, f"evidence {name} is undecided itself", absent=False)
    return _compare(rule, read(source.results, rule.value))


def _compare(rule: Rule, readings: Sequence[Reading]) -> RuleFinding:
    if all(reading.absent for reading in readings):
        return _undecided(rule, readings[0].problem, absent=True)
    held = [(reading, rule.bound.holds(reading.value)) for reading in readings]
    failing = [reading for reading, holds in held if holds is False]
    if failing:
        worst = _worst(rule.bound, failing)
        return _finding(rule, Verdict.FAIL, worst.value, f"Not met: {_measured(rule, worst)}", rule.severity)
    open_ones = [reading for reading, holds in held if holds is None]
    if open_ones:
        first = open_ones[0]
        problem = first.problem or f"{rule.value} is {type(first.value).__name__} and cannot be compared"
        return _undecided(rule, problem + _where(first), absent=False)
    worst = _worst(rule.bound, readings)
    return _finding(rule, Verdict.PASS, worst.value, f"Met: {_measured(rule, worst)}", rule.severity)


def _undecided(rule: Rule, problem: str, *, absent: bool) -> RuleFinding:
    skipped = absent and rule.when_absent == "skip"
    fact = f"Not decided: {problem}" + (" (the policy lets this rule rest then)" if skipped else "")
    return _finding(rule, Verdict.UNKNOWN, None, fact, "skipped" if skipped else rule.severity)


def _finding(rule: Rule, verdict: Verdict, value: object, fact: str, effect: Effect) -> RuleFinding:
    return RuleFinding(rule.id, verdict, value, rule.bound.text(), f"{fact}. {rule.why}", effect)


def _worst(bound: Bound, readings: Sequence[Reading]) -> Reading:
    """The reading closest to, or furthest beyond, the bound; the first of equals."""
    if bound.kind == "max":
        return max(readings, key=lambda reading: reading.value)
    if bound.kind == "min":
        return min(readings, key=lambda reading: reading.value)
    return readings[0]


def _measured(rule: Rule, reading: Reading) -> str:
    return f"{rule.value} is {_rounded(rule.bound, reading.value)}{_where(reading)}, demanded is {rule.bound.text()}"


def _rounded(bound: Bound, value: Any) -> str:
    """Four digits are enough to read, except where they would hide on which side of the bound a value lies."""
    if isinstance(value, float):
        near = float(f"{value:.4g}")
        if bound.holds(near) == bound.holds(value):
            return show(near)
    return show(value)


def _where(reading: Reading) -> str:
    return f" ({reading.element})" if reading.element else ""
