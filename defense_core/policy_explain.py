"""A policy in plain sentences, and what in it does not do what its author will have meant."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from defense_core.policy_requirements import AGE, SIGNATURES, required_rules, requirement_ids
from defense_core.policy_time import expired
from defense_core.policy_types import Bound, Policy, Rule, Waiver, show

_APPROVABLE = {
    "never": "Nobody may approve it.",
    "unknown": "If it is undecided, a person may approve it; a failure never.",
    "fail": "A person may approve it, even if it failed.",
}


@dataclass(frozen=True)
class Sentence:
    """One statement about a policy.

    Attributes:
        about: the rule, requirement or key that it is about.
        text: the sentence.
    """

    about: str
    text: str


def explain(policy: Policy) -> tuple[Sentence, ...]:
    """What ``policy`` means, in its order."""
    return tuple(_sentences(policy))


def remarks(policy: Policy, at: datetime) -> tuple[Sentence, ...]:
    """What is valid and yet wrong at the time ``at``: expired exceptions, parts without effect, contradictions."""
    return (*_exception_remarks(policy, at), *_rule_remarks(policy))


def _sentences(policy: Policy) -> Iterator[Sentence]:
    if policy.description:
        yield Sentence("description", policy.description)
    if policy.promote:
        text = "A model is promoted only if all that blocks below holds; what cannot be decided promotes nothing."
    else:
        text = "Everything is decided and reported, and nothing is ever promoted."
    yield Sentence("promote", text)
    yield Sentence(
        "integrity",
        "Always, and not to be switched off: one source, one model from choice to export, its lineage from the "
        "fetched model, the exported file's digest, and every step ended well.",
    )
    limit = policy.max_unknown_age_days
    if limit is None:
        yield Sentence("max_unknown_age_days", "What is undecided stays undecided until somebody acts.")
    else:
        text = f"What is still undecided {limit:g} days after the run's own oldest evidence was made has failed."
        yield Sentence("max_unknown_age_days", text)
    yield from _requirement_sentences(policy)
    for rule in policy.rules:
        yield Sentence(rule.id, _rule_sentence(rule))
    for waiver in policy.exceptions:
        yield Sentence(f"exception of {waiver.rule}", _exception_sentence(waiver))


def _requirement_sentences(policy: Policy) -> Iterator[Sentence]:
    require = policy.require
    for rule in required_rules(require):
        yield Sentence(rule.id, f"Required: {rule.value} of {rule.evidence} must be {_words(rule.bound)}. {rule.why}")
    if require.max_evidence_age_days is not None:
        text = f"Required: no evidence is older than {require.max_evidence_age_days:g} days when the decision is made."
        yield Sentence(AGE, text)
    if require.signatures:
        wanted = " and ".join(require.signatures)
        text = f"Required at promotion and whenever the release is verified: signatures over its {wanted}."
        yield Sentence(SIGNATURES, text)
    if require.approvals > 1:
        yield Sentence("require.approvals", f"An approval counts once {require.approvals} different people gave it.")


def _rule_sentence(rule: Rule) -> str:
    effect = "Blocks" if rule.severity == "block" else "Only warns"
    text = f"{effect} unless {rule.value} of {rule.evidence} is {_words(rule.bound)}. {rule.why}"
    absent = "rests" if rule.when_absent == "skip" else "is undecided"
    text += f" Where there is nothing to read, it {absent}."
    return f"{text} {_APPROVABLE[rule.approvable]}" if rule.severity == "block" else text


def _words(bound: Bound) -> str:
    if isinstance(bound.limit, tuple):
        listed = " or ".join(map(show, bound.limit))
        return f"an address or text like {listed}" if bound.kind == "matches" else listed
    return {"max": "at most ", "min": "at least ", "equals": ""}[bound.kind] + show(bound.limit)


def _exception_sentence(waiver: Waiver) -> str:
    scope = f"for the artifact {waiver.source}" if waiver.source else "for every model"
    return f"Does not count {scope} until {waiver.expires}, as {waiver.owner} decided: {waiver.reason}"


def _exception_remarks(policy: Policy, at: datetime) -> Iterator[Sentence]:
    warnings = {rule.id for rule in policy.rules if rule.severity == "warn"}
    for waiver in policy.exceptions:
        about = f"exception of {waiver.rule}"
        if expired(waiver.expires, at):
            yield Sentence(about, f"It expired on {waiver.expires}; {waiver.owner} should renew or remove it.")
        if waiver.rule in warnings:
            yield Sentence(about, "It has no effect: the rule only warns.")
    blocking = {*requirement_ids(policy.require), *(rule.id for rule in policy.rules if rule.severity == "block")}
    standing = {each.rule for each in policy.exceptions if not each.source and not expired(each.expires, at)}
    if blocking and blocking <= standing:
        yield Sentence(
            "exceptions", "Every blocking rule is excepted for every model: only what is built in still blocks."
        )


def _rule_remarks(policy: Policy) -> Iterator[Sentence]:
    for index, rule in enumerate(policy.rules):
        if rule.severity == "warn" and rule.approvable != "unknown":
            yield Sentence(rule.id, "approvable has no effect: the rule only warns.")
        for other in policy.rules[:index]:
            if (other.evidence, other.value) != (rule.evidence, rule.value):
                continue
            if other.bound.demand == rule.bound.demand:
                yield Sentence(rule.id, f"It demands the same as {other.id}.")
            elif _contradict(other, rule):
                yield Sentence(rule.id, f"No value satisfies both this rule and {other.id}.")
    age, unknown = policy.require.max_evidence_age_days, policy.max_unknown_age_days
    if age is not None and unknown is not None and unknown > age:
        text = "It never comes into play: evidence is too old before that, by require.max_evidence_age_days."
        yield Sentence("max_unknown_age_days", text)


def _contradict(one: Rule, other: Rule) -> bool:
    bounds = {one.bound.kind: one.bound, other.bound.kind: other.bound}
    if set(bounds) == {"max", "min"}:
        return bounds["min"].holds(bounds["max"].limit) is False
    fixed = bounds.get("equals")
    if fixed is None:
        return False
    rest = other.bound if one.bound is fixed else one.bound
    return rest.holds(fixed.limit) is not True
