"""Policies: what a file may say, checked strictly, as frozen records."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from defense_core.config import digest
from defense_core.errors import PolicyError
from defense_core.evidence import BEFORE_DECISION

POLICY_SCHEMA = 1
BUILT_IN = "integrity."
"""Rule identifiers with this prefix belong to the rules that no policy can switch off."""

Scalar = bool | int | float | str
BoundKind = Literal["max", "min", "equals", "one_of"]
Severity = Literal["block", "warn"]
WhenAbsent = Literal["unknown", "skip"]

POLICY_KEYS = ("schema", "name", "description", "promote", "rules")
BOUND_KEYS = ("max", "min", "equals", "one_of")
RULE_KEYS = ("id", "evidence", "value", *BOUND_KEYS, "severity", "when_absent", "why")

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SEGMENT = r"[A-Za-z_][A-Za-z0-9_-]*(?:\[\*\])?"
_PATH = re.compile(rf"{_SEGMENT}(?:\.{_SEGMENT})*")
_EVIDENCE = re.compile(r"([A-Za-z_]+)(?:\.[A-Za-z0-9_-]+)?")


@dataclass(frozen=True)
class Bound:
    """What a value must satisfy; ends are included.

    Attributes:
        kind: ``max``, ``min``, ``equals`` or ``one_of``.
        limit: a finite number for ``max`` and ``min``; a number, text or truth value for
            ``equals``; a tuple of those for ``one_of``.
    """

    kind: BoundKind
    limit: Scalar | tuple[Scalar, ...]

    def text(self) -> str:
        """``<= 0.05``, ``>= 300``, ``= true`` or ``one of a, b``."""
        if isinstance(self.limit, tuple):
            return "one of " + ", ".join(map(show, self.limit))
        return {"max": "<= ", "min": ">= ", "equals": "= "}[self.kind] + show(self.limit)

    def holds(self, value: Any) -> bool | None:
        """Whether ``value`` satisfies the bound; ``None`` if its type cannot be compared."""
        limits = self.limit if isinstance(self.limit, tuple) else (self.limit,)
        comparable = [limit for limit in limits if _kind(limit) == _kind(value)]
        if not comparable:
            return None
        if self.kind == "max":
            return bool(value <= comparable[0])
        if self.kind == "min":
            return bool(value >= comparable[0])
        return value in comparable


@dataclass(frozen=True)
class Rule:
    """One line of a policy.

    Attributes:
        id: unique in the policy.
        evidence: evidence name; ``<step>.selected`` is the chosen method's.
        value: path inside ``results``; ``name[*]`` means every element.
        bound: what each value must satisfy.
        severity: ``block``, or ``warn``: reported, never decides.
        when_absent: what an evidence file that is not there, or an empty list, means:
            ``unknown``, or ``skip``: the rule is reported as not decided and does not count.
        why: the reason for the rule, one sentence for a person.
    """

    id: str
    evidence: str
    value: str
    bound: Bound
    severity: Severity
    when_absent: WhenAbsent
    why: str


@dataclass(frozen=True)
class Policy:
    """A checked policy.

    Attributes:
        name: what decisions call it.
        promote: whether an allow may promote; ``False`` only observes.
        rules: at least one; at least one blocking one if ``promote``.
        description: for people.
        schema: version of the file format.
    """

    name: str
    promote: bool
    rules: tuple[Rule, ...]
    description: str = ""
    schema: int = POLICY_SCHEMA

    @property
    def digest(self) -> str:
        """Digest of what the policy says; comments, key order and spelt-out defaults do not change it."""
        return digest(self)


def parse_policy(mapping: Mapping[str, Any]) -> Policy:
    """Check a policy that was read from a file.

    Raises:
        PolicyError: an unknown, missing or repeated key or identifier, a wrong type, a bound
            that is missing, doubled or not finite, or another schema version.
    """
    _keys(mapping, POLICY_KEYS, "policy", required=("schema", "name", "promote", "rules"))
    schema = mapping["schema"]
    if isinstance(schema, bool) or schema != POLICY_SCHEMA:
        raise PolicyError("policy has another schema", expected=f"schema: {POLICY_SCHEMA}", got=repr(schema))
    name = _text(mapping["name"], "name", _SLUG)
    promote = mapping["promote"]
    if not isinstance(promote, bool):
        raise _wrong("promote", "true or false", promote)
    if not isinstance(mapping["rules"], (list, tuple)):
        raise _wrong("rules", "a list of rules", mapping["rules"])
    rules = tuple(_rule(each, f"rules[{index}]") for index, each in enumerate(mapping["rules"]))
    _check_rules(name, promote, rules)
    description = mapping.get("description", "")
    if not isinstance(description, str):
        raise _wrong("description", "text", description)
    return Policy(name, promote, rules, description.strip(), POLICY_SCHEMA)


def show(value: object) -> str:
    """A value as people write it in a policy."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _check_rules(name: str, promote: bool, rules: tuple[Rule, ...]) -> None:
    seen: set[str] = set()
    for rule in rules:
        if rule.id in seen:
            raise PolicyError(f"policy {name} has two rules {rule.id!r}", expected="one rule an id", got="two")
        seen.add(rule.id)
    if not rules:
        raise PolicyError(f"policy {name} has no rules", expected="at least one rule", got="none")
    if promote and all(rule.severity == "warn" for rule in rules):
        raise PolicyError(
            f"policy {name} blocks nothing",
            expected="at least one rule with severity: block",
            got="warnings only",
            hint="Set promote: false to observe only",
        )


