"""Figures as people read them beside what was demanded of them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

_BOUND = re.compile(r"(<=|>=|=) ([-+.0-9e]+)")
_HOLDS: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}


def rounded(value: float, bound: str = "", *, digits: int = 4) -> str:
    """``value`` to so many digits; whole where they would hide on which side of ``bound`` it lies.

    Args:
        bound: as findings state it: ``<= 0.05``, ``>= 300``, ``<= 30 days``; anything else bounds no number.

    Examples:
        >>> rounded(0.123456, "<= 0.05"), rounded(0.0500001, "<= 0.05"), rounded(0.0499999, "<= 0.05")
        ('0.1235', '0.0500001', '0.05')
    """
    near = f"{value:.{digits}g}"
    found = _BOUND.search(bound)
    try:
        hidden = found is not None and _hides(value, float(near), _HOLDS[found[1]], float(found[2]))
    except ValueError:  # no number after all
        hidden = False
    return repr(value) if hidden else near


def _hides(value: float, near: float, holds: Callable[[float, float], bool], limit: float) -> bool:
    return holds(value, limit) != holds(near, limit)
