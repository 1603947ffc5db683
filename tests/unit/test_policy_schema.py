"""Policy files: strict reading, and what the shipped ones decide."""

import json
import math

import jsonschema
import pytest

from defense_core.errors import EXIT_USAGE, PolicyError
from defense_core.evaluate import PairedCounts
from defense_core.policy import Policy, Rule, decide, parse_policy
from defense_core.policy_schema import RULE_KEYS, Bound
from tests.unit.policy_records import (
    POLICIES,
    SHIPPED,
    policy,
    policy_mapping,
    probe,
    rule,
    run,
    shipped,
    untouched,
)

# -- policy files --------------------------------------------------------------------


def test_a_policy_is_read_whole():
    read = parse_policy({**policy_mapping(rule(why="  Because.  ", when_absent="skip")), "description": " Text. "})
    assert read == Policy(
        name="test",
        promote=True,
        rules=(Rule("r", "evaluate.selected", "score", Bound("max", 0.5), "block", "skip", "Because."),),
        description="Text.",
        schema=1,
    )
    assert policy(rule(one_of=["a", 1])).rules[0].bound == Bound("one_of", ("a", 1))
    assert policy(rule(min=1)).rules[0].when_absent == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ruels": []}, r"unknown key 'ruels' in policy: .* Did you mean 'rules'\?"),
        ({"qqq": 1}, "unknown key 'qqq' in policy: .*Remove it"),
        ({3: 1}, "unknown key 3 in policy"),
        ({"schema": 2}, "another schema: expected schema: 1, got 2"),
        ({"schema": True}, "another schema"),
        ({"schema": "1"}, "another schema"),
        ({"name": 3}, "name is malformed"),
        ({"name": "My Policy"}, "name is malformed"),
        ({"name": ""}, "name is malformed"),
        ({"promote": "yes"}, "promote is malformed: expected true or false, got 'yes'"),
        ({"promote": 1}, "promote is malformed"),
        ({"promote": None}, "promote is malformed"),
        ({"description": 3}, "description is malformed"),
        ({"description": None}, "description is malformed"),
        ({"rules": {}}, "rules is malformed"),
        ({"rules": "r"}, "rules is malformed"),
        ({"rules": []}, "policy test has no rules"),
        ({"rules": [rule(severity="warn")]}, "policy test blocks nothing.*promote: false"),
        ({"rules": [rule(), rule(id="two"), rule()]}, "policy test has two rules 'r'"),
        ({"rules": [3]}, r"rules\[0\] is malformed: expected a mapping"),
        ({"rules": [rule(), None]}, r"rules\[1\] is malformed"),
    ],
)
def test_malformed_policies_are_refused(changes, message):
    with pytest.raises(PolicyError, match=message) as caught:
        parse_policy({**policy_mapping(), **changes})
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maxx": 1}, r"unknown key 'maxx' in rules\[0\]: .* Did you mean 'max'\?"),
        ({"severty": "block"}, "Did you mean 'severity'"),
        ({"id": "R 1"}, r"rules\[0\]\.id is malformed"),
        ({"id": 1}, "id is malformed"),
        ({"id": "integrity.source"}, "reserved prefix"),
        ({"evidence": "evalaute.selected"}, r"rules\[0\] \(r\)\.evidence names no step.*got 'evalaute'.*'evaluate'"),
        ({"evidence": "gate"}, "evidence names no step"),
        ({"evidence": "promote"}, "evidence names no step"),
        ({"evidence": "report"}, "evidence names no step"),
        ({"evidence": "evaluate.a.b"}, "evidence is malformed"),
        ({"evidence": None}, "evidence is malformed"),
        ({"value": "a..b"}, "value is malformed"),
        ({"value": "a[0]"}, "value is malformed"),
        ({"value": "[*].a"}, "value is malformed"),
        ({"value": "a.b."}, "value is malformed"),
        ({"value": ""}, "value is malformed"),
        ({"value": ["a"]}, "value is malformed"),
        (
            {"max": "1e-3"},
            "max is malformed: expected a finite number .YAML reads 1e-3 as text: write 0.001., got '1e-3'",
        ),
        ({"max": math.nan}, "max is malformed"),
        ({"max": math.inf}, "max is malformed"),
        ({"max": True}, "max is malformed"),
        ({"max": None}, "max is malformed"),
        ({"min": -math.inf}, "min is malformed"),
        ({"min": "3"}, "min is malformed"),
        ({"min": False}, "min is malformed"),
        ({"equals": None}, "equals is malformed"),
        ({"equals": math.nan}, "equals is malformed"),
        ({"equals": [1]}, "equals is malformed"),
        ({"one_of": []}, "one_of is malformed"),
        ({"one_of": "ab"}, "one_of is malformed"),
        ({"one_of": [1, None]}, r"one_of\[1\] is malformed"),
        ({"one_of": [math.inf]}, r"one_of\[0\] is malformed"),
        ({"max": 1, "min": 0}, "needs one bound: expected exactly one of max, min, equals, one_of, got max and min"),
        ({"equals": 1, "one_of": [1]}, "got equals and one_of"),
        ({"severity": "info"}, "severity is malformed: expected block or warn"),
        ({"severity": None}, "severity is malformed"),
        ({"severity": ["block"]}, "severity is malformed"),
        ({"when_absent": "pass"}, "when_absent is malformed: expected unknown or skip"),
        ({"when_absent": None}, "when_absent is malformed"),
        ({"why": ""}, "why is malformed"),
        ({"why": "  "}, "why is malformed"),
        ({"why": 3}, "why is malformed"),
    ],
)
def test_malformed_rules_are_refused(changes, message):
    with pytest.raises(PolicyError, match=message):
        policy(rule(**changes))


