"""What changes from one policy to another, rule by rule, and whether it lets more or less through."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from defense_core.config import to_mapping
from defense_core.policy_requirements import AGE, SIGNATURES, required_rules
from defense_core.policy_types import Bound, Policy, Requirements, Rule, Waiver


class Direction(StrEnum):
    """What a change means for a model at the gate."""

    STRICTER = "stricter"
    LOOSER = "looser"
    OTHER = "other"
    WORDING = "wording"


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        about: the rule, requirement or key.
        direction: what it means; ``other`` where more and less is let through, or neither can be told.
        text: what was and what is.
    """

    about: str
    direction: Direction
    text: str


_ORDER = {
    "severity": ("warn", "block"),
    "when_absent": ("skip", "unknown"),
    "approvable": ("fail", "unknown", "never"),
}
"""Values of a rule's keys, from looser to stricter."""


def diff(old: Policy, new: Policy) -> tuple[Change, ...]:
    """Every difference between two policies, none if they decide and say the same."""
    return tuple(_changes(old, new))


def overall(changes: tuple[Change, ...]) -> Direction | None:
    """``looser`` if anything is; else ``other`` if anything cannot be told; else ``stricter``; ``None``: no change."""
    found = {change.direction for change in changes}
    for direction in (Direction.LOOSER, Direction.OTHER, Direction.STRICTER, Direction.WORDING):
        if direction in found:
            return direction
    return None


def _changes(old: Policy, new: Policy) -> Iterator[Change]:
    for key in ("name", "description"):
        yield from _changed(key, getattr(old, key), getattr(new, key), lambda before, after: Direction.WORDING)
    yield from _changed("promote", old.promote, new.promote, _by(lambda promote: not promote))
    yield from _changed(
        "max_unknown_age_days", old.max_unknown_age_days, new.max_unknown_age_days, _by(_shorter_is_stricter)
    )
    yield from _require_changes(old.require, new.require)
    yield from _rule_changes(old.rules, new.rules)
    yield from _exception_changes(old.exceptions, new.exceptions)


def _require_changes(old: Requirements, new: Requirements) -> Iterator[Change]:
    yield from _rule_changes(required_rules(old), required_rules(new))
    yield from _changed(AGE, old.max_evidence_age_days, new.max_evidence_age_days, _by(_shorter_is_stricter))
    yield from _changed(SIGNATURES, set(old.signatures), set(new.signatures), _more_is_stricter)
    yield from _changed("require.approvals", old.approvals, new.approvals, _by(lambda count: count))


def _rule_changes(old: tuple[Rule, ...], new: tuple[Rule, ...]) -> Iterator[Change]:
    before, after = {rule.id: rule for rule in old}, {rule.id: rule for rule in new}
    for name in dict.fromkeys([*before, *after]):
        if name not in after:
            rule = before[name]
            yield Change(name, _of_presence(rule, Direction.LOOSER), f"removed: {_said(rule)}")
        elif name not in before:
            rule = after[name]
            yield Change(name, _of_presence(rule, Direction.STRICTER), f"added: {_said(rule)}")
        elif changed := _changed_keys(before[name], after[name]):
            yield _rule_change(before[name], after[name], changed)


def _of_presence(rule: Rule, direction: Direction) -> Direction:
    return direction if rule.severity == "block" else Direction.WORDING


def _said(rule: Rule) -> str:
    return f"{rule.severity} unless {rule.value} of {rule.evidence} is {rule.bound.text()}"


def _changed_keys(old: Rule, new: Rule) -> list[str]:
    def said(rule: Rule, key: str) -> Any:
        # Not the bounds themselves: to Python, 1 equals true.
        return rule.bound.demand if key == "bound" else getattr(rule, key)

    keys = ("evidence", "value", "bound", *_ORDER, "why")
    return [key for key in keys if said(old, key) != said(new, key)]


