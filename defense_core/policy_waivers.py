"""Who may let a rule rest: an exception of the policy, or people who sign for one model.

Also the clock of what is undecided: an unknown that is older than the policy's limit is FAIL. The order is
fixed: exceptions, approvals, then the clock. Built-in rules are out of reach of all but the clock.

Nothing may rest in a decision that is dated before its own evidence: it would call back what expired meanwhile. Nor on
an approval that is dated before what it approves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from defense_core.errors import EvidenceMismatch, PolicyError
from defense_core.evidence import Evidence
from defense_core.policy_requirements import SIGNATURES, requirement_ids
from defense_core.policy_time import days_between, expired, from_the_future, parse_time, undecided_since
from defense_core.policy_types import Approvable, Policy, Waiver
from defense_core.rounding import rounded
from defense_core.verdict import Finding, Verdict

Effect = Literal["block", "warn", "skipped", "later", "excepted", "approved"]


@dataclass(frozen=True)
class RuleFinding(Finding):
    """One rule, applied, and what it does to the decision.

    Attributes:
        effect: ``block`` counts; ``warn`` is reported only; ``skipped`` could not be decided
            for want of evidence, and the policy says that this may be; ``later`` is decided after
            the gate; ``excepted`` and ``approved`` would block, but an exception of the policy or
            named people say that they need not.
    """

    effect: Effect


@dataclass(frozen=True)
class Approval:
    """What a person signed: this rule need not hold for the model that this evidence speaks of.

    Signatures are checked before: this is what an envelope that verified said.

    Attributes:
        rule: identifier of the rule.
        identity: who, as the operator of the gate names the holder of the key; people are counted by it, so whoever
            checks the signatures lets no key have two names.
        reason: why.
        approved_at: when, ISO 8601 with a zone.
        evidence: digest of the evidence that was looked at.
        policy: digest of the policy that was looked at.
        envelope: digest of the signed file.
    """

    rule: str
    identity: str
    reason: str
    approved_at: str
    evidence: str
    policy: str
    envelope: str


@dataclass(frozen=True)
class Circumstances:
    """What decides whether a rule may rest.

    Attributes:
        policy: the policy.
        source: digest of the fetched artifact, if it is known.
        evidence: what the decision rests on.
        approvals: that were given.
        at: time of the decision; ``None``: of a decision without time, where nothing may rest.
    """

    policy: Policy
    source: str | None
    evidence: Mapping[str, Evidence]
    approvals: tuple[Approval, ...]
    at: datetime | None


def check_approvals(approvals: Sequence[Approval], policy: Policy, evidence_digest: str, at: datetime) -> None:
    """Refuse approvals that are not about this decision.

    Raises:
        EvidenceMismatch: one is of other evidence, of another policy, or from after ``at``.
        PolicyError: one names no rule of the policy.
    """
    known = approvable_rules(policy)
    for each in approvals:
        what = f"approval of {each.rule} by {each.identity}"
        if each.rule not in known:
            raise PolicyError(
                f"{what} names no rule that can be approved", expected="one of " + ", ".join(known), got=each.rule
            )
        for field, stated, expected in (
            ("evidence", each.evidence, evidence_digest),
            ("policy", each.policy, policy.digest),
        ):
            if stated != expected:
                raise EvidenceMismatch(
                    f"{what} is about another {field}",
                    expected=expected,
                    got=stated,
                    hint="Ask for an approval of this one",
                )
        if parse_time(each.approved_at, f"approved_at of the {what}") > at:
            raise EvidenceMismatch(f"{what} is from after the decision", expected=at.isoformat(), got=each.approved_at)


def made_after(approved_at: str, evidence: Mapping[str, Evidence]) -> str | None:
    """The name of evidence that an approval of that time cannot be of, as it was made later; ``None``: there is none.

    Raises:
        ConfigError: ``approved_at`` is no time.
    """
    return from_the_future(evidence, parse_time(approved_at, "approved_at"))


def approvable_rules(policy: Policy) -> dict[str, Approvable]:
    """What may be approved of each rule and requirement that blocks; the built-in ones are not among them."""
    required: dict[str, Approvable] = dict.fromkeys(requirement_ids(policy.require), "unknown")
    required.pop(SIGNATURES, None)
    own = {rule.id: rule.approvable for rule in policy.rules if rule.severity == "block"}
    return {**required, **{name: kind for name, kind in own.items() if kind != "never"}}


def settled(finding: RuleFinding, given: Circumstances) -> RuleFinding:
    """``finding`` after exceptions, approvals and the clock of the undecided."""
    if finding.effect != "block" or finding.verdict is Verdict.PASS:
        return finding
    for settle in (_excepted, _approved, _overdue):
        finding = settle(finding, given)
    return finding


def _excepted(finding: RuleFinding, given: Circumstances) -> RuleFinding:
    for waiver in given.policy.exceptions:
        if waiver.rule != finding.rule or given.at is None:
            continue
        if expired(waiver.expires, given.at):
            finding = _noted(finding, f"The exception of {waiver.owner} expired on {waiver.expires}.")
        elif _covers(waiver, given.source):
            problem = _antedated(given)
            if problem:
                finding = _noted(finding, f"The exception of {waiver.owner} does not count: {problem}.")
                continue
            noted = _noted(finding, f"Excepted by {waiver.owner} until {waiver.expires}: {waiver.reason}")
            return replace(noted, effect="excepted")
    return finding


def _antedated(given: Circumstances) -> str:
    """Why the decision cannot have been made at the time that it states; empty: it can."""
    later = None if given.at is None else from_the_future(given.evidence, given.at)
    return "" if later is None else f"evidence {later} is from after the decision"


def _covers(waiver: Waiver, source: str | None) -> bool:
    return not waiver.source or waiver.source == source


def _approved(finding: RuleFinding, given: Circumstances) -> RuleFinding:
    about = [each for each in given.approvals if each.rule == finding.rule]
    if finding.effect != "block" or not about:
        return finding
    kind = approvable_rules(given.policy)[finding.rule]
    if finding.verdict is Verdict.FAIL and kind != "fail":
        return _noted(finding, "An approval was given, but a failure of this rule cannot be approved.")
    problem = _antedated(given)
    if problem:
        return _noted(finding, f"An approval was given and does not count: {problem}.")
    timely = []
    for each in about:
        later = made_after(each.approved_at, given.evidence)
        if later is not None:
            problem = f"it is from before evidence {later}"
            finding = _noted(finding, f"The approval of {each.identity} does not count: {problem}.")
        elif kind == "fail" or not _too_late(each, given):
            timely.append(each)
    people = sorted({each.identity for each in timely})
    if len(people) < given.policy.require.approvals:
        wanted = f"{len(people)} of {given.policy.require.approvals} people approved in time"
        return _noted(finding, f"Approvals do not suffice: {wanted}.")
    reasons = "; ".join(f"{each.identity}: {each.reason}" for each in timely)
    return replace(_noted(finding, f"Approved by {reasons}"), effect="approved")


def _too_late(approval: Approval, given: Circumstances) -> bool:
    limit = given.policy.max_unknown_age_days
    since = undecided_since(given.evidence)
    if limit is None or since is None:
        return False
    return days_between(since, parse_time(approval.approved_at, "approved_at")) > limit


def _overdue(finding: RuleFinding, given: Circumstances) -> RuleFinding:
    limit = given.policy.max_unknown_age_days
    since = undecided_since(given.evidence)
    waiting = finding.effect == "block" and finding.verdict is Verdict.UNKNOWN
    if not waiting or limit is None or since is None or given.at is None:
        return finding
    days = days_between(since, given.at)
    if days <= limit:
        return finding
    told = rounded(days, f"<= {limit}")
    noted = _noted(finding, f"Undecided for {told} days, where the policy allows {limit:g}: this is a failure now.")
    return replace(noted, verdict=Verdict.FAIL)


def _noted(finding: RuleFinding, sentence: str) -> RuleFinding:
    return replace(finding, why=f"{finding.why} {sentence}")
