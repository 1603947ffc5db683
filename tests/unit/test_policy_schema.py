"""Policy files: strict reading, and what the shipped ones decide."""

import json
import math

import jsonschema
import pytest

from defense_core.errors import EXIT_USAGE, PolicyError
from defense_core.evaluate import PairedCounts
from defense_core.policy import Policy, Rule, decide, parse_policy
from defense_core.policy_types import Bound, Requirements, Waiver
from tests.unit.policy_records import (
    AT,
    FAIL,
    FULL,
    PASS,
    POLICIES,
    SHIPPED,
    dated,
    finding,
    later,
    policy,
    policy_mapping,
    probe,
    rule,
    run,
    scanned,
    shipped,
    unpurified,
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
            "max is malformed: expected a finite number, got '1e-3'",
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
        (
            {"max": 1, "min": 0},
            "needs one bound: expected exactly one of max, min, equals, one_of, matches, got max and min",
        ),
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
            "unknown key 'qqq' in policy: expected one of schema, name, description, promote, "
            "max_unknown_age_days, require, rules, exceptions, got 'qqq'. Remove it, or see the shipped policies.",
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
            "rules[0] (r).evidence names no step: expected one of fetch, scan, control, purify, evaluate, rescan, "
            "select, export, got 'cook'. Remove it, or see the shipped policies.",
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
    assert decide(parse_policy(shipped(name)), dated(scanned(run(table, *probes))), at=AT).outcome == outcome


SERVED = PairedCounts(9300, 280, 80, 340)


@pytest.mark.parametrize(
    ("found", "strict", "standard"),
    [
        ({}, "allow", "allow"),
        ({"scan": "PASS", "left": ()}, "allow", "allow"),
        ({"scan": "UNKNOWN", "rescan": "UNKNOWN", "control": "UNKNOWN", "left": ()}, "unknown", "allow"),  # no pool
        ({"rescan": "UNKNOWN"}, "unknown", "allow"),
        ({"rescan": "FAIL"}, "deny", "allow"),
        ({"control": "FAIL"}, "deny", "allow"),
        ({"left": (0.02, 0.9)}, "deny", "allow"),
    ],
)
def test_shipped_policies_on_what_the_scan_says(found, strict, standard):
    files = dated(scanned(run(SERVED, probe(90, 9000)), **found))
    decisions = {name: decide(parse_policy(shipped(name)), files, at=AT) for name in ("strict", "standard")}
    assert {name: each.outcome for name, each in decisions.items()} == {"strict": strict, "standard": standard}
    warned = {
        each.rule for each in decisions["standard"].findings if each.effect == "warn" and each.verdict is not PASS
    }
    assert bool(warned) is bool(set(found) & {"rescan"} or found.get("left") == (0.02, 0.9))


def test_without_a_scan_standard_decides_as_before_and_strict_does_not_decide():
    files = dated(run(SERVED, probe(90, 9000)))
    assert decide(parse_policy(shipped("standard")), files, at=AT).outcome == "allow"
    assert decide(parse_policy(shipped("strict")), files, at=AT).outcome == "unknown"


def test_a_model_that_was_not_purified_passes_standard_and_not_strict():
    files = unpurified()
    assert decide(parse_policy(shipped("standard")), dated(files), at=AT).outcome == "allow"
    denied = decide(parse_policy(shipped("strict")), dated(files), at=AT)
    assert denied.outcome == "deny"
    assert finding(denied, "require.purification").verdict is FAIL


@pytest.mark.parametrize("verdict", ["FAIL", "UNKNOWN", None])
def test_standard_allows_no_untouched_model_without_a_passed_scan(verdict):
    """Though no trigger of the probes works on it."""
    files = scanned(untouched(), scan=verdict or "PASS")
    files["evaluate.before"]["results"]["probes"] = []
    if verdict is None:
        del files["scan"], files["rescan"]
    assert decide(parse_policy(shipped("standard")), dated(files), at=AT).outcome in ("deny", "unknown")


def test_no_shipped_policy_allows_the_untouched_backdoored_model():
    files = dated(scanned(untouched()))
    for name in SHIPPED:
        assert decide(parse_policy(shipped(name)), files, at=AT).outcome in ("deny", "observe")


def test_standard_demands_measured_accuracy():
    for key in ("acc_drop_interval", "images"):
        files = dated()
        files["evaluate.tsbd"]["results"][key] = None
        assert decide(parse_policy(shipped("standard")), files, at=AT).outcome == "unknown"


def test_shipped_policies_state_clocks():
    """What is undecided, and evidence, both grow old under the policies that promote."""
    for name in ("standard", "strict"):
        files = dated(scanned(run(SERVED, probe(90, 9000))))
        read = parse_policy(shipped(name))
        days = read.require.max_evidence_age_days
        assert decide(read, files, at=later(days)).outcome == "allow"
        assert decide(read, files, at=later(days + 0.1)).outcome == "deny"
        files["evaluate.tsbd"]["results"]["images"] = None
        assert decide(read, files, at=later(read.max_unknown_age_days)).outcome == "unknown"
        assert decide(read, files, at=later(read.max_unknown_age_days + 0.1)).outcome == "deny"


# -- what a policy of today may say beside rules -------------------------------------


def test_a_whole_policy_is_read():
    read = parse_policy(FULL)
    assert read.max_unknown_age_days == 3
    assert read.require == Requirements(3, 3, True, True, ("a",), ("a",), ("a",), ("model",), 2)
    assert read.exceptions == (Waiver("r", "Ada", "Why.", "2027-01-31", "sha256:" + "0" * 64),)
    assert read.rules[0].approvable == "fail"
    bare = policy()
    assert (bare.max_unknown_age_days, bare.require, bare.exceptions) == (None, Requirements(), ())
    assert bare.rules[0].approvable == "unknown"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_unknown_age_days": None}, "max_unknown_age_days is malformed: expected a number above 0, got None"),
        ({"max_unknown_age_days": 0}, "max_unknown_age_days is malformed"),
        ({"max_unknown_age_days": -1}, "max_unknown_age_days is malformed"),
        ({"max_unknown_age_days": math.inf}, "max_unknown_age_days is malformed"),
        ({"max_unknown_age_days": "7"}, "max_unknown_age_days is malformed"),
        ({"max_unknown_age_days": 10**400}, "max_unknown_age_days is malformed"),
        ({"require": {"max_evidence_age_days": 10**400}}, "require.max_evidence_age_days is malformed"),
        ({"require": []}, "require is malformed: expected a mapping"),
        ({"require": {"source": ["a"]}}, "unknown key 'source' in require: .* Did you mean 'sources'"),
        ({"require": {"approvals": 0}}, "require.approvals is malformed: expected a whole number above 0, got 0"),
        ({"require": {"approvals": 1.5}}, "require.approvals is malformed"),
        ({"require": {"min_clean_images": True}}, "require.min_clean_images is malformed"),
        ({"require": {"positive_control": "yes"}}, "require.positive_control is malformed: expected true or false"),
        ({"require": {"sources": []}}, "require.sources is malformed: expected a list of at least one text"),
        ({"require": {"sources": "s3://a"}}, "require.sources is malformed: expected a list of at least one text"),
        ({"require": {"licences": ["a", " "]}}, r"require.licences\[1\] is malformed"),
        ({"require": {"formats": ["a", "a"]}}, "require.formats is malformed: expected each text once"),
        (
            {"require": {"signatures": ["modle"]}},
            r"require.signatures\[0\] is malformed: expected model or attestations",
        ),
        ({"exceptions": {}}, "exceptions is malformed: expected a list of exceptions"),
        ({"exceptions": [{"rule": "r"}]}, r"exceptions\[0\] lacks owner, reason, expires"),
        (
            {"exceptions": [{**FULL["exceptions"][0], "expires": 20270131}]},
            r"exceptions\[0\].expires is malformed: .*day",
        ),
        ({"exceptions": [{**FULL["exceptions"][0], "source": "x"}]}, r"exceptions\[0\].source is malformed"),
        (
            {"exceptions": [{**FULL["exceptions"][0], "rule": "q"}]},
            r"exceptions\[0\].rule names no rule of this policy",
        ),
        ({"rules": [rule(approvable="always")]}, r"approvable is malformed: expected never or unknown or fail"),
        ({"rules": [rule(matches=[])]}, "matches is malformed: expected a list of at least one text"),
        (
            {"rules": [rule(id="require.signatures")], "require": {"signatures": ["model"]}},
            "policy test has two rules 'require.signatures'",
        ),
        (
            {"rules": [rule(id="require.formats")], "require": {"formats": ["a"]}},
            "policy test has two rules 'require.formats'",
        ),
    ],
)
def test_malformed_requirements_and_exceptions_are_refused(changes, message):
    with pytest.raises(PolicyError, match=message):
        parse_policy({**policy_mapping(), **changes})


