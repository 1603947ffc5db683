"""Cron expressions as Kubeflow Pipelines reads them: six fields, seconds first, in the cluster's time zone (UTC)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from defense_core.errors import ConfigError

_MONTHS = ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")
_DAYS = ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")


@dataclass(frozen=True)
class _Field:
    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()
    question: bool = False

    def value(self, text: str) -> int:
        if text.upper() in self.names:
            return self.names.index(text.upper()) + self.low
        if not re.fullmatch(r"[0-9]{1,2}", text) or not self.low <= int(text) <= self.high:
            raise ValueError(f"{text!r} is not {self.low} to {self.high}")
        return int(text)


_FIELDS = (
    _Field("seconds", 0, 59),
    _Field("minutes", 0, 59),
    _Field("hours", 0, 23),
    _Field("day of month", 1, 31, question=True),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of week", 0, 6, _DAYS, question=True),
)


def parse_cron(text: str) -> str:
    """``text`` with six fields.

    Five fields are the usual cron expression, minutes first. They get the second 0 in front, because
    Kubeflow Pipelines reads five fields as seconds first: ``0 2 * * *`` would be not 02:00, but every
    hour at minute 2.

    Raises:
        ConfigError: not five or six fields, or a field that is out of range.
    """
    parts = text.split()
    if len(parts) == 5:
        parts = ["0", *parts]
    if len(parts) != len(_FIELDS):
        raise ConfigError(
            "the cron expression is malformed",
            expected="5 fields (minute hour day month weekday), or 6 with seconds first",
            got=repr(text),
            hint="For example '0 2 * * *', every night at 02:00 UTC",
        )
    for field, part in zip(_FIELDS, parts, strict=True):
        try:
            _check(field, part)
        except ValueError as error:
            raise ConfigError(
                f"the cron expression is malformed: {field.name}",
                expected=f"{field.low} to {field.high}, *, lists, ranges a-b and steps /n",
                got=f"{part!r}: {error}",
            ) from error
    return " ".join(parts)


def _check(field: _Field, part: str) -> None:
    for each in part.split(","):
        span, slash, step = each.partition("/")
        if slash and not (re.fullmatch(r"[0-9]{1,2}", step) and int(step) > 0):
            raise ValueError(f"step {step!r}")
        if span == "*" or (span == "?" and field.question):
            continue
        low, dash, high = span.partition("-")
        first = field.value(low)
        if dash and field.value(high) < first:
            raise ValueError(f"{span!r} ends before it starts")
