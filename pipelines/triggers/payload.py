"""What a delivery's body says, reduced to a name and a number."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from pipelines.triggers.tables import MAX_NAME_CHARS

ACTED_ON = frozenset({("model_version", "created"), ("model_version_alias", "created")})
"""A new version; or an alias that somebody moved, perhaps to a version that was never judged."""

IGNORED = frozenset(
    {
        ("registered_model", "created"),
        ("model_version_tag", "set"),
        ("model_version_tag", "deleted"),
        ("model_version_alias", "deleted"),
    }
)
"""Events of MLflow's registry that bring no model that was not there before."""

_WITHOUT_VERSION = frozenset({("registered_model", "created"), ("model_version_alias", "deleted")})

MAX_VERSION_DIGITS = 9

_VERSION = re.compile(rf"[1-9][0-9]{{0,{MAX_VERSION_DIGITS - 1}}}", re.ASCII)
_UNUSABLE = re.compile(r"[\x00-\x1f\x7f/:\ud800-\udfff]")


class Malformed(Exception):
    """The body is not one of MLflow's events; the message says why, without quoting it."""


@dataclass(frozen=True)
class Notice:
    """A version that something happened to."""

    model: str
    version: str


def parse_notice(body: bytes) -> Notice | None:
    """The version that an event is about; ``None`` for an event that asks for nothing.

    Source, tags, run and description in the body are not looked at: the registry is asked instead.

    Raises:
        Malformed: no JSON, no known event, or a name or number that no registry could have given.
    """
    event = _mapping(_parsed(body), "body")
    kind = (event.get("entity"), event.get("action"))
    if not all(isinstance(part, str) for part in kind) or kind not in ACTED_ON | IGNORED:
        raise Malformed("unknown event")
    data = _mapping(event.get("data"), "data")
    name = data.get("name")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS or _UNUSABLE.search(name):
        raise Malformed("unusable name")
    if kind in _WITHOUT_VERSION:
        return None
    version = data.get("version")
    if not isinstance(version, str) or not _VERSION.fullmatch(version):
        raise Malformed("unusable version")
    return Notice(name, version) if kind in ACTED_ON else None


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, numbers too long, nested too deep
        raise Malformed("no JSON") from error


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Malformed(f"{what} is no object")
    return value