def test_a_rule_without_bound_is_refused():
    bare = {key: value for key, value in rule().items() if key != "max"}
    with pytest.raises(PolicyError, match=r"rules\[0\] \(r\) needs one bound: .*got none"):
        policy(bare)


@pytest.mark.parametrize("key", ["id", "evidence", "value", "severity", "why"])
def test_rules_lacking_a_key_are_refused(key):
    bare = {each: value for each, value in rule().items() if each != key}
    with pytest.raises(PolicyError, match=rf"rules\[0\] lacks {key}: expected every one of id, "):
        policy(bare)


@pytest.mark.parametrize("key", ["schema", "name", "promote", "rules"])
def test_policies_lacking_a_key_are_refused(key):
    bare = {each: value for each, value in policy_mapping().items() if each != key}
    with pytest.raises(PolicyError, match=f"policy lacks {key}: "):
        parse_policy(bare)


@pytest.mark.parametrize("mapping", [None, [], "policy"])
def test_what_is_no_policy_is_refused(mapping):
    with pytest.raises(PolicyError, match="policy is malformed: expected a mapping"):
        parse_policy(mapping)


def test_a_reason_may_run_over_lines():
    assert policy(rule(why=" One.\nTwo.\n")).rules[0].why == "One.\nTwo."


def test_an_observing_policy_may_only_warn():
    assert policy(rule(severity="warn"), promote=False).promote is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": [rule(), rule()]}, "policy test has two rules 'r': expected one rule an id, got two."),
        ({"rules": []}, "policy test has no rules: expected at least one rule, got none."),
        (
            {"rules": [rule(severity="warn")]},
            "policy test blocks nothing: expected at least one rule with severity: block, got warnings only. "
            "Set promote: false to observe only.",
        ),
        (
            {"qqq": 1},
            "unknown key 'qqq' in policy: expected one of schema, name, description, promote, rules, got 'qqq'. "
            "Remove it, or see the shipped policies.",
        ),
        (
            {"rules": [rule(equals=None)]},
            "rules[0] (r).equals is malformed: expected text, true, false or a finite number, got None (NoneType).",
        ),
        ({"promote": 1}, "promote is malformed: expected true or false, got 1 (int)."),
        ({"rules": {}}, "rules is malformed: expected a list of rules, got {} (dict)."),
        ({"description": 3}, "description is malformed: expected text, got 3 (int)."),
        ({"rules": [3]}, "rules[0] is malformed: expected a mapping, got 3 (int)."),
        (
            {"rules": [rule(one_of=[])]},
            "rules[0] (r).one_of is malformed: expected a list of at least one value, got [] (list).",
        ),
        (
            {"rules": [rule(evidence="cook")]},
            "rules[0] (r).evidence names no step: expected one of fetch, scan, purify, evaluate, select, export, "
            "got 'cook'. Remove it, or see the shipped policies.",
        ),
        (
            {"rules": [rule(id="integrity.x")]},
            "rules[0].id is malformed: expected an id without the reserved prefix integrity., got 'integrity.x' (str).",
        ),
        ({"rules": [rule(severity="x")]}, "rules[0] (r).severity is malformed: expected block or warn, got 'x' (str)."),
    ],
)
def test_refusals_say_expected_got_and_what_to_do(changes, message):
    with pytest.raises(PolicyError) as caught:
        parse_policy({**policy_mapping(), **changes})
    assert str(caught.value) == message


