"""Strict mappings, canonical JSON and digests."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum, IntEnum
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defense_core.config import canonical_json, digest, from_mapping, require, to_mapping
from defense_core.errors import EXIT_USAGE, ConfigError, QuarantineError


@dataclass(frozen=True)
class Inner:
    depth: int = 1

    def __post_init__(self) -> None:
        require(self.depth >= 0, "depth", "0 or more", self.depth)


@dataclass(frozen=True)
class Sample:
    steps: int
    rate: float = 0.1
    name: str = "x"
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    level: Literal[1, 2] = 1
    size: tuple[int, int, int] = (3, 32, 32)
    colours: tuple[float, ...] = ()
    limit: float | None = None
    either: int | float = 0
    inner: Inner = field(default_factory=Inner)
    table: Mapping[str, int] = field(default_factory=dict)
    anything: Any = None


whole = st.integers(-(2**53), 2**53)
finite = st.floats(allow_nan=False, allow_infinity=False)
samples = st.builds(
    Sample,
    steps=whole,
    rate=finite,
    name=st.text(st.characters(exclude_categories=["Cs"])),
    on=st.booleans(),
    mode=st.sampled_from(["fast", "slow"]),
    level=st.sampled_from([1, 2]),
    size=st.tuples(whole, whole, whole),
    colours=st.lists(finite, max_size=3).map(tuple),
    limit=st.none() | finite,
    either=whole | finite,
    inner=st.builds(Inner, depth=st.integers(0, 9)),
    table=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), whole, max_size=3),
    anything=st.none() | st.booleans() | whole,
)
json_values = st.recursive(
    st.none() | st.booleans() | whole | finite | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abé", max_size=3), inner, max_size=3),
    max_leaves=12,
)

OTHER = {
    "steps": 2, "rate": 0.2, "name": "y", "on": True, "mode": "slow", "level": 2, "size": (1, 32, 32),
    "colours": (0.5,),
    "limit": 0.0, "either": 1, "inner": Inner(2), "table": {"a": 1}, "anything": "z",
}  # fmt: skip


# -- from_mapping ----------------------------------------------------------------------


@given(samples)
def test_round_trip_through_json(sample):
    again = from_mapping(Sample, json.loads(canonical_json(sample)))
    assert again == sample
    assert digest(again) == digest(sample)
    assert type(again.either) is type(sample.either)


@given(st.integers(-(2**31), 2**31))
def test_whole_floats_become_ints_again(steps):
    """JSON over KFP turns 3 into 3.0."""
    again = from_mapping(Sample, {"steps": float(steps), "size": [1.0, 2.0, 3.0]})
    assert (again.steps, again.size) == (steps, (1, 2, 3))
    assert type(again.steps) is int


def test_defaults_are_taken():
    assert from_mapping(Sample, {"steps": 1}) == Sample(1)


def test_unknown_key_is_named_with_a_close_match():
    with pytest.raises(ConfigError, match=r"unknown key 'tsbd\.stepz'.*Did you mean 'steps'\?$") as caught:
        from_mapping(Sample, {"stepz": 1}, where="tsbd")
    assert caught.value.exit_code == EXIT_USAGE


def test_unknown_key_without_a_close_match():
    with pytest.raises(ConfigError, match="Remove the key"):
        from_mapping(Sample, {"steps": 1, "qqqqqq": 1})


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match="Sample lacks steps"):
        from_mapping(Sample, {})
    with pytest.raises(ConfigError, match=r"fit lacks steps.*got rate"):
        from_mapping(Sample, {"rate": 1}, where="fit")


@pytest.mark.parametrize("mapping", [None, [], "steps: 1", 3])
def test_what_is_no_mapping_is_refused(mapping):
    with pytest.raises(ConfigError, match="expected a mapping"):
        from_mapping(Sample, mapping)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 1.5), ("steps", True), ("steps", "1"), ("steps", None), ("steps", math.inf), ("steps", math.nan),
        ("rate", "0.1"), ("rate", True), ("rate", math.nan), ("rate", math.inf), ("rate", -math.inf), ("rate", 10**400),
        ("rate", None), ("name", 1), ("name", None), ("on", 1), ("on", "yes"), ("on", None), ("mode", "medium"),
        ("mode", 1),
        ("mode", ["fast"]), ("level", 3), ("level", True), ("level", "1"), ("size", [1, 2]), ("size", [1, 2, 3, 4]),
        ("size", "abc"), ("size", [1, 2, "3"]), ("size", 3), ("colours", [0.1, None]), ("colours", 0.1), ("limit", "x"),
        ("either", "x"), ("either", math.nan), ("inner", 3), ("inner", {"dept": 1}), ("inner", {"depth": "1"}),
        ("inner", {"depth": -1}), ("table", {"a": 1.5}), ("table", [1]), ("table", {1: 1, "1": 2}),
    ],
)  # fmt: skip
def test_wrong_values_are_refused(key, value):
    with pytest.raises(ConfigError):
        from_mapping(Sample, {"steps": 1, key: value})


@pytest.mark.parametrize(
    ("mapping", "place"),
    [
        ({"steps": "1"}, "purify.steps"),
        ({"steps": 1, "size": [1, 2, "3"]}, "purify.size[2]"),
        ({"steps": 1, "inner": {"depth": "x"}}, "purify.inner.depth"),
        ({"steps": 1, "table": {"a": "x"}}, "purify.table.a"),
    ],
)
def test_errors_say_where(mapping, place):
    with pytest.raises(ConfigError) as caught:
        from_mapping(Sample, mapping, where="purify")
    assert place in str(caught.value)


def test_none_is_allowed_only_where_it_is_declared():
    assert from_mapping(Sample, {"steps": 1, "limit": None}).limit is None
    assert from_mapping(Sample, {"steps": 1, "limit": 2}).limit == 2.0


def test_nested_dataclasses_pass_through():
    assert from_mapping(Sample, {"steps": 1, "inner": Inner(4)}).inner == Inner(4)


# -- canonical JSON and digests --------------------------------------------------------


@given(json_values)
def test_canonical_json_is_stable_under_reading_and_writing(value):
    data = canonical_json(value)
    assert json.loads(data) == value
    assert canonical_json(json.loads(data)) == data


@given(st.dictionaries(st.text("abc", max_size=3), st.integers(), min_size=2))
def test_key_order_does_not_matter(mapping):
    assert canonical_json(dict(reversed(mapping.items()))) == canonical_json(mapping)


def test_canonical_json_is_compact_sorted_utf8():
    assert (
        canonical_json({"b": (1, 2.5), "a": "é", "c": None, "d": True})
        == '{"a":"é","b":[1,2.5],"c":null,"d":true}'.encode()
    )


def test_negative_zero_equals_zero():
    assert canonical_json([-0.0, {"a": -0.0}]) == canonical_json([0.0, {"a": 0.0}]) == b'[0.0,{"a":0.0}]'


def test_enums_give_their_values():
    class Colour(str, Enum):  # noqa: UP042 (the form that Verdict has)
        RED = "red"

    class Level(IntEnum):
        HIGH = 3

    assert canonical_json([Colour.RED, Level.HIGH]) == b'["red",3]'
    assert to_mapping(Colour.RED) == "red"
    assert type(to_mapping(Colour.RED)) is str


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, b"bytes", {1, 2}, object(), "\ud800", {"a": [math.nan]}, Sample, 1j]
)
def test_what_has_no_json_form_is_refused(value):
    with pytest.raises(ConfigError):
        canonical_json(value)


def test_keys_that_would_merge_are_refused():
    assert canonical_json({1: "a"}) == b'{"1":"a"}'
    with pytest.raises(ConfigError, match="same text"):
        canonical_json({1: "a", "1": "b"})


def test_digest_changes_with_every_field():
    base = Sample(1)
    seen = {digest(base)}
    for each in fields(Sample):
        seen.add(digest(replace(base, **{each.name: OTHER[each.name]})))
    assert len(seen) == len(fields(Sample)) + 1
    assert all(value.startswith("sha256:") and len(value) == 71 for value in seen)


def test_digest_is_pinned():
    """The same configuration has the same digest in every release."""
    assert digest({"a": 1}) == "sha256:015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"


# -- messages --------------------------------------------------------------------------


def test_require_names_the_field():
    with pytest.raises(ConfigError, match=r"depth is out of range: expected 0 or more, got -1\.$"):
        Inner(-1)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (QuarantineError("It broke."), "It broke."),
        (QuarantineError("It broke", hint="Mend it."), "It broke. Mend it."),
        (QuarantineError("It broke", expected=1, got=0), "It broke: expected 1, got 0."),
        (QuarantineError("It broke", got=0, hint="Did you mean 1?"), "It broke: got 0. Did you mean 1?"),
    ],
)
def test_errors_read_as_sentences(error, text):
    assert str(error) == text
