"""Policy files: what one may say, checked strictly, into the records of :mod:`defense_core.policy_types`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, cast

from defense_core.errors import PolicyError
from defense_core.evidence import BEFORE_DECISION, DIGEST
from defense_core.policy_fields import SLUG, choice, close, flag, keys, number, sentence, text, texts, whole, wrong
from defense_core.policy_requirements import SIGNABLE, SIGNATURES, requirement_ids
from defense_core.policy_time import is_day
from defense_core.policy_types import (
    POLICY_SCHEMA,
    Approvable,
    Bound,
    BoundKind,
    Policy,
    Requirements,
    Rule,
    Scalar,
    Severity,
    Waiver,
    WhenAbsent,
    is_number,
    kind_of,
)

BUILT_IN = "integrity."
"""Rule identifiers with this prefix belong to the rules that no policy can switch off."""

POLICY_KEYS = (
    "schema",
    "name",
    "description",
    "promote",
    "max_unknown_age_days",
    "require",
    "rules",
    "exceptions",
)
BOUND_KEYS = ("max", "min", "equals", "one_of", "matches")
RULE_KEYS = ("id", "evidence", "value", *BOUND_KEYS, "severity", "when_absent", "approvable", "why")
REQUIRE_KEYS = tuple(Requirements.__dataclass_fields__)
EXCEPTION_KEYS = tuple(Waiver.__dataclass_fields__)

_SEGMENT = r"[A-Za-z_][A-Za-z0-9_-]*(?:\[\*\])?"
_PATH = re.compile(rf"{_SEGMENT}(?:\.{_SEGMENT})*")
_EVIDENCE = re.compile(r"([A-Za-z_]+)(?:\.[A-Za-z0-9_-]+)?")


def parse_policy(mapping: Mapping[str, Any]) -> Policy:
    """Check a policy that was read from a file.

    Raises:
        PolicyError: an unknown, missing or repeated key or identifier, a wrong type, a bound
            that is missing, doubled or not finite, an exception of no rule, or another schema version.
    """
    keys(mapping, POLICY_KEYS, "policy", required=("schema", "name", "promote", "rules"))
    schema = mapping["schema"]
    if isinstance(schema, bool) or schema != POLICY_SCHEMA:
        raise PolicyError("policy has another schema", expected=f"schema: {POLICY_SCHEMA}", got=repr(schema))
    name = text(mapping["name"], "name", SLUG)
    promote = flag(mapping["promote"], "promote")
    rules = tuple(_rule(each, where) for where, each in _listed(mapping["rules"], "rules"))
    require = _requirements(mapping.get("require", {}))
    _check_rules(name, promote, rules, require)
    exceptions = tuple(_exception(each, where) for where, each in _listed(mapping.get("exceptions", []), "exceptions"))
    _check_exceptions(exceptions, {*requirement_ids(require), *(rule.id for rule in rules)} - {SIGNATURES})
    description = mapping.get("description", "")
    if not isinstance(description, str):
        raise wrong("description", "text", description)
    limit = mapping.get("max_unknown_age_days")
    return Policy(
        name,
        promote,
        rules,
        description.strip(),
        POLICY_SCHEMA,
        max_unknown_age_days=number(limit, "max_unknown_age_days") if "max_unknown_age_days" in mapping else None,
        require=require,
        exceptions=exceptions,
    )


def _listed(value: Any, what: str) -> list[tuple[str, Any]]:
    if not isinstance(value, (list, tuple)):
        raise wrong(what, f"a list of {what}", value)
    return [(f"{what}[{index}]", each) for index, each in enumerate(value)]


def _check_rules(name: str, promote: bool, rules: tuple[Rule, ...], require: Requirements) -> None:
    counted = Counter([*requirement_ids(require), *(rule.id for rule in rules)])
    for identifier, count in counted.items():
        if count > 1:
            raise PolicyError(f"policy {name} has two rules {identifier!r}", expected="one rule an id", got="two")
    if not rules:
        raise PolicyError(f"policy {name} has no rules", expected="at least one rule", got="none")
    if promote and all(rule.severity == "warn" for rule in rules):
        raise PolicyError(
            f"policy {name} blocks nothing",
            expected="at least one rule with severity: block",
            got="warnings only",
            hint="Set promote: false to observe only",
        )


def _check_exceptions(exceptions: tuple[Waiver, ...], known: set[str]) -> None:
    for index, waiver in enumerate(exceptions):
        if waiver.rule not in known:
            raise PolicyError(
                f"exceptions[{index}].rule names no rule of this policy",
                expected="one of " + ", ".join(sorted(known)),
                got=repr(waiver.rule),
                hint=close(waiver.rule, sorted(known)),
            )


def _rule(mapping: Any, where: str) -> Rule:
    keys(mapping, RULE_KEYS, where, required=("id", "evidence", "value", "severity", "why"))
    identifier = text(mapping["id"], f"{where}.id", SLUG)
    if identifier.startswith(BUILT_IN):
        raise wrong(f"{where}.id", f"an id without the reserved prefix {BUILT_IN}", identifier)
    where = f"{where} ({identifier})"
    evidence = text(mapping["evidence"], f"{where}.evidence", _EVIDENCE)
    step = evidence.partition(".")[0]
    if step not in BEFORE_DECISION:
        raise PolicyError(
            f"{where}.evidence names no step",
            expected="one of " + ", ".join(BEFORE_DECISION),
            got=repr(step),
            hint=close(step, BEFORE_DECISION),
        )
    absent = choice(mapping.get("when_absent", "unknown"), f"{where}.when_absent", ("unknown", "skip"))
    approvable = choice(mapping.get("approvable", "unknown"), f"{where}.approvable", ("never", "unknown", "fail"))
    return Rule(
        id=identifier,
        evidence=evidence,
        value=text(mapping["value"], f"{where}.value", _PATH),
        bound=_bound(mapping, where),
        severity=cast(Severity, choice(mapping["severity"], f"{where}.severity", ("block", "warn"))),
        when_absent=cast(WhenAbsent, absent),
        why=sentence(mapping["why"], f"{where}.why"),
        approvable=cast(Approvable, approvable),
    )


def _requirements(mapping: Any) -> Requirements:
    keys(mapping, REQUIRE_KEYS, "require", required=())
    checks: dict[str, Any] = {
        "max_evidence_age_days": number,
        "min_clean_images": whole,
        "purification": flag,
        "positive_control": flag,
        "signatures": _signatures,
        "approvals": whole,
    }
    return Requirements(**{key: checks.get(key, texts)(value, f"require.{key}") for key, value in mapping.items()})


def _signatures(value: Any, where: str) -> tuple[str, ...]:
    named = texts(value, where)
    return tuple(choice(each, f"{where}[{index}]", SIGNABLE) for index, each in enumerate(named))


def _exception(mapping: Any, where: str) -> Waiver:
    keys(mapping, EXCEPTION_KEYS, where, required=("rule", "owner", "reason", "expires"))
    if not is_day(mapping["expires"]):
        raise wrong(f"{where}.expires", "a day such as 2027-01-31", mapping["expires"])
    return Waiver(
        rule=text(mapping["rule"], f"{where}.rule", SLUG),
        owner=sentence(mapping["owner"], f"{where}.owner"),
        reason=sentence(mapping["reason"], f"{where}.reason"),
        expires=mapping["expires"],
        source=text(mapping["source"], f"{where}.source", DIGEST) if "source" in mapping else "",
    )


def _bound(mapping: Mapping[str, Any], where: str) -> Bound:
    given = [key for key in BOUND_KEYS if key in mapping]
    if len(given) != 1:
        raise PolicyError(
            f"{where} needs one bound",
            expected="exactly one of " + ", ".join(BOUND_KEYS),
            got=" and ".join(given) or "none",
        )
    kind = cast(BoundKind, given[0])
    return Bound(kind, _LIMITS[kind](mapping[kind], f"{where}.{kind}"))


def _finite(value: Any, where: str) -> Scalar:
    if not is_number(value):
        raise wrong(where, "a finite number", value)
    return cast(Scalar, value)


def _scalar(value: Any, where: str) -> Scalar:
    if kind_of(value) == "other":
        raise wrong(where, "text, true, false or a finite number", value)
    return cast(Scalar, value)


def _scalars(value: Any, where: str) -> tuple[Scalar, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        raise wrong(where, "a list of at least one value", value)
    return tuple(_scalar(each, f"{where}[{index}]") for index, each in enumerate(value))


_LIMITS: dict[BoundKind, Callable[[Any, str], Scalar | tuple[Scalar, ...]]] = {
    "max": _finite,
    "min": _finite,
    "equals": _scalar,
    "one_of": _scalars,
    "matches": texts,
}