# -- what is shipped -----------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_policies_are_valid_and_named_like_their_file(name):
    read = parse_policy(shipped(name))
    assert read.name == name
    assert read.description
    assert read.promote is (name != "observe")
    jsonschema.Draft202012Validator(json.loads((POLICIES / "schema.json").read_text())).validate(shipped(name))


@pytest.mark.parametrize(
    ("name", "table", "probes", "outcome"),
    [
        # 360 images, one point lost, no known trigger: the smallest ordinary case
        ("standard", PairedCounts(340, 8, 4, 8), [], "allow"),
        ("standard", PairedCounts(340, 8, 4, 8), [probe(10, 324)], "allow"),
        ("standard", PairedCounts(332, 14, 7, 7), [probe(16, 324)], "allow"),
        ("standard", PairedCounts(9000, 500, 300, 200), [probe(450, 9000)], "allow"),
        ("standard", PairedCounts(280, 5, 2, 3), [], "deny"),  # too few images
        ("standard", PairedCounts(300, 30, 6, 24), [], "deny"),  # too much accuracy lost
        ("standard", PairedCounts(340, 8, 4, 8), [probe(40, 324)], "deny"),
        ("standard", PairedCounts(340, 8, 4, 8), [probe(0, 0)], "unknown"),
        ("strict", PairedCounts(9300, 280, 80, 340), [probe(90, 9000)], "allow"),
        ("strict", PairedCounts(945, 18, 8, 29), [probe(9, 900)], "allow"),
        ("strict", PairedCounts(9300, 280, 80, 340), [], "unknown"),  # no probe: no proof
        ("strict", PairedCounts(340, 8, 4, 8), [probe(0, 324)], "deny"),
        ("strict", PairedCounts(9300, 280, 80, 340), [probe(450, 9000)], "deny"),
        ("observe", PairedCounts(340, 8, 4, 8), [], "observe"),
        ("observe", PairedCounts(10, 30, 0, 0), [probe(9, 9)], "observe"),
    ],
)
def test_shipped_policies_decide_ordinary_cases(name, table, probes, outcome):
    assert decide(parse_policy(shipped(name)), run(table, *probes)).outcome == outcome


def test_no_shipped_policy_allows_the_untouched_backdoored_model():
    files = untouched()
    for name in SHIPPED:
        assert decide(parse_policy(shipped(name)), files).outcome in ("deny", "observe")


def test_standard_demands_measured_accuracy():
    for key in ("acc_drop_interval", "images"):
        files = run()
        files["evaluate.tsbd"]["results"][key] = None
        assert decide(parse_policy(shipped("standard")), files).outcome == "unknown"


def test_the_json_schema_agrees_with_the_parser():
    schema = json.loads((POLICIES / "schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    assert set(schema["$defs"]["rule"]["properties"]) == set(RULE_KEYS)
    for changes in (
        {}, {"maxx": 1}, {"id": "integrity.x"}, {"id": "A"}, {"evidence": "gate"}, {"evidence": "scan.x"},
        {"value": "a[0]"},
        {"value": "a[*].b"}, {"max": "1"}, {"max": 1, "min": 0}, {"one_of": []}, {"one_of": [1]}, {"equals": None},
        {"severity": "x"}, {"when_absent": "pass"}, {"when_absent": "skip"}, {"why": " "},
    ):  # fmt: skip
        mapping = policy_mapping(rule(**changes))
        try:
            parse_policy(mapping)
            accepted = True
        except PolicyError:
            accepted = False
        assert validator.is_valid(mapping) is accepted, changes
