"""What a policy says, as frozen records; and how a bound judges a value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

from defense_core.config import digest, to_mapping

POLICY_SCHEMA = 1
_MAX_PARTS = 200  # of a pattern: wildcards and what stands between them
_MAX_MATCHED = 10_000  # characters of what a pattern is held against; what is longer matches nothing

Scalar = bool | int | float | str
BoundKind = Literal["max", "min", "equals", "one_of", "matches"]
Severity = Literal["block", "warn"]
WhenAbsent = Literal["unknown", "skip"]
Approvable = Literal["never", "unknown", "fail"]


@dataclass(frozen=True)
class Bound:
    """What a value must satisfy; ends are included.

    Attributes:
        kind: ``max``, ``min``, ``equals``, ``one_of`` or ``matches``.
        limit: a finite number for ``max`` and ``min``; a number, text or truth value for
            ``equals``; a tuple of those for ``one_of``; a tuple of patterns for ``matches``.
    """

    kind: BoundKind
    limit: Scalar | tuple[Scalar, ...]

    @property
    def demand(self) -> tuple[str, frozenset[tuple[str, Scalar]]]:
        """The same for bounds that hold for the same values, in any order: 1 and 1.0 are one limit, 1 and true two."""
        limits = self.limit if isinstance(self.limit, tuple) else (self.limit,)
        return self.kind, frozenset((kind_of(limit), limit) for limit in limits)

    def text(self) -> str:
        """``<= 0.05``, ``>= 300``, ``= true``, ``one of a, b`` or ``matching a or b``."""
        if isinstance(self.limit, tuple):
            if self.kind == "matches":
                return "matching " + " or ".join(map(show, self.limit))
            return "one of " + ", ".join(map(show, self.limit))
        return {"max": "<= ", "min": ">= ", "equals": "= "}[self.kind] + show(self.limit)

    def holds(self, value: Any) -> bool | None:
        """Whether ``value`` satisfies the bound; ``None`` if its type cannot be compared."""
        limits = self.limit if isinstance(self.limit, tuple) else (self.limit,)
        comparable = [limit for limit in limits if kind_of(limit) == kind_of(value)]
        if not comparable:
            return None
        if self.kind == "matches":
            return any(matches(str(pattern), str(value)) for pattern in comparable)
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
        approvable: what a person may approve: ``unknown`` (the rule could not be decided),
            ``fail`` (that, and that it failed), or ``never`` anything.
    """

    id: str
    evidence: str
    value: str
    bound: Bound
    severity: Severity
    when_absent: WhenAbsent
    why: str
    approvable: Approvable = "unknown"


@dataclass(frozen=True)
class Requirements:
    """What every model must bring; each that is asked for is a blocking rule ``require.<name>``.

    Attributes:
        max_evidence_age_days: oldest evidence that a decision may rest on, in days.
        min_clean_images: smallest clean set.
        purification: a model must have been purified, even if the scan found no evidence.
        positive_control: a planted backdoor must have been detected by the same scan.
        sources: patterns of addresses that a model may come from, see :func:`matches`.
        licences: licences that a model may have.
        formats: file formats that a model may come in.
        signatures: what must be signed when the model is promoted, and whenever it is verified.
        approvals: how many different people must approve a rule before an approval counts.
    """

    max_evidence_age_days: float | None = None
    min_clean_images: int | None = None
    purification: bool = False
    positive_control: bool = False
    sources: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    signatures: tuple[str, ...] = ()
    approvals: int = 1


@dataclass(frozen=True)
class Waiver:
    """An exception: a rule that does not count for a while, because its owner said so.

    Attributes:
        rule: identifier of a rule or requirement of the policy; never a built-in one.
        owner: who answers for it.
        reason: why.
        expires: last day that it holds, in UTC: ``2027-01-31``.
        source: digest of the only fetched artifact that it is for; empty: of any.
    """

    rule: str
    owner: str
    reason: str
    expires: str
    source: str = ""


@dataclass(frozen=True)
class Policy:
    """A checked policy.

    Attributes:
        name: what decisions call it.
        promote: whether an allow may promote; ``False`` only observes.
        rules: at least one; at least one blocking one if ``promote``.
        description: for people.
        schema: version of the file format.
        max_unknown_age_days: how long a blocking rule may stay undecided before it fails, in days
            since the oldest evidence that repeats no earlier one was made; ``None``: for ever.
        require: what every model must bring.
        exceptions: rules that do not count for a while.
    """

    name: str
    promote: bool
    rules: tuple[Rule, ...]
    description: str = ""
    schema: int = POLICY_SCHEMA
    max_unknown_age_days: float | None = None
    require: Requirements = field(default_factory=Requirements)
    exceptions: tuple[Waiver, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of what the policy says; comments, key order and spelt-out defaults do not change it.

        What later releases added counts only where a policy uses it, so an old policy keeps its digest.
        """
        mapping = to_mapping(self)
        mapping["require"] = _without(mapping["require"], to_mapping(Requirements()))
        mapping["rules"] = [_without(rule, {"approvable": "unknown"}) for rule in mapping["rules"]]
        return digest(_without(mapping, {"max_unknown_age_days": None, "require": {}, "exceptions": []}))


def matches(pattern: str, text: str) -> bool:
    """Whether ``text`` is what ``pattern`` describes, letter case included.

    ``*`` stands for any characters but ``/``, ``**`` for any. An address that climbs (a segment
    ``..``, spelt out or percent-encoded) matches nothing: it names another place than it shows. Nothing
    matches where the pattern has more than 200 parts or the text more than 10,000 characters.

    Examples:
        >>> matches("s3://models/*", "s3://models/a.pt"), matches("s3://models/*", "s3://models/x/a.pt")
        (True, False)
    """
    parts = [part for part in re.split(r"(\*\*|\*)", pattern) if part]
    if len(parts) > _MAX_PARTS or len(text) > _MAX_MATCHED or ".." in re.split(r"[/\\]", unquote(text)):
        return False
    # Every place in the text that the pattern may have come to: a stranger's pattern is never tried over and over.
    reached = {0}
    for part in parts:
        if part in ("*", "**"):
            reached = _beyond(reached, text, stop="/" if part == "*" else None)
        else:
            reached = {at + len(part) for at in reached if text.startswith(part, at)}
        if not reached:
            return False
    return len(text) in reached


def _beyond(reached: set[int], text: str, *, stop: str | None) -> set[int]:
    """Every place that is reached, and those behind it up to where a ``stop`` begins."""
    found: set[int] = set()
    inside = False
    for at in range(min(reached), len(text) + 1):
        inside = at in reached or (inside and text[at - 1] != stop)
        if inside:
            found.add(at)
    return found


def kind_of(value: Any) -> str:
    """``truth value``, ``text``, ``number`` (finite), or ``other``; only equal kinds are compared."""
    if isinstance(value, bool):
        return "truth value"
    if isinstance(value, str):
        return "text"
    return "number" if is_number(value) else "other"


def is_number(value: Any) -> bool:
    """Whether ``value`` is a finite number; a truth value is none."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))


def show(value: object) -> str:
    """A value as people write it in a policy."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _without(mapping: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in defaults or value != defaults[key]}