def test_words_are_trimmed():
    padded = {"rule": "r", "owner": " Ada ", "reason": " Why. ", "expires": "2027-01-31"}
    assert parse_policy({**policy_mapping(), "exceptions": [padded]}).exceptions == (
        Waiver("r", "Ada", "Why.", "2027-01-31", ""),
    )


def test_a_policy_that_was_read_from_a_file_is_the_same():
    """Words of a file equal the program's own without being the same objects."""
    assert parse_policy(json.loads(json.dumps(FULL))) == parse_policy(FULL)
    files = dated()
    mapping = json.loads(json.dumps(policy_mapping(rule(value="probes[*].x", when_absent="skip"), rule(id="s"))))
    assert decide(parse_policy(mapping), files).findings[-2].effect == "skipped"


def test_warnings_of_a_file_are_warnings():
    with pytest.raises(PolicyError, match="blocks nothing"):
        parse_policy(json.loads(json.dumps(policy_mapping(rule(severity="warn")))))


def test_the_schema_may_be_written_as_a_number_with_a_point():
    assert parse_policy({**policy_mapping(), "schema": 1.0}).schema == 1


def test_a_rule_may_be_called_like_a_requirement_that_is_not_asked_for():
    for name in ("require.signatures", "require.formats", "require.max_evidence_age_days"):
        assert policy(rule(id=name)).rules[0].id == name


def test_whole_numbers_may_have_a_point():
    assert parse_policy({**policy_mapping(), "require": {"approvals": 3.0, "min_clean_images": 500.0}}).require == (
        Requirements(min_clean_images=500, approvals=3)
    )
