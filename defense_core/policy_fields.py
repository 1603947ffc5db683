"""Checks of single fields of a policy file; every refusal says what was expected and what was got."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Mapping
from typing import Any

from defense_core.errors import PolicyError
from defense_core.policy_types import is_number

SLUG = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SENTENCE = re.compile(r"\s*\S.*", re.DOTALL)


def text(value: Any, where: str, form: re.Pattern[str]) -> str:
    """``value``, if it is text of the whole form."""
    if not isinstance(value, str) or not form.fullmatch(value):
        raise wrong(where, f"text of the form {form.pattern}", value)
    return value


def sentence(value: Any, where: str) -> str:
    """``value`` without space around it, if it is text that says something."""
    return text(value, where, _SENTENCE).strip()


def texts(value: Any, where: str) -> tuple[str, ...]:
    """A list of at least one text, none of them blank, none twice."""
    if not isinstance(value, (list, tuple)) or not value:
        raise wrong(where, "a list of at least one text", value)
    found = tuple(text(each, f"{where}[{index}]", _SENTENCE) for index, each in enumerate(value))
    if len(set(found)) < len(found):
        raise wrong(where, "each text once", value)
    return found


def choice(value: Any, where: str, choices: tuple[str, ...]) -> str:
    """``value``, if it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise wrong(where, " or ".join(choices), value)
    return value


def flag(value: Any, where: str) -> bool:
    """``value``, if it is true or false."""
    if not isinstance(value, bool):
        raise wrong(where, "true or false", value)
    return value


def number(value: Any, where: str) -> float:
    """``value``, if it is a finite number above 0 that a float can hold."""
    if not is_number(value) or not 0 < value <= sys.float_info.max:
        raise wrong(where, "a number above 0", value)
    return float(value)


def whole(value: Any, where: str) -> int:
    """``value``, if it is a whole number above 0; 3.0 is one, as JSON has it."""
    if not is_number(value) or value < 1 or value != int(value):
        raise wrong(where, "a whole number above 0", value)
    return int(value)


def keys(mapping: Any, known: tuple[str, ...], where: str, *, required: tuple[str, ...]) -> None:
    """Refuse what is no mapping, an unknown key, and a required key that is not there."""
    if not isinstance(mapping, Mapping):
        raise wrong(where, "a mapping", mapping)
    for key in mapping:
        if key not in known:
            raise PolicyError(
                f"unknown key {key!r} in {where}",
                expected="one of " + ", ".join(known),
                got=repr(key),
                hint=close(str(key), known),
            )
    missing = [key for key in required if key not in mapping]
    if missing:
        raise PolicyError(
            f"{where} lacks {', '.join(missing)}", expected="every one of " + ", ".join(required), got="no such key"
        )


def close(word: str, known: Collection[str]) -> str:
    """A hint: the known word that is nearest to ``word``."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else "Remove it, or see the shipped policies"


def wrong(where: str, expected: str, got: object) -> PolicyError:
    """The error for a value of the wrong type or form."""
    return PolicyError(f"{where} is malformed", expected=expected, got=f"{got!r} ({type(got).__name__})")
