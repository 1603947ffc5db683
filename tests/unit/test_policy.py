"""The gate: what passes, what fails, what stays unknown, and that nobody talks it out of that."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defense_core.evidence import Evidence, Reading
from defense_core.policy import Approval, Bound, Decision, Policy, Rule, RuleFinding, Subject, decide
from defense_core.policy_types import Requirements, Waiver, show
from defense_core.policy_waivers import Circumstances
from defense_core.verdict import Finding
from tests.unit.policy_records import (
    FAIL,
    FETCHED,
    GOOD,
    PASS,
    UNKNOWN,
    finding,
    policy,
    probe,
    record,
    rule,
    run,
    with_score,
)

# -- bounds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bound", "value", "verdict"),
    [
        ({"max": 0.5}, 0.5, PASS),
        ({"max": 0.5}, math.nextafter(0.5, 1), FAIL),
        ({"max": 0.5}, math.nextafter(0.5, 0), PASS),
        ({"max": 0.5}, -3, PASS),
        ({"max": 3}, 3, PASS),
        ({"max": 3}, 4, FAIL),
        ({"max": 0}, 0.0, PASS),
        ({"max": 0.5}, 10**400, FAIL),
        ({"min": 0.5}, 0.5, PASS),
        ({"min": 0.5}, math.nextafter(0.5, 0), FAIL),
        ({"min": 0.5}, math.nextafter(0.5, 1), PASS),
        ({"min": 300}, 299, FAIL),
        ({"min": 300}, 300, PASS),
        ({"min": 300}, 300.0, PASS),
        ({"equals": True}, True, PASS),
        ({"equals": True}, False, FAIL),
        ({"equals": False}, False, PASS),
        ({"equals": "onnx"}, "onnx", PASS),
        ({"equals": "onnx"}, "ONNX", FAIL),
        ({"equals": 17}, 17, PASS),
        ({"equals": 17}, 17.0, PASS),
        ({"equals": 17}, 18, FAIL),
        ({"one_of": ["a", "b"]}, "b", PASS),
        ({"one_of": ["a", "b"]}, "c", FAIL),
        ({"one_of": [17, "b"]}, 17, PASS),
        ({"one_of": [17, "b"]}, 18, FAIL),
        ({"one_of": [17, "b"]}, "17", FAIL),
    ],
)
def test_bounds_include_their_ends(bound, value, verdict):
    decision = decide(policy(rule(**bound)), with_score(value))
    assert finding(decision, "r").verdict is verdict
    assert finding(decision, "r").value == value
    assert decision.outcome == {PASS: "allow", FAIL: "deny"}[verdict]


@pytest.mark.parametrize(
    ("bound", "value"),
    [
        ({"max": 0.5}, None),
        ({"max": 0.5}, math.nan),
        ({"max": 0.5}, math.inf),
        ({"max": 0.5}, -math.inf),
        ({"min": 0.5}, math.inf),
        ({"max": 0.5}, "0.1"),
        ({"max": 0.5}, True),
        ({"max": 0.5}, False),
        ({"max": 0.5}, [0.1]),
        ({"max": 0.5}, {"value": 0.1}),
        ({"min": 0.5}, True),
        ({"equals": True}, 1),
        ({"equals": True}, "true"),
        ({"equals": 1}, True),
        ({"equals": "1"}, 1),
        ({"equals": "x"}, None),
        ({"one_of": [1, 2]}, True),
        ({"one_of": ["a"]}, ["a"]),
        ({"one_of": ["a"]}, math.nan),
    ],
)
@pytest.mark.parametrize("when_absent", ["unknown", "skip"])
def test_what_cannot_be_compared_is_unknown_and_never_skipped(bound, value, when_absent):
    decision = decide(policy(rule(**bound, when_absent=when_absent)), with_score(value))
    found = finding(decision, "r")
    assert (found.verdict, found.value, found.effect) == (UNKNOWN, None, "block")
    assert found.why.startswith("Not decided: score")
    assert (decision.verdict, decision.outcome) == (UNKNOWN, "unknown")


@pytest.mark.parametrize(
    ("bound", "text"),
    [
        ({"max": 0.05}, "<= 0.05"),
        ({"min": 300}, ">= 300"),
        ({"equals": True}, "= true"),
        ({"equals": "a"}, "= a"),
        ({"one_of": ["a", False, 3]}, "one of a, false, 3"),
    ],
)
def test_bounds_read_as_text(bound, text):
    assert finding(decide(policy(rule(**bound)), run()), "r").bound == text


def test_numbers_are_shown_short_but_never_rounded():
    shown = {0.1: "0.1", 0.30000000000000004: "0.30000000000000004", 300.0: "300", 3: "3", "1.0": "1.0", 1e-7: "1e-07"}
    assert {each: show(each) for each in shown} == shown
    assert (show(True), show(False)) == ("true", "false")


# -- sentences -----------------------------------------------------------------------


def test_findings_are_sentences():
    one = rule(value="probes[*].asr.value", max=0.1, why="Triggers must be dead.")
    probes = [probe(10, 100, "one"), probe(90, 900, "two"), probe(5, 100, "three")]
    passing = decide(policy(one), run(GOOD, *probes))
    assert finding(passing, "r").why == (
        "Met: probes[*].asr.value is 0.1 (one), demanded is <= 0.1. Triggers must be dead."
    )
    failing = decide(policy(one), run(GOOD, *probes, probe(50, 100, "four"), probe(40, 100, "five")))
    assert finding(failing, "r").why == (
        "Not met: probes[*].asr.value is 0.5 (four), demanded is <= 0.1. Triggers must be dead."
    )
    assert finding(failing, "r").value == 0.5
    plain = decide(policy(rule()), with_score(0.25))
    assert finding(plain, "r").why == "Met: score is 0.25, demanded is <= 0.5. Because."


def test_sentences_round_but_never_across_the_bound():
    long = decide(policy(rule()), with_score(0.0123456789))
    assert finding(long, "r").why == "Met: score is 0.01235, demanded is <= 0.5. Because."
    assert finding(long, "r").value == 0.0123456789
    beyond = decide(policy(rule()), with_score(0.500001))
    assert finding(beyond, "r").why == "Not met: score is 0.500001, demanded is <= 0.5. Because."


@pytest.mark.parametrize(
    ("score", "sentence"),
    [
        (None, "Not decided: score was not measured. Because."),
        (math.nan, "Not decided: score is nan. Because."),
        ("0.1", "Not decided: score is str and cannot be compared. Because."),
    ],
)
def test_unknown_findings_say_why(score, sentence):
    assert finding(decide(policy(), with_score(score)), "r").why == sentence


# -- paths ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("scor", "scor is missing"),
        ("acc.vlaue", "acc.vlaue is missing"),
        ("acc.value.deep", "acc.value is a number, not a mapping"),
        ("images[*].x", "images is a number, not a list"),
        ("acc[*].x", "acc is something else, not a list"),
        ("nothing.high", "nothing was not measured"),
        ("word.high", "word is text, not a mapping"),
        ("flag.high", "flag is a truth value, not a mapping"),
        ("rows[*].a.b", "rows[1].a is missing (element 1)"),
        ("rows[*].x.y", "rows[0].x is missing (element 0)"),
        ("odd[*].x", "odd[0] is a number, not a mapping (element 0)"),
        ("deep[*].a.b", "deep[0].a was not measured (named)"),
        ("deep[*].c[*].d", "deep[0].c is a number, not a list (named)"),
        ("deep[*].e", "deep[0].e is nan (named)"),
        ("unsaid", "unsaid is not known: nobody said"),
        ("mute", "mute was not measured"),
        ("counted", "counted was not measured"),
        ("said.deep", "said is a number, not a mapping"),
    ],
)
def test_paths_that_lead_nowhere_are_unknown_even_where_absence_may_be_skipped(path, problem):
    evidence = run()
    evidence["evaluate.tsbd"]["results"] |= {
        "nothing": None, "word": "x", "flag": True, "rows": [{"a": {"b": 0.1}}, {}], "odd": [3],
        "deep": [{"name": "named", "a": None, "c": 3, "e": math.nan}], "unsaid": None, "unsaid_why": "nobody said",
        "mute": None, "mute_why": "", "counted": None, "counted_why": 3, "said": 0.1, "said_why": "somebody said",
    }  # fmt: skip
    found = finding(decide(policy(rule(value=path, when_absent="skip")), evidence), "r")
    assert (found.verdict, found.effect) == (UNKNOWN, "block")
    assert found.why == f"Not decided: {problem}. Because."


def test_every_element_must_satisfy():
    each = rule(value="probes[*].asr.high", max=0.1)
    assert decide(policy(each), run(GOOD, probe(0), probe(1))).outcome == "allow"
    for position in range(3):
        probes = [probe(0, name=str(index)) for index in range(3)]
        probes[position] = probe(1700, name="bad")
        decision = decide(policy(each), run(GOOD, *probes))
        assert decision.outcome == "deny"
        assert "(bad)" in finding(decision, "r").why
        probes[position] = probe(0, 0, name="undefined")
        decision = decide(policy(each), run(GOOD, *probes))
        assert decision.outcome == "unknown"
        assert finding(decision, "r").why.endswith("was not measured (undefined). Because.")


def test_one_failing_element_outweighs_an_unknown_one():
    for probes in ([probe(0, 0), probe(1700)], [probe(1700), probe(0, 0)]):
        decision = decide(policy(rule(value="probes[*].asr.high", max=0.1)), run(GOOD, *probes))
        assert decision.outcome == "deny"


def test_the_worst_element_is_reported():
    rows = [{"v": 2}, {"v": 1}, {"v": 3}]
    for bound, worst in (
        ({"max": 5}, 3),
        ({"min": 0}, 1),
        ({"one_of": [1, 2, 3]}, 2),
        ({"max": 1}, 3),
        ({"min": 3}, 1),
    ):
        found = finding(decide(policy(rule(value="score[*].v", **bound)), with_score(rows)), "r")
        assert found.value == worst


def test_nested_lists_are_walked_and_named():
    rows = [{"name": "a", "parts": [{"v": 1}, {"name": "p", "v": 7}]}]
    found = finding(decide(policy(rule(value="score[*].parts[*].v", max=5)), with_score(rows)), "r")
    assert found.verdict is FAIL
    assert "(a, p)" in found.why


def test_a_partly_empty_nested_list_is_unknown_and_never_skipped():
    rows = [{"parts": [{"v": 1}]}, {"parts": []}]
    found = finding(decide(policy(rule(value="score[*].parts[*].v", max=5, when_absent="skip")), with_score(rows)), "r")
    assert (found.verdict, found.effect) == (UNKNOWN, "block")


def test_plain_lists_are_walked():
    assert decide(policy(rule(value="score[*]")), with_score([0.1, 0.5])).outcome == "allow"
    assert decide(policy(rule(value="score[*]")), with_score((0.1, 0.6))).outcome == "deny"


# -- absence, severity, promotion ----------------------------------------------------


@pytest.mark.parametrize(
    ("when_absent", "effect", "outcome"), [("unknown", "block", "unknown"), ("skip", "skipped", "allow")]
)
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"value": "probes[*].asr.high"}, "probes is empty"),
        ({"evidence": "scan"}, "evidence scan is missing"),
        ({"evidence": "scan.selected"}, "evidence scan.tsbd is missing"),
        ({"evidence": "evaluate.anp"}, "evidence evaluate.anp is missing"),
    ],
)
def test_absence_is_unknown_unless_the_policy_lets_it_rest(when_absent, effect, outcome, changes, problem):
    decision = decide(
        policy(rule(**changes, when_absent=when_absent), rule(id="other", value="images", max=5000)), run()
    )
    found = finding(decision, "r")
    assert (found.verdict, found.value, found.effect) == (UNKNOWN, None, effect)
    rests = " (the policy lets this rule rest then)" if when_absent == "skip" else ""
    assert found.why == f"Not decided: {problem}{rests}. Because."
    assert decision.outcome == outcome


@pytest.mark.parametrize(
    "evidence", ["fetch", "purify.selected", "evaluate.selected", "evaluate.tsbd", "select", "export"]
)
def test_rules_read_the_evidence_they_name(evidence):
    name = evidence.replace("selected", "tsbd")
    files = run()
    files[name]["results"]["marker"] = 1
    assert decide(policy(rule(evidence=evidence, value="marker", equals=1)), files).outcome == "allow"
    files[name]["results"]["marker"] = 2
    assert decide(policy(rule(evidence=evidence, value="marker", equals=1)), files).outcome == "deny"


def test_selected_follows_the_choice():
    files = run()
    files["evaluate.tsbd"]["results"]["score"] = 0.1
    files["evaluate.fine_tuning"]["results"]["score"] = 0.9
    assert finding(decide(policy(), files), "r").verdict is PASS
    files["select"]["results"]["method"] = "fine_tuning"
    assert finding(decide(policy(), files), "r").verdict is FAIL


@pytest.mark.parametrize("method", [None, "", 3, ["tsbd"]])
def test_without_a_choice_selected_is_unknown_even_where_absence_may_be_skipped(method):
    files = with_score(0.1)
    files["select"]["results"]["method"] = method
    decision = decide(policy(rule(when_absent="skip")), files)
    assert finding(decision, "r").why == "Not decided: no candidate was selected. Because."
    assert finding(decision, "r").effect == "block"
    assert decision.outcome == "unknown"
    assert decision.subject.method is None


@pytest.mark.parametrize("name", ["evaluate.tsbd", "scan"])
@pytest.mark.parametrize("when_absent", ["unknown", "skip"])
def test_undecided_evidence_is_unknown_whatever_its_numbers(name, when_absent):
    files = with_score(0.1)
    files["scan"] = record("scan", {"model": FETCHED}, {}, {"score": 0.1})
    files[name]["verdict"] = "UNKNOWN"
    found = finding(decide(policy(rule(evidence=name, when_absent=when_absent)), files), "r")
    assert (found.verdict, found.effect) == (UNKNOWN, "block")
    assert found.why == f"Not decided: evidence {name} is undecided itself. Because."


def test_failed_evidence_beside_the_way_is_still_read():
    """A scan that found a backdoor before purification does not forbid the purified model by itself."""
    files = run()
    files["scan"] = record("scan", {"model": FETCHED}, {}, {"score": 0.1})
    files["scan"]["verdict"] = "FAIL"
    assert decide(policy(rule(evidence="scan")), files).outcome == "allow"


@pytest.mark.parametrize(
    ("block", "warn", "outcome"),
    [
        (0.1, 0.1, "allow"), (0.1, 0.9, "allow"), (0.1, None, "allow"),
        (0.9, 0.1, "deny"), (0.9, 0.9, "deny"), (0.9, None, "deny"),
        (None, 0.1, "unknown"), (None, 0.9, "unknown"), (None, None, "unknown"),
    ],
)  # fmt: skip
def test_warnings_are_reported_and_never_decide(block, warn, outcome):
    files = with_score(block)
    files["evaluate.tsbd"]["results"]["other"] = warn
    decision = decide(policy(rule(), rule(id="w", value="other", severity="warn")), files)
    assert decision.outcome == outcome
    expected = {0.1: PASS, 0.9: FAIL, None: UNKNOWN}
    assert finding(decision, "w").verdict is expected[warn]
    assert finding(decision, "w").effect == "warn"
    assert finding(decision, "r").verdict is expected[block]


@pytest.mark.parametrize(
    ("score", "verdict", "outcome"), [(0.1, PASS, "allow"), (0.9, FAIL, "deny"), (None, UNKNOWN, "unknown")]
)
def test_observe_decides_but_promotes_nothing(score, verdict, outcome):
    for promote, expected in ((True, outcome), (False, "observe")):
        decision = decide(policy(promote=promote), with_score(score))
        assert decision.verdict is verdict
        assert decision.outcome == expected
        assert decision.promotes is (expected == "allow")


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.9, None]), st.sampled_from(["block", "warn"])), min_size=1, max_size=5)
)
def test_allow_means_that_every_blocking_rule_passed(cases):
    files = run()
    rules = []
    for index, (score, severity) in enumerate(cases):
        files["evaluate.tsbd"]["results"][f"s{index}"] = score
        rules.append(rule(id=f"r{index}", value=f"s{index}", severity=severity))
    decision = decide(policy(*rules, rule(id="last", value="images", min=0)), files)
    blocking = [score for score, severity in cases if severity == "block"]
    assert (decision.outcome == "allow") == all(score == 0.1 for score in blocking)
    assert (decision.outcome == "deny") == (0.9 in blocking)


# -- what a rule names, and nothing beside it ----------------------------------------


@pytest.mark.parametrize("evidence", ["fetch", "evaluate.tsbd", "evaluate.fine_tuning"])
def test_a_rule_on_evidence_by_name_needs_no_choice(evidence):
    files = run()
    files["select"]["results"]["method"] = None
    files[evidence]["results"]["marker"] = 1
    found = finding(decide(policy(rule(evidence=evidence, value="marker", equals=1)), files), "r")
    assert (found.verdict, found.value) == (PASS, 1)


@pytest.mark.parametrize("evidence", ["fetch", "evaluate.tsbd", "evaluate.before"])
def test_a_rule_on_evidence_by_name_does_not_follow_the_choice(evidence):
    files = run()
    files["select"]["results"]["method"] = "fine_tuning"
    files[evidence]["results"]["marker"] = 1
    files["evaluate.fine_tuning"]["results"]["marker"] = 2
    assert finding(decide(policy(rule(evidence=evidence, value="marker", min=0)), files), "r").value == 1


@pytest.mark.parametrize(
    ("bound", "values"), [({"equals": 1}, [3, 7]), ({"equals": 1}, [7, 3]), ({"one_of": [1]}, [7, 3])]
)
def test_where_no_value_is_worst_the_first_is_reported(bound, values):
    rows = [{"v": each} for each in values]
    assert finding(decide(policy(rule(value="score[*].v", **bound)), with_score(rows)), "r").value == values[0]


def test_the_first_of_several_empty_lists_is_reported():
    found = finding(decide(policy(rule(value="score[*].parts[*].v")), with_score([{"parts": []}, {"parts": []}])), "r")
    assert found.why == "Not decided: score[0].parts is empty. Because."


@pytest.mark.parametrize(
    ("bound", "value", "shown"),
    [
        ({"max": 0.499999}, 0.4999989, "0.4999989"),
        ({"max": 0.499999}, 0.49999, "0.49999"),
        ({"min": 0.5}, 0.499999, "0.499999"),
    ],
)
def test_a_value_is_never_shown_on_the_other_side_of_its_bound(bound, value, shown):
    assert f"score is {shown}, demanded" in finding(decide(policy(rule(**bound)), with_score(value)), "r").why


# -- records -------------------------------------------------------------------------

RECORDS = (
    Approval, Bound, Circumstances, Decision, Evidence, Finding, Policy, Reading, Requirements, Rule, RuleFinding,
    Subject, Waiver,
)  # fmt: skip


@pytest.mark.parametrize("record", RECORDS)
def test_records_cannot_be_changed(record):
    blank = object.__new__(record)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(blank, dataclasses.fields(record)[0].name, "other")


def test_circumstances_are_named():
    with pytest.raises(TypeError):
        decide(policy(), run(), "2027-01-01T00:00:00Z")  # type: ignore[call-arg]
