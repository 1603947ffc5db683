"""The JSON Schema that editors complete by accepts what the parser accepts, and nothing else."""

import json

import jsonschema
import pytest

from defense_core.errors import PolicyError
from defense_core.policy import parse_policy
from defense_core.policy_schema import BOUND_KEYS, EXCEPTION_KEYS, POLICY_KEYS, REQUIRE_KEYS, RULE_KEYS
from tests.unit.policy_records import FULL, POLICIES, policy_mapping, rule

SCHEMA = json.loads((POLICIES / "schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker(["date"]))


def agree(mapping) -> bool:
    """Whether both accept or both refuse ``mapping``."""
    try:
        parse_policy(mapping)
        accepted = True
    except PolicyError:
        accepted = False
    return VALIDATOR.is_valid(mapping) is accepted


def test_the_json_schema_is_one_and_knows_every_key():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for known, described in (
        (POLICY_KEYS, SCHEMA),
        (RULE_KEYS, SCHEMA["$defs"]["rule"]),
        (REQUIRE_KEYS, SCHEMA["$defs"]["require"]),
        (EXCEPTION_KEYS, SCHEMA["$defs"]["exception"]),
    ):
        assert set(described["properties"]) == set(known)
        assert described["additionalProperties"] is False


VALUES = [
    None, True, False, 0, 1, -1, 0.5, 3.0, 10**9, "", " ", "a", "A b", "block", "warn", "skip", "unknown", "fail",
    "never", "pass", "2027-01-31", "2027-02-30", "20270131", "sha256:" + "0" * 64, "sha256:0", "integrity.x", "gate",
    "rescan.tsbd", "evaluate.selected", "a[0]", "a[*].b", "model", [], [1], [""], ["a"], ["a", "a"], ["model"],
    ["model", "a"], ["attestations", "model"], {}, {"a": 1},
]  # fmt: skip


def places(node, path=()):
    """The path of every value in a policy."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, each in items:
        yield from places(each, (*path, key))


def changed(node, path, change):
    """A copy of ``node`` where ``change`` was made to the container of the last key of ``path``."""
    if len(path) == 1:
        copy = dict(node) if isinstance(node, dict) else list(node)
        change(copy, path[0])
        return copy
    inner = changed(node[path[0]], path[1:], change)
    if isinstance(node, dict):
        return {**node, path[0]: inner}
    return [inner if index == path[0] else each for index, each in enumerate(node)]


PLACES = [path for path in places(FULL) if path]
UNSAYABLE = ("exceptions", 0, "rule")
"""An exception must name a rule of the policy, which no schema can say."""


def without_exceptions(mapping):
    return {**mapping, "exceptions": []} if "exceptions" in mapping else mapping


def test_schema_and_parser_agree_on_every_value_in_every_place():
    assert agree(FULL)
    parse_policy(FULL)
    for path in PLACES:
        for value in VALUES:
            mapping = changed(FULL, path, lambda node, key, value=value: node.__setitem__(key, value))
            assert path == UNSAYABLE or agree(without_exceptions(mapping) if path[0] == "rules" else mapping), path


def test_schema_and_parser_agree_on_every_missing_and_every_unknown_key():
    for path in PLACES:
        mapping = changed(FULL, path, lambda node, key: node.pop(key))
        assert agree(without_exceptions(mapping) if path[0] == "rules" else mapping), path
    for path in {path[:-1] for path in PLACES}:
        mapping = changed(FULL, (*path, "odd"), lambda node, key: isinstance(node, dict) and node.update({key: 1}))
        assert agree(mapping), path


@pytest.mark.parametrize("bound", [{}, *({key: value} for key in BOUND_KEYS for value in VALUES)])
def test_schema_and_parser_agree_on_bounds(bound):
    bare = {key: value for key, value in rule().items() if key != "max"}
    assert agree(policy_mapping({**bare, **bound}))
    assert agree(policy_mapping({**bare, **bound, "min": 0}))
