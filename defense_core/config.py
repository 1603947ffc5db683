"""Mappings into frozen dataclasses, strictly; canonical JSON; configuration digests."""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from defense_core.errors import ConfigError
from defense_core.files import sha256_bytes

T = TypeVar("T")


def from_mapping(cls: type[T], mapping: Mapping[str, Any], *, where: str = "") -> T:
    """Build the frozen dataclass ``cls`` from ``mapping``; every key must be a field.

    Numbers are checked, not guessed: a bool is no int, a float counts as an int only where
    it is whole (JSON over KFP turns 3 into 3.0), an int counts as a float.

    Args:
        cls: a dataclass type.
        mapping: keys are field names; missing keys take the field's default.
        where: prefix for messages (``"tsbd"``).

    Raises:
        ConfigError: unknown key, missing key, wrong type, or a value that the dataclass's
            own ``__post_init__`` refuses.
    """
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where or cls.__name__} is malformed", expected="a mapping", got=type(mapping).__name__)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in mapping.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), list(fields), n=1)
            raise ConfigError(
                f"unknown key {_join(where, str(key))!r}",
                expected="one of " + ", ".join(sorted(fields)),
                got=repr(key),
                hint=f"Did you mean {close[0]!r}?" if close else "Remove the key",
            )
        values[key] = _coerce(hints[key], value, _join(where, key))
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(
            f"{where or cls.__name__} lacks {', '.join(missing)}",
            expected="a value for every field without a default",
            got=", ".join(sorted(map(str, mapping))) or "an empty mapping",
        )
    return cls(**values)


def to_mapping(value: Any) -> Any:
    """Dataclasses, tuples and enums as plain JSON values (dict, list, str, number, None)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_mapping(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return _with_text_keys(value, lambda _, item: to_mapping(item))
    if isinstance(value, (list, tuple)):
        return [to_mapping(item) for item in value]
    if isinstance(value, str):
        return str(value.value) if hasattr(value, "value") else value
    if isinstance(value, float):
        return value + 0.0  # -0.0 equals 0.0 and must give the same bytes
    if value is None or isinstance(value, (bool, int)):
        return value
    raise ConfigError("value has no JSON form", expected="a JSON type", got=type(value).__name__)


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    Raises:
        ConfigError: the value holds NaN, Inf or something without a JSON form.
    """
    try:
        text = json.dumps(to_mapping(value), sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        return text.encode()
    except ValueError as error:  # NaN, Inf, or a lone surrogate, which UTF-8 cannot hold
        raise ConfigError("value has no JSON form", expected="finite numbers and text", got=str(error)) from error


def digest(value: Any) -> str:
    """``"sha256:<hex>"`` of the canonical JSON of ``value``."""
    return sha256_bytes(canonical_json(value))


def require(condition: bool, field: str, expected: str, got: object) -> None:
    """Range check for ``__post_init__``: raise :class:`ConfigError` unless ``condition``."""
    if not condition:
        raise ConfigError(f"{field} is out of range", expected=expected, got=got)


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _coerce(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        coerced = value
    elif origin in (typing.Union, types.UnionType):
        coerced = _coerce_union(typing.get_args(hint), value, where)
    elif origin is typing.Literal:
        coerced = _coerce_literal(typing.get_args(hint), value, where)
    elif origin is tuple:
        coerced = _coerce_tuple(typing.get_args(hint), value, where)
    elif origin in (dict, collections.abc.Mapping):
        coerced = _coerce_dict(typing.get_args(hint)[1], value, where)
    elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
        coerced = value if isinstance(value, hint) else from_mapping(hint, value, where=where)
    else:
        coerced = _coerce_scalar(hint, value, where)
    return coerced


def _coerce_union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in options:
        return None
    # An option of the value's own type comes first: 2.0 stays a float under ``int | float``.
    ordered = sorted((option for option in options if option is not type(None)), key=lambda o: o is not type(value))
    for option in ordered[:-1]:
        try:
            return _coerce(option, value, where)
        except ConfigError:
            continue
    return _coerce(ordered[-1], value, where)


def _coerce_literal(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    for choice in choices:
        if choice == value and type(choice) is type(value):
            return choice
    raise _wrong(where, "one of " + ", ".join(map(repr, choices)), value)


def _coerce_tuple(hints: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(where, "a list", value)
    if len(hints) == 2 and hints[1] is Ellipsis:
        hints = (hints[0],) * len(value)
    if len(value) != len(hints):
        raise _wrong(where, f"a list of {len(hints)}", value)
    return tuple(_coerce(h, item, f"{where}[{i}]") for i, (h, item) in enumerate(zip(hints, value, strict=True)))


def _coerce_dict(hint: Any, value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(where, "a mapping", value)
    return _with_text_keys(value, lambda key, item: _coerce(hint, item, _join(where, key)))


def _coerce_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float and number and abs(value) <= sys.float_info.max:
        return float(value)
    mixed_up = (hint is int and isinstance(value, bool)) or hint is float
    if isinstance(hint, type) and isinstance(value, hint) and not mixed_up:
        return value
    raise _wrong(where, getattr(hint, "__name__", str(hint)), value)


def _with_text_keys(mapping: Mapping[Any, Any], convert: Callable[[str, Any], Any]) -> dict[str, Any]:
    converted = {str(key): convert(str(key), item) for key, item in mapping.items()}
    if len(converted) != len(mapping):  # 1 and "1" are two keys, but one in JSON
        raise ConfigError(
            "mapping has two keys of the same text", expected="distinct keys", got=", ".join(map(repr, mapping))
        )
    return converted


def _wrong(where: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(
        f"{where} has the wrong type or value", expected=expected, got=f"{value!r} ({type(value).__name__})"
    )
