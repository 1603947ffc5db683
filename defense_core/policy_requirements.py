"""What a policy requires of every model, as rules; and what can only be checked once it is signed.

Most requirements are ordinary rules that nobody has to write. The age of evidence is a rule over
time. Signatures are made after the decision, over it: at the gate they stand in the decision as
``later``, and :func:`signature_findings` decides them at promotion and whenever a release is verified.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from defense_core.evidence import Evidence
from defense_core.policy_time import days_between, from_the_future, oldest
from defense_core.policy_types import Bound, Policy, Requirements, Rule
from defense_core.rounding import rounded
from defense_core.verdict import Finding, Verdict

PREFIX = "require."
AGE = PREFIX + "max_evidence_age_days"
SIGNATURES = PREFIX + "signatures"
SIGNABLE = ("model", "attestations")
"""What a release can be required to have signed: its files as a whole, and the statement of every step."""

_AGE_WHY = "What was measured long ago says little about what is promoted today."
_SIGNATURES_WHY = "Whoever serves the model must be able to check that nobody changed it or its evidence."


def required_rules(require: Requirements) -> tuple[Rule, ...]:
    """The requirements that are ordinary rules, in a fixed order."""
    asked: list[tuple[str, str, str, Bound, str]] = []
    if require.min_clean_images is not None:
        why = "A clean set that is too small neither repairs nor measures a model."
        asked.append(("min_clean_images", "fetch", "clean_images", Bound("min", require.min_clean_images), why))
    if require.purification:
        why = "A scan that finds no evidence is no proof; this policy has every model purified."
        asked.append(("purification", "select", "purified", Bound("equals", True), why))
    if require.positive_control:
        why = "That a planted backdoor was found is what makes a scan without findings mean something."
        asked.append(("positive_control", "control", "detected", Bound("equals", True), why))
    if require.sources:
        why = "Models may come from approved places only."
        asked.append(("sources", "fetch", "uri", Bound("matches", require.sources), why))
    if require.licences:
        why = "The licence must be one that the organisation has cleared."
        asked.append(("licences", "fetch", "licence", Bound("one_of", require.licences), why))
    if require.formats:
        why = "Only formats that can be read without running code of the file are let in."
        asked.append(("formats", "fetch", "formats[*]", Bound("one_of", require.formats), why))
    return tuple(
        Rule(PREFIX + name, evidence, value, bound, "block", "unknown", why)
        for name, evidence, value, bound, why in asked
    )


def requirement_ids(require: Requirements) -> tuple[str, ...]:
    """Identifiers of all findings that the requirements give at the gate, in their order."""
    ids = [rule.id for rule in required_rules(require)]
    if require.max_evidence_age_days is not None:
        ids.append(AGE)
    if require.signatures:
        ids.append(SIGNATURES)
    return tuple(ids)


def age_finding(limit_days: float, evidence: Mapping[str, Evidence], at: datetime | None) -> Finding:
    """Whether all evidence is young enough at the time ``at``; UNKNOWN where that cannot be told."""
    bound = Bound("max", limit_days).text() + " days"
    if at is None:
        return _undecided_age("the decision states no time", bound)
    later = from_the_future(evidence, at)
    if later is not None:
        return _undecided_age(f"evidence {later} is from after the decision", bound)
    since, name = oldest(evidence)
    if since is None:
        return _undecided_age(name, bound)
    days = days_between(since, at)
    verdict = Verdict.PASS if days <= limit_days else Verdict.FAIL
    met = "Met" if verdict is Verdict.PASS else "Not met"
    why = f"{met}: the oldest evidence ({name}) is {rounded(days, bound, digits=6)} days old. {_AGE_WHY}"
    return Finding(AGE, verdict, round(days, 5), bound, why)


def deferred_signatures(policy: Policy) -> Finding:
    """What the gate says about signatures: not yet, because they are made over its decision."""
    wanted = _wanted(policy)
    why = f"Checked at promotion and by verify, since the decision is among what is signed. {_SIGNATURES_WHY}"
    return Finding(SIGNATURES, Verdict.UNKNOWN, None, wanted, why)


def signature_findings(policy: Policy, signed: Collection[str] | None) -> tuple[Finding, ...]:
    """Whether a finished release is signed as ``policy`` requires.

    Args:
        signed: what was found to be signed, of :data:`SIGNABLE`, by whoever checked the signatures
            (``sign.signed``); ``None``: nobody could check.

    Returns:
        One finding, or none where the policy requires no signature.
    """
    if not policy.require.signatures:
        return ()
    wanted = _wanted(policy)
    if signed is None:
        return (Finding(SIGNATURES, Verdict.UNKNOWN, None, wanted, f"Signatures were not checked. {_SIGNATURES_WHY}"),)
    lacking = [name for name in policy.require.signatures if name not in signed]
    found = ", ".join(sorted(signed)) or None
    if lacking:
        return (
            Finding(SIGNATURES, Verdict.FAIL, found, wanted, f"Not signed: {', '.join(lacking)}. {_SIGNATURES_WHY}"),
        )
    return (Finding(SIGNATURES, Verdict.PASS, found, wanted, f"Signed: {found}. {_SIGNATURES_WHY}"),)


def _wanted(policy: Policy) -> str:
    return "signed: " + ", ".join(policy.require.signatures)


def _undecided_age(problem: str, bound: str) -> Finding:
    return Finding(AGE, Verdict.UNKNOWN, None, bound, f"Not decided: {problem}. {_AGE_WHY}")
