"""Time as decisions see it: an argument, never a clock. ISO 8601, UTC, whole seconds."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

from defense_core.errors import ConfigError
from defense_core.evidence import Evidence

SECONDS_A_DAY = 86400
SKEW_S = 300
"""How far the clocks of two machines may differ, in seconds."""


def parse_time(value: Any, where: str) -> datetime:
    """A time with its zone, in UTC, whole seconds.

    Raises:
        ConfigError: no text, no time, or a time without a zone.
    """
    moment = _time(value)
    if moment is None:
        raise ConfigError(
            f"{where} is no time", expected="ISO 8601 with a zone, such as 2027-01-31T12:00:00+00:00", got=repr(value)
        )
    return moment


def time_text(moment: datetime) -> str:
    """``2027-01-31T12:00:00+00:00``."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def is_day(value: Any) -> bool:
    """Whether ``value`` is a day as policies write it: ``2027-01-31``."""
    try:
        return isinstance(value, str) and date.fromisoformat(value).isoformat() == value
    except ValueError:
        return False


def days_between(earlier: datetime, later: datetime) -> float:
    """Days, negative where ``later`` comes first."""
    return (later - earlier).total_seconds() / SECONDS_A_DAY


def expired(day: str, at: datetime) -> bool:
    """Whether the whole ``day`` (``2027-01-31``, UTC) has passed at the time ``at``."""
    return at.date() > date.fromisoformat(day)


def oldest(evidence: Mapping[str, Evidence]) -> tuple[datetime | None, str]:
    """When the oldest evidence was made, and its name.

    Returns:
        ``(None, why)`` where that cannot be told: there is none, or one states no time.
    """
    times: dict[str, datetime] = {}
    for name, each in evidence.items():
        moment = _time(each.started)
        if moment is None:
            return None, f"evidence {name} states no time"
        times[name] = moment
    if not times:
        return None, "there is no evidence"
    name = min(times, key=lambda each: times[each])
    return times[name], name


def undecided_since(evidence: Mapping[str, Evidence]) -> datetime | None:
    """When the clock of the undecided began: with the oldest evidence that repeats no earlier one.

    What repeats the results of earlier work, such as a positive control that was kept, states the time of that work.

    Returns:
        ``None`` where that cannot be told.
    """
    own = {name: each for name, each in evidence.items() if each.results.get("repeats") is None}
    return oldest(own)[0]


def from_the_future(evidence: Mapping[str, Evidence], at: datetime) -> str | None:
    """The name of evidence that was made after ``at``, by more than clocks may differ; ``None``: there is none."""
    for name, each in evidence.items():
        moment = _time(each.started)
        if moment is not None and is_after(moment, at):
            return name
    return None


def is_after(moment: datetime, at: datetime) -> bool:
    """Whether ``moment`` comes after ``at`` by more than clocks may differ."""
    return (moment - at).total_seconds() > SKEW_S


def _time(value: Any) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value)
        return moment.astimezone(UTC).replace(microsecond=0) if moment.tzinfo else None
    except (TypeError, ValueError, OverflowError):
        return None