def _rule(mapping: Any, where: str) -> Rule:
    _keys(mapping, RULE_KEYS, where, required=("id", "evidence", "value", "severity", "why"))
    identifier = _text(mapping["id"], f"{where}.id", _SLUG)
    if identifier.startswith(BUILT_IN):
        raise _wrong(f"{where}.id", f"an id without the reserved prefix {BUILT_IN}", identifier)
    where = f"{where} ({identifier})"
    evidence = _text(mapping["evidence"], f"{where}.evidence", _EVIDENCE)
    step = evidence.partition(".")[0]
    if step not in BEFORE_DECISION:
        raise PolicyError(
            f"{where}.evidence names no step",
            expected="one of " + ", ".join(BEFORE_DECISION),
            got=repr(step),
            hint=_close(step, BEFORE_DECISION),
        )
    return Rule(
        id=identifier,
        evidence=evidence,
        value=_text(mapping["value"], f"{where}.value", _PATH),
        bound=_bound(mapping, where),
        severity=cast(Severity, _choice(mapping["severity"], f"{where}.severity", ("block", "warn"))),
        when_absent=cast(
            WhenAbsent, _choice(mapping.get("when_absent", "unknown"), f"{where}.when_absent", ("unknown", "skip"))
        ),
        why=_text(mapping["why"], f"{where}.why", re.compile(r"\s*\S.*", re.DOTALL)).strip(),
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
    limit = mapping[kind]
    where = f"{where}.{kind}"
    if kind in ("max", "min"):
        if _kind(limit) != "number":
            raise _wrong(where, "a finite number (YAML reads 1e-3 as text: write 0.001)", limit)
        return Bound(kind, limit)
    if kind == "equals":
        return Bound(kind, _scalar(limit, where))
    if not isinstance(limit, (list, tuple)) or not limit:
        raise _wrong(where, "a list of at least one value", limit)
    return Bound(kind, tuple(_scalar(each, f"{where}[{index}]") for index, each in enumerate(limit)))


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, str):
        return "text"
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return "number"
    return "other"


def _scalar(value: Any, where: str) -> Scalar:
    if _kind(value) == "other":
        raise _wrong(where, "text, true, false or a finite number", value)
    return cast(Scalar, value)


def _text(value: Any, where: str, form: re.Pattern[str]) -> str:
    if not isinstance(value, str) or not form.fullmatch(value):
        raise _wrong(where, f"text of the form {form.pattern}", value)
    return value


def _choice(value: Any, where: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise _wrong(where, " or ".join(choices), value)
    return value


def _keys(mapping: Any, known: tuple[str, ...], where: str, *, required: tuple[str, ...]) -> None:
    if not isinstance(mapping, Mapping):
        raise _wrong(where, "a mapping", mapping)
    for key in mapping:
        if key not in known:
            raise PolicyError(
                f"unknown key {key!r} in {where}",
                expected="one of " + ", ".join(known),
                got=repr(key),
                hint=_close(str(key), known),
            )
    missing = [key for key in required if key not in mapping]
    if missing:
        raise PolicyError(
            f"{where} lacks {', '.join(missing)}", expected="every one of " + ", ".join(required), got="no such key"
        )


def _close(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else "Remove it, or see the shipped policies"


def _wrong(where: str, expected: str, got: object) -> PolicyError:
    return PolicyError(f"{where} is malformed", expected=expected, got=f"{got!r} ({type(got).__name__})")
