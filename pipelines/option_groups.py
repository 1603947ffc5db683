"""Groups of command-line options that several commands take whole, written once as a function's parameters."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_type_hints


def takes(
    group: Callable[..., Any],
    into: str,
    *,
    required: Collection[str] = (),
    instead: Mapping[str, Any] | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the command also has the options of ``group``, and gets what ``group`` makes of them as ``into``.

    The options stand where ``into`` stands. A name that is in both is the command's own, and is given to both. A group
    may itself take a group.

    Args:
        required: options that this command cannot do without, though the group has a default for them.
        instead: annotations in place of the group's, by name: the same option, told in other words.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        of_group, of_command = _parameters(group), _parameters(command)
        told = _told(of_group, required, instead or {})
        merged: dict[str, inspect.Parameter] = {}
        for name, each in of_command.items():
            if name == into:
                merged |= {option: of_command.get(option, own) for option, own in told.items()}
            else:
                merged.setdefault(name, each)
        del of_command[into]
        # Named: a required one may then stand behind one with a default.
        signature = inspect.Signature([each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in merged.values()])

        @functools.wraps(command)
        def wrapper(**given: Any) -> Any:
            bound = signature.bind(**given)
            bound.apply_defaults()
            made = group(**{name: bound.arguments[name] for name in of_group})
            return command(**{name: bound.arguments[name] for name in of_command}, **{into: made})

        wrapper.__signature__ = signature  # type: ignore[attr-defined]
        wrapper.__annotations__ = {name: each.annotation for name, each in merged.items()}
        # Otherwise typer reads the signature of the wrapped command.
        del wrapper.__wrapped__  # type: ignore[attr-defined]
        return wrapper

    return decorate


def _told(
    of_group: Mapping[str, inspect.Parameter], required: Collection[str], instead: Mapping[str, Any]
) -> dict[str, inspect.Parameter]:
    """A group's parameters as one command has them, the required ones first."""
    told = {**of_group, **{name: of_group[name].replace(annotation=each) for name, each in instead.items()}}
    first = {name: told.pop(name).replace(default=inspect.Parameter.empty) for name in required}
    return {**first, **told}


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters with their annotations as objects: the modules of group and command know different names."""
    hints = get_type_hints(function, include_extras=True)
    found = inspect.signature(function).parameters.values()
    return {each.name: each.replace(annotation=hints.get(each.name, Any)) for each in found}
