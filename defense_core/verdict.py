"""Three-state verdicts. UNKNOWN never passes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from defense_core.errors import EXIT_FAIL, EXIT_PASS, EXIT_UNKNOWN


class Verdict(StrEnum):
    """Outcome of a check. There is no truthiness: compare with ``is Verdict.PASS``."""

    PASS = "PASS"  # noqa: S105 - no password
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"

    def __bool__(self) -> bool:
        raise TypeError("a Verdict has three states; compare it with `is Verdict.PASS`")

    @property
    def exit_code(self) -> int:
        """0 for PASS, 1 for FAIL, 2 for UNKNOWN."""
        return {
            Verdict.PASS: EXIT_PASS,
            Verdict.FAIL: EXIT_FAIL,
            Verdict.UNKNOWN: EXIT_UNKNOWN,
        }[self]


@dataclass(frozen=True)
class Finding:
    """One rule, applied.

    Attributes:
        rule: the rule's identifier.
        verdict: its outcome.
        value: what the evidence says (``None`` where it says nothing).
        bound: what the rule demands, readable (``"<= 0.05"``).
        why: one sentence for a person.
    """

    rule: str
    verdict: Verdict
    value: object
    bound: str
    why: str


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """FAIL if any fails; else UNKNOWN if any is unknown or there are none; else PASS."""
    seen = list(verdicts)
    if Verdict.FAIL in seen:
        return Verdict.FAIL
    if not seen or any(verdict is not Verdict.PASS for verdict in seen):
        return Verdict.UNKNOWN
    return Verdict.PASS