def _rule_change(old: Rule, new: Rule, changed: list[str]) -> Change:
    directions: set[Direction] = set()
    texts: list[str] = []
    for key in changed:
        before, after = getattr(old, key), getattr(new, key)
        directions.add(_direction(key, before, after))
        shown = [each.text() if isinstance(each, Bound) else str(each) for each in (before, after)]
        texts.append(f"{key}: {shown[0]} → {shown[1]}")
    if old.severity != new.severity:
        # Whatever else changed: a rule that only warns lets everything through.
        directions = {_direction("severity", old.severity, new.severity)}
    elif old.severity == "warn":
        directions = {Direction.WORDING}
    return Change(new.id, _together(directions), "; ".join(texts))


def _direction(key: str, before: Any, after: Any) -> Direction:
    if key == "bound":
        return _bound_direction(before, after)
    if key in _ORDER:
        return _by(_ORDER[key].index)(before, after)
    return Direction.WORDING if key == "why" else Direction.OTHER


def _bound_direction(old: Bound, new: Bound) -> Direction:
    if old.kind != new.kind:
        return Direction.OTHER
    before, after = old.limit, new.limit
    if isinstance(before, tuple) and isinstance(after, tuple):
        # Fewer of the same pass less; a pattern may cover another, so only removal and addition are ordered.
        return _more_is_stricter(new.demand[1], old.demand[1])
    if old.kind == "equals":
        return Direction.OTHER
    return _by(lambda limit: limit if old.kind == "min" else -limit)(before, after)


def _exception_changes(old: tuple[Waiver, ...], new: tuple[Waiver, ...]) -> Iterator[Change]:
    before, after = _by_scope(old), _by_scope(new)
    for key in dict.fromkeys([*before, *after]):
        about = f"exception of {key[0]}" + (f" for {key[1]}" if key[1] else "")
        if len(before[key]) == len(after[key]) == 1:
            yield from _exception_change(about, before[key][0], after[key][0])
        else:
            yield from _exceptions_change(about, before[key], after[key])


def _by_scope(exceptions: tuple[Waiver, ...]) -> defaultdict[tuple[str, str], list[Waiver]]:
    found: defaultdict[tuple[str, str], list[Waiver]] = defaultdict(list)
    for each in exceptions:
        found[each.rule, each.source].append(each)
    return found


def _exceptions_change(about: str, old: list[Waiver], new: list[Waiver]) -> Iterator[Change]:
    """What changes where several stand beside each other: the rule rests until the last of them expires."""
    gone, come = Counter(old) - Counter(new), Counter(new) - Counter(old)
    texts = [f"{what}: {to_mapping(each)}" for what, few in (("removed", gone), ("added", come)) for each in few]
    if not texts:
        return
    until, then = (max((each.expires for each in several), default="") for several in (old, new))
    direction = Direction.WORDING if until == then else Direction.LOOSER if then > until else Direction.STRICTER
    yield Change(about, direction, "; ".join(texts))


def _exception_change(about: str, old: Waiver, new: Waiver) -> Iterator[Change]:
    if old == new:
        return
    if old.expires != new.expires:
        direction = Direction.LOOSER if new.expires > old.expires else Direction.STRICTER
        yield Change(about, direction, f"expires: {old.expires} → {new.expires}")
    if replace(old, expires=new.expires) != new:
        text = f"{old.owner}: {old.reason} → {new.owner}: {new.reason}"
        yield Change(about, Direction.WORDING, text)


def _changed(about: str, old: Any, new: Any, direction: Callable[[Any, Any], Direction]) -> Iterator[Change]:
    if old != new:
        yield Change(about, direction(old, new), f"{_shown(old)} → {_shown(new)}")


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, set):
        return ", ".join(sorted(value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _by(strictness: Callable[[Any], Any]) -> Callable[[Any, Any], Direction]:
    def direction(old: Any, new: Any) -> Direction:
        return Direction.STRICTER if strictness(new) > strictness(old) else Direction.LOOSER

    return direction


def _shorter_is_stricter(days: float | None) -> float:
    return float("-inf") if days is None else -days


def _more_is_stricter(old: Set[Any], new: Set[Any]) -> Direction:
    if old < new:
        return Direction.STRICTER
    return Direction.LOOSER if new < old else Direction.OTHER


def _together(directions: set[Direction]) -> Direction:
    counted = directions - {Direction.WORDING}
    if not counted:
        return Direction.WORDING
    return counted.pop() if len(counted) == 1 else Direction.OTHER
