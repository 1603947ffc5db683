"""Groups of command-line options that several commands take whole, written once as a function's parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def takes(group: Callable[..., Any], into: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the command also has the options of ``group``, and gets what ``group`` makes of them as ``into``.

    A name that is in both is the command's own, and is given to both.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        of_group, of_command = _parameters(group), _parameters(command)
        del of_command[into]
        # Named: a required one may then stand behind one with a default.
        merged = {
            name: each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, each in {**of_group, **of_command}.items()
        }

        @functools.wraps(command)
        def wrapper(**given: Any) -> Any:
            made = group(**{name: given[name] for name in of_group})
            return command(**{name: given[name] for name in of_command}, **{into: made})

        wrapper.__signature__ = inspect.Signature(list(merged.values()))  # type: ignore[attr-defined]
        wrapper.__annotations__ = {name: each.annotation for name, each in merged.items()}
        # Otherwise typer reads the signature of the wrapped command.
        del wrapper.__wrapped__  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters with their annotations as objects: the modules of group and command know different names."""
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.values()
    return {each.name: each.replace(annotation=hints.get(each.name, Any)) for each in found}
