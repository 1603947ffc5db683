"""Policy and evidence in, decision out: pure, offline, replayable.

The same policy and the same evidence give the same decision byte for byte, years later.
``UNKNOWN`` never passes: whatever is missing, null, NaN, of the wrong type or undecided itself
leaves the rule undecided, and an undecided blocking rule leaves the decision unknown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from defense_core.config import canonical_json, to_mapping
from defense_core.errors import ConfigError
from defense_core.evidence import DIGEST, Evidence, Reading, evidence_digest, parse_evidence, read
from defense_core.policy_integrity import Subject, integrity_findings, selected_method, subject_of
from defense_core.policy_requirements import age_finding, deferred_signatures, required_rules, signature_findings
from defense_core.policy_schema import parse_policy
from defense_core.policy_time import parse_time, time_text
from defense_core.policy_types import Bound, Policy, Rule, show
from defense_core.policy_waivers import (
    Approval,
    Circumstances,
    Effect,
    RuleFinding,
    approvable_rules,
    check_approvals,
    settled,
)
from defense_core.verdict import Verdict, combine

__all__ = [
    "Approval",
    "Bound",
    "Decision",
    "Policy",
    "Rule",
    "RuleFinding",
    "Subject",
    "approvable_rules",
    "decide",
    "parse_policy",
    "signature_findings",
]

DECISION_SCHEMA = 2
TIMELESS_SCHEMA = 1
"""Decisions of the first releases state no time; they are made again as they were."""
_SINCE_SCHEMA_2 = ("decided_at", "approvals", "supersedes")

Outcome = Literal["allow", "deny", "unknown", "observe"]


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Attributes:
        verdict: of the built-in and the blocking rules together.
        outcome: ``allow``, ``deny`` or ``unknown`` as the verdict says; ``observe`` whatever
            the verdict, where the policy promotes nothing.
        findings: the built-in rules, then what the policy requires, then its rules in its order, one each.
        policy_name: the policy's name.
        policy_digest: digest of what the policy says.
        evidence_digest: digest of all evidence that was given.
        subject: what the decision is about.
        decided_at: the time that it was made at, which ages and expiries count to; ``None`` in
            decisions of schema 1, which knew no time.
        approvals: signed by people, as they were given.
        supersedes: digest of the decision that this one takes the place of, if it does.
    """

    verdict: Verdict
    outcome: Outcome
    findings: tuple[RuleFinding, ...]
    policy_name: str
    policy_digest: str
    evidence_digest: str
    subject: Subject
    decided_at: str | None = None
    approvals: tuple[Approval, ...] = ()
    supersedes: str | None = None

    @property
    def promotes(self) -> bool:
        """Whether the model may be promoted: only on ``allow``."""
        return self.outcome == "allow"

    def to_mapping(self) -> dict[str, Any]:
        """The decision as JSON types."""
        mapping = {"schema": DECISION_SCHEMA, **to_mapping(self)}
        if self.decided_at is not None:
            return mapping
        timeless = {key: value for key, value in mapping.items() if key not in _SINCE_SCHEMA_2}
        return {**timeless, "schema": TIMELESS_SCHEMA}

    def to_json(self) -> bytes:
        """Canonical bytes: equal decisions, equal bytes."""
        return canonical_json(self.to_mapping())


def decide(
    policy: Policy,
    evidence: Mapping[str, Mapping[str, Any]],
    *,
    at: str | None = None,
    approvals: Sequence[Approval] = (),
    supersedes: str | None = None,
) -> Decision:
    """Apply every built-in rule, every requirement and every rule of ``policy`` to ``evidence``.

    Args:
        policy: from :func:`parse_policy`.
        evidence: evidence files by name. Evidence of steps after the decision (gate, sign, promote,
            report) is ignored, so a finished run's folder replays to the same decision.
        at: the time that the decision is made at, ISO 8601 with a zone. It is an argument, never
            the clock, and stands in the decision: what was decided then can be decided again.
            ``None``: no age is known, no exception and no approval counts, nothing becomes overdue.
        approvals: of people, whose signatures were checked.
        supersedes: digest of the decision that this one takes the place of. A decision is never changed.

    Raises:
        EvidenceMismatch: an evidence file is damaged or of another schema, or an approval is of another decision.
        PolicyError: an approval names no rule that can be approved.
        ConfigError: ``at`` is no time, ``supersedes`` no digest, or either is needed and not given.
    """
    parsed = parse_evidence(evidence)
    moment = None if at is None else parse_time(at, "the time of the decision")
    _check_supersedes(supersedes)
    total = evidence_digest(evidence, parsed)
    if moment is not None:
        check_approvals(approvals, policy, total, moment)
    elif approvals or supersedes is not None:
        raise ConfigError("a decision with approvals, or in the place of another, needs its time", expected="at=…")
    subject = subject_of(parsed)
    given = Circumstances(policy, subject.source, parsed, tuple(approvals), moment)
    findings = tuple(settled(finding, given) for finding in _findings(given))
    verdict = combine(finding.verdict for finding in findings if finding.effect == "block")
    return Decision(
        verdict=verdict,
        outcome=_outcome(verdict) if policy.promote else "observe",
        findings=findings,
        policy_name=policy.name,
        policy_digest=policy.digest,
        evidence_digest=total,
        subject=subject,
        decided_at=None if moment is None else time_text(moment),
        approvals=given.approvals,
        supersedes=supersedes,
    )


def _check_supersedes(supersedes: str | None) -> None:
    if supersedes is not None and not (isinstance(supersedes, str) and DIGEST.fullmatch(supersedes)):
        raise ConfigError("supersedes is no digest", expected="sha256:<64 hex digits>", got=repr(supersedes))


def _findings(given: Circumstances) -> Iterator[RuleFinding]:
    policy, evidence = given.policy, given.evidence
    method = selected_method(evidence)
    for finding in integrity_findings(evidence):
        yield RuleFinding(**vars(finding), effect="block")
    for rule in required_rules(policy.require):
        yield _apply(rule, evidence, method)
    limit = policy.require.max_evidence_age_days
    if limit is not None:
        yield RuleFinding(**vars(age_finding(limit, evidence, given.at)), effect="block")
    if policy.require.signatures:
        yield RuleFinding(**vars(deferred_signatures(policy)), effect="later")
    for rule in policy.rules:
        yield _apply(rule, evidence, method)


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


def _undecided(rule: Rule, problem: str, absent: bool) -> RuleFinding:
    skipped = absent and rule.when_absent == "skip"
    fact = f"Not decided: {problem}" + (" (the policy lets this rule rest then)" if skipped else "")
    return _finding(rule, Verdict.UNKNOWN, None, fact, "skipped" if skipped else rule.severity)


def _finding(rule: Rule, verdict: Verdict, value: object, fact: str, effect: Effect) -> RuleFinding:
    return RuleFinding(rule.id, verdict, value, rule.bound.text(), f"{fact}. {rule.why}", effect)


def _worst(bound: Bound, readings: Sequence[Reading]) -> Reading:
    """The reading closest to, or furthest beyond, the bound; the first of equals."""
    choose = {"max": max, "min": min}.get(bound.kind)
    return choose(readings, key=lambda reading: reading.value) if choose else readings[0]


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
