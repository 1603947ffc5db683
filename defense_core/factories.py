"""Calling a network builder: which of the operator's own may be called, and with which arguments."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from defense_core.errors import ArchitectureNotAllowed, ConfigError

_SPEC = re.compile(r"(?P<module>[A-Za-z_]\w*(\.[A-Za-z_]\w*)*):(?P<factory>[A-Za-z]\w*)")
_ENTRY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*(:[A-Za-z]\w*)?")
# Trusting one of these whole would let an artifact name any of their functions.
_TOO_WIDE = frozenset({"torch", "torchvision", "timm", "numpy", "defense_core"})
_SEED = 0
# A library's builder loops over depths that the artifact may choose; even without memory that takes for ever.
_MAX_SIZE_ASKED = 16_384
_MAX_LEVELS = 32  # of lists and mappings in the arguments


@contextmanager
def without_global_rng() -> Iterator[None]:
    """A fixed CPU seed inside; outside, torch's random state is what it was."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(_SEED)
    try:
        yield
    finally:
        generator.set_state(state)


def trusted_factory(name: str, trusted_modules: tuple[str, ...]) -> Callable[..., Any]:
    """The operator's own ``package.module:factory``, if ``trusted_modules`` allows it.

    Raises:
        ConfigError: an entry of ``trusted_modules`` is malformed or trusts a whole library.
        ArchitectureNotAllowed: the factory is not covered, cannot be imported, or was only
            imported into the trusted module from an untrusted one.
    """
    trusted_modules = check_trusted_modules(trusted_modules)
    match = _SPEC.fullmatch(name)
    if match is None:
        raise ArchitectureNotAllowed(
            f"architecture {name!r} is malformed", expected="package.module:factory", got=repr(name)
        )
    module_name, factory_name = match["module"], match["factory"]
    if not _covered(module_name, factory_name, trusted_modules):
        raise ArchitectureNotAllowed(
            f"architecture {name!r} is not in a trusted module",
            expected="a module below " + (", ".join(trusted_modules) or "(the allow-list is empty)"),
            got=module_name,
            hint=f"If you installed and reviewed this code, add {name!r} to trusted_modules; "
            "never do so because an artifact asks for it",
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ArchitectureNotAllowed(
            f"module {module_name} cannot be imported",
            expected="an installed module",
            got=str(error),
            hint="Install the package that holds it into the environment or image that runs this command",
        ) from error
    factory = getattr(module, factory_name, None)
    home = getattr(factory, "__module__", None)
    # A name that the operator spelled out may live anywhere; under a trusted package only what the
    # package defines itself counts, not what it happens to import (`from os import system`).
    vouched = name in trusted_modules or (isinstance(home, str) and _covered(home, factory_name, trusted_modules))
    if not callable(factory) or not vouched:
        close = difflib.get_close_matches(factory_name, [key for key in vars(module) if not key.startswith("_")], n=1)
        raise ArchitectureNotAllowed(
            f"{module_name} has no trusted factory {factory_name!r}",
            expected="a function or nn.Module class that a trusted module defines itself",
            got="nothing of that name" if factory is None else f"an object of {home or 'no module'}",
            hint=f"Did you mean {module_name}:{close[0]}?" if close else None,
        )
    found: Callable[..., Any] = factory
    return found


def call_factory(factory: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """``factory(**arguments)`` after checking names and JSON types.

    Raises:
        ArchitectureNotAllowed: an argument asks for weights, or the result is no ``nn.Module``.
        ConfigError: unknown, missing or refused arguments.
    """
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise ConfigError(f"arguments of {name} are malformed", expected="a mapping by name", got=repr(arguments))
    refused = getattr(factory, "refused", None)
    for key, value in arguments.items():
        if refused is not None and refused.fullmatch(key):
            raise ArchitectureNotAllowed(
                f"architecture {name} was given {key!r}",
                expected="a network without weights",
                got=f"{key}={value!r}",
                hint="Weights come from the model file alone; remove the argument",
            )
        _check_json(value, f"{name}.{key}")
    if refused is not None and (size := _size_asked({**arguments, "num_classes": 0})) > _MAX_SIZE_ASKED:
        raise ConfigError(
            f"architecture {name} is asked to be too large",
            expected=f"numbers that add up to at most {_MAX_SIZE_ASKED} (num_classes aside)",
            got=f"{size:g}",
        )
    values = _checked(factory, name, arguments)
    try:
        model = factory(**values)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"architecture {name} cannot be built",
            expected="arguments that the builder accepts: "
            + (", ".join(_valid_names(factory)) or "see its documentation"),
            got=f"{type(error).__name__}: {error}",
        ) from error
    if not isinstance(model, nn.Module):
        raise ArchitectureNotAllowed(
            f"factory {name} returned no network",
            expected="torch.nn.Module",
            got=type(model).__name__,
            hint="The factory must return the module itself, without wrapper or tuple",
        )
    return model


def _checked(factory: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(factory).parameters
    open_ended = any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
    values = dict(arguments)
    for key, value in arguments.items():
        if key not in parameters:
            if not open_ended:
                raise _unknown_argument(name, key, list(parameters))
            continue
        # KFP turns 10 into 10.0; a whole float where the default is an int is that int.
        default = parameters[key].default
        if isinstance(default, int) and not isinstance(default, bool):
            if isinstance(value, float) and value.is_integer():
                values[key] = int(value)
            elif isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{name}.{key} has the wrong type", expected="a whole number", got=repr(value))
        elif isinstance(default, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ConfigError(f"{name}.{key} has the wrong type", expected="a number", got=repr(value))
    classes = values.get("num_classes")
    if isinstance(classes, float) and classes.is_integer():
        values["num_classes"] = classes = int(classes)
    if "num_classes" in values and not (isinstance(classes, int) and 1 <= classes <= 100_000):
        raise ConfigError(f"{name}.num_classes is out of range", expected="1 to 100000", got=repr(classes))
    channels = values.get("in_channels", 1)
    if isinstance(channels, int) and not 1 <= channels <= 1024:
        raise ConfigError(f"{name}.in_channels is out of range", expected="1 to 1024", got=repr(channels))
    return values


def _unknown_argument(name: str, key: str, valid: list[str]) -> ConfigError:
    close = difflib.get_close_matches(key, valid, n=1)
    return ConfigError(
        f"architecture {name} has no argument {key!r}",
        expected="one of " + ", ".join(valid) if valid else "no arguments",
        got=repr(key),
        hint=f"Did you mean {close[0]!r}?" if close else "Remove the argument",
    )


def _valid_names(factory: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(getattr(factory, "builder", factory)).parameters.values()
    refused = getattr(factory, "refused", None)
    named = [item.name for item in parameters if item.kind is not inspect.Parameter.VAR_KEYWORD]
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters):
        named += ["num_classes", "and those of the model's class"]
    return [key for key in named if refused is None or not refused.fullmatch(key)]


def _size_asked(value: Any) -> float:
    if isinstance(value, Mapping):
        return sum(_size_asked(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_size_asked(item) for item in value)
    # An integer of hundreds of digits is no float.
    return float(min(abs(value), 10**18)) if isinstance(value, (int, float)) else 0.0


def _check_json(value: Any, where: str, levels: int = _MAX_LEVELS) -> None:
    if not levels:
        raise ConfigError("architecture arguments are nested too deeply", expected=f"at most {_MAX_LEVELS} levels")
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            _check_json(item, where, levels - 1)
        return
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _check_json(item, f"{where}.{key}", levels - 1)
        return
    raise ConfigError(f"{where} has no JSON form", expected="a JSON type", got=type(value).__name__)


def check_trusted_modules(entries: Iterable[str]) -> tuple[str, ...]:
    """The operator's allow-list, sorted and without repetitions, after checking every entry.

    Raises:
        ConfigError: an entry is malformed, or trusts the standard library or a whole framework.
    """
    for entry in (found := tuple(entries)):
        _check_entry(entry)
    return tuple(sorted(set(found)))


def _check_entry(entry: str) -> None:
    if not isinstance(entry, str) or not _ENTRY.fullmatch(entry):
        raise ConfigError(
            "trusted_modules holds a malformed entry",
            expected="package, package.module or package.module:factory",
            got=repr(entry),
        )
    root = entry.split(":", maxsplit=1)[0].split(".", maxsplit=1)[0]
    if root in sys.stdlib_module_names or (":" not in entry and root in _TOO_WIDE):
        raise ConfigError(
            "trusted_modules would trust a whole library",
            expected="your own package",
            got=repr(entry),
            hint="Name the package that defines your network, or one factory as package.module:factory",
        )


def _covered(module: str, factory: str, trusted_modules: tuple[str, ...]) -> bool:
    for entry in trusted_modules:
        trusted, _, only = entry.partition(":")
        if only:
            if module == trusted and factory == only:
                return True
        elif module == trusted or module.startswith(trusted + "."):
            return True
    return False
