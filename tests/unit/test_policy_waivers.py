"""Exceptions of the policy and approvals of people: what they let rest, and what they never do."""

import json

import pytest

from defense_core.errors import ConfigError, EvidenceMismatch, PolicyError
from defense_core.policy import Approval, approvable_rules, decide, parse_policy
from tests.unit.policy_records import (
    AT,
    FAIL,
    OTHER,
    PASS,
    SOURCE,
    UNKNOWN,
    dated,
    finding,
    later,
    policy_mapping,
    rule,
    sha,
    with_score,
)

EXCEPTION = {"rule": "r", "owner": "Ada", "reason": "Known and harmless.", "expires": "2027-01-31"}


def scored(score):
    return dated(with_score(score))


def excepted(*exceptions, **changes):
    return parse_policy({**policy_mapping(rule()), "exceptions": list(exceptions), **changes})


def approval(decided_by, files, **changes):
    said = {
        "rule": "r",
        "identity": "ada",
        "reason": "Looked at it.",
        "approved_at": AT,
        "evidence": decide(decided_by, files, at=AT).evidence_digest,
        "policy": decided_by.digest,
        "envelope": sha("9"),
    }
    return Approval(**{**said, **changes})


# -- exceptions ----------------------------------------------------------------------


@pytest.mark.parametrize(("score", "verdict"), [(None, UNKNOWN), (0.9, FAIL)])
def test_an_exception_lets_a_rule_rest_until_it_expires(score, verdict):
    policy = excepted(EXCEPTION)
    for at in (AT, "2027-01-31T23:59:59Z"):
        decision = decide(policy, scored(score), at=at)
        found = finding(decision, "r")
        assert (found.verdict, found.effect, decision.outcome) == (verdict, "excepted", "allow")
        assert found.why.endswith(" Because. Excepted by Ada until 2027-01-31: Known and harmless.")
    decision = decide(policy, scored(score), at="2027-02-01T00:00:00Z")
    found = finding(decision, "r")
    assert (found.verdict, found.effect) == (verdict, "block")
    assert found.why.endswith(" Because. The exception of Ada expired on 2027-01-31.")
    assert decision.outcome == {UNKNOWN: "unknown", FAIL: "deny"}[verdict]


def test_a_rule_that_holds_needs_no_exception():
    found = finding(decide(excepted(EXCEPTION), scored(0.1), at=AT), "r")
    assert (found.verdict, found.effect) == (PASS, "block")
    assert "Ada" not in found.why


def test_an_exception_may_be_for_one_artifact():
    for source, outcome in ((SOURCE, "allow"), (OTHER, "deny")):
        decision = decide(excepted({**EXCEPTION, "source": source}), scored(0.9), at=AT)
        assert decision.outcome == outcome
        assert ("Ada" in finding(decision, "r").why) == (outcome == "allow")


def test_an_artifact_of_unknown_source_has_no_exception_of_its_own():
    files = scored(0.9)
    for each in files.values():
        each["inputs"] = {key: value for key, value in each["inputs"].items() if key != "source"}
    assert finding(decide(excepted({**EXCEPTION, "source": SOURCE}), files, at=AT), "r").effect == "block"
    assert finding(decide(excepted(EXCEPTION), files, at=AT), "r").effect == "excepted"


def test_the_exception_that_holds_counts_whatever_stands_beside_it():
    old = {**EXCEPTION, "owner": "Old", "expires": "2026-12-31"}
    for several in ([old, EXCEPTION], [EXCEPTION, old]):
        assert decide(excepted(*several), scored(0.9), at=AT).outcome == "allow"
    other = {**EXCEPTION, "rule": "s"}
    both = parse_policy({**policy_mapping(rule(), rule(id="s")), "exceptions": [other]})
    decision = decide(both, scored(0.9), at=AT)
    assert (finding(decision, "r").effect, finding(decision, "s").effect) == ("block", "excepted")


def test_without_a_time_no_exception_counts():
    found = finding(decide(excepted(EXCEPTION), scored(0.9)), "r")
    assert (found.effect, found.why) == ("block", "Not met: score is 0.9, demanded is <= 0.5. Because.")


@pytest.mark.parametrize("name", ["export", "evaluate.tsbd"])
def test_a_decision_before_its_evidence_calls_no_exception_back(name):
    files = scored(0.9)
    files[name]["environment"]["started"] = "2027-06-01T00:00:00+00:00"
    decision = decide(excepted(EXCEPTION), files, at="2027-01-31T12:00:00Z")
    found = finding(decision, "r")
    assert (found.effect, decision.outcome) == ("block", "deny")
    assert found.why.endswith(f" The exception of Ada does not count: evidence {name} is from after the decision.")


def test_clocks_of_exceptions_and_approvals_may_differ_a_little():
    files = scored(None)
    for seconds, outcome in ((300, "allow"), (301, "unknown")):
        files["export"]["environment"]["started"] = later(seconds / 86400)
        assert decide(excepted(EXCEPTION), files, at=AT).outcome == outcome
        policy = approvable()
        assert decide(policy, files, at=AT, approvals=[approval(policy, files)]).outcome == outcome


def test_a_decision_before_its_evidence_rests_on_no_approval():
    policy, files = approvable("fail", max_unknown_age_days=7), scored(0.9)
    files["export"]["environment"]["started"] = later(30)
    decision = decide(policy, files, at=AT, approvals=[approval(policy, files)])
    found = finding(decision, "r")
    assert (found.effect, decision.outcome) == ("block", "deny")
    assert found.why.endswith(" An approval was given and does not count: evidence export is from after the decision.")


def test_an_exception_stops_the_clock_of_the_undecided():
    policy = excepted(EXCEPTION, max_unknown_age_days=1)
    found = finding(decide(policy, scored(None), at=later(9)), "r")
    assert (found.verdict, found.effect) == (UNKNOWN, "excepted")


def test_requirements_may_be_excepted():
    policy = excepted({**EXCEPTION, "rule": "require.min_clean_images"}, require={"min_clean_images": 501})
    decision = decide(policy, scored(0.1), at=AT)
    assert (finding(decision, "require.min_clean_images").effect, decision.outcome) == ("excepted", "allow")


@pytest.mark.parametrize("name", ["integrity.source", "integrity.steps", "s", "require.signatures", "require.sources"])
def test_what_is_built_in_or_not_there_has_no_exception(name):
    message = rf"exceptions\[0\]\.rule names no rule of this policy: expected one of r, got '{name}'"
    with pytest.raises(PolicyError, match=message):
        excepted({**EXCEPTION, "rule": name}, require={"signatures": ["model"]})
    with pytest.raises(PolicyError, match=message):
        excepted({**EXCEPTION, "rule": name})


# -- approvals -----------------------------------------------------------------------


def approvable(kind="unknown", **changes):
    return parse_policy({**policy_mapping(rule(approvable=kind)), **changes})


def test_a_person_may_approve_what_is_undecided():
    policy, files = approvable(), scored(None)
    given = approval(policy, files)
    decision = decide(policy, files, at=AT, approvals=[given])
    found = finding(decision, "r")
    assert (found.verdict, found.effect, decision.outcome) == (UNKNOWN, "approved", "allow")
    assert found.why == "Not decided: score was not measured. Because. Approved by ada: Looked at it."
    assert json.loads(decision.to_json())["approvals"] == [vars(given)]
    assert decide(policy, files, at=AT).outcome == "unknown"


@pytest.mark.parametrize(
    ("kind", "score", "outcome"),
    [
        ("unknown", None, "allow"), ("unknown", 0.9, "deny"), ("fail", None, "allow"), ("fail", 0.9, "allow"),
        ("fail", 0.1, "allow"), ("unknown", 0.1, "allow"),
    ],
)  # fmt: skip
def test_a_failure_is_approved_only_where_the_policy_says_so(kind, score, outcome):
    policy, files = approvable(kind), scored(score)
    decision = decide(policy, files, at=AT, approvals=[approval(policy, files)])
    assert decision.outcome == outcome
    found = finding(decision, "r")
    if outcome == "deny":
        assert found.effect == "block"
        assert found.why.endswith(" An approval was given, but a failure of this rule cannot be approved.")
    if score == 0.1:
        assert (found.effect, "ada" in found.why) == ("block", False)


@pytest.mark.parametrize("name", ["integrity.source", "never", "warns", "s", "require.signatures"])
def test_what_cannot_be_approved_is_refused(name):
    rules = (rule(), rule(id="never", approvable="never"), rule(id="warns", severity="warn"))
    policy = parse_policy({**policy_mapping(*rules), "require": {"signatures": ["model"], "positive_control": True}})
    files = scored(None)
    assert approvable_rules(policy) == {"require.positive_control": "unknown", "r": "unknown"}
    message = (
        f"approval of {name} by ada names no rule that can be approved: expected one of require.positive_control, r"
    )
    with pytest.raises(PolicyError, match=message):
        decide(policy, files, at=AT, approvals=[approval(policy, files, rule=name)])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"evidence": sha("0")},
            "approval of r by ada is about another evidence: expected sha256:[0-9a-f]+, got sha256:0",
        ),
        ({"policy": sha("0")}, "approval of r by ada is about another policy: expected sha256:[0-9a-f]+, got sha256:0"),
        ({"approved_at": later(1)}, "approval of r by ada is from after the decision"),
    ],
)
def test_an_approval_of_something_else_is_refused(changes, message):
    policy, files = approvable(), scored(None)
    with pytest.raises(EvidenceMismatch, match=message):
        decide(policy, files, at=AT, approvals=[approval(policy, files), approval(policy, files, **changes)])


def test_an_approval_without_time_is_refused():
    policy, files = approvable(), scored(None)
    with pytest.raises(ConfigError, match="approved_at of the approval of r by ada is no time"):
        decide(policy, files, at=AT, approvals=[approval(policy, files, approved_at="today")])
    with pytest.raises(ConfigError, match="a decision with approvals, or in the place of another, needs its time"):
        decide(policy, files, approvals=[approval(policy, files)])


def test_an_approval_is_for_its_rule_only():
    rules = (rule(), rule(id="s"))
    policy, files = parse_policy(policy_mapping(*rules)), scored(None)
    decision = decide(policy, files, at=AT, approvals=[approval(policy, files)])
    assert (finding(decision, "r").effect, finding(decision, "s").effect) == ("approved", "block")
    assert decision.outcome == "unknown"


def test_requirements_may_be_approved_while_undecided():
    policy = parse_policy({**policy_mapping(rule(value="images", min=0)), "require": {"positive_control": True}})
    files = dated()
    decision = decide(policy, files, at=AT, approvals=[approval(policy, files, rule="require.positive_control")])
    assert decision.outcome == "allow"


def test_several_people_may_be_needed():
    policy, files = approvable(require={"approvals": 2}), scored(None)
    ada, bob = (approval(policy, files, identity=name, reason=f"{name} looked.") for name in ("ada", "bob"))
    for given, outcome in (([ada], "unknown"), ([ada, ada], "unknown"), ([ada, bob], "allow"), ([bob, ada], "allow")):
        decision = decide(policy, files, at=AT, approvals=given)
        assert decision.outcome == outcome
        assert decision.approvals == tuple(given)
    found = finding(decide(policy, files, at=AT, approvals=[ada]), "r")
    assert found.why.endswith(" Approvals do not suffice: 1 of 2 people approved in time.")
    found = finding(decide(policy, files, at=AT, approvals=[ada, bob]), "r")
    assert found.why.endswith(" Approved by ada: ada looked.; bob: bob looked.")


@pytest.mark.parametrize(
    ("approved", "decided", "outcome"),
    [(0, 0, "allow"), (7, 7, "allow"), (7, 60, "allow"), (7.01, 7.01, "deny"), (7.01, 60, "deny")],
)
def test_an_approval_must_come_before_the_clock_runs_out(approved, decided, outcome):
    policy, files = approvable(max_unknown_age_days=7), scored(None)
    given = approval(policy, files, approved_at=later(approved))
    decision = decide(policy, files, at=later(decided), approvals=[given])
    assert decision.outcome == outcome
    if outcome == "deny":
        sentences = finding(decision, "r").why
        assert "Approvals do not suffice: 0 of 1 people approved in time. Undecided for" in sentences


@pytest.mark.parametrize("kind", ["unknown", "fail"])
def test_an_approval_from_before_its_evidence_does_not_count(kind):
    """Otherwise a date of one's choice would come before any clock."""
    policy, files = approvable(kind, max_unknown_age_days=7), scored(None)
    files["export"]["environment"]["started"] = later(1)
    for approved, outcome in ((1 - 299 / 86400, "allow"), (1 - 302 / 86400, "deny"), (-99, "deny")):
        given = [approval(policy, files, approved_at=later(approved))]
        decision = decide(policy, files, at=later(60), approvals=given)
        assert decision.outcome == outcome
        said = "The approval of ada does not count: it is from before evidence "
        assert (said in finding(decision, "r").why) == (outcome == "deny")
    both = [approval(policy, files, approved_at=later(day), identity=name) for day, name in ((0.5, "ada"), (2, "bob"))]
    found = finding(decide(policy, files, at=later(60), approvals=both), "r")
    assert found.effect == "approved"
    assert found.why.endswith("it is from before evidence export. Approved by bob: Looked at it.")


def test_a_late_approval_counts_where_failures_may_be_approved():
    policy, files = approvable("fail", max_unknown_age_days=7), scored(None)
    given = approval(policy, files, approved_at=later(8))
    assert decide(policy, files, at=later(9), approvals=[given]).outcome == "allow"


def test_without_a_clock_or_dates_no_approval_is_late():
    policy, files = approvable(), scored(None)
    given = approval(policy, files, approved_at=later(999))
    assert decide(policy, files, at=later(999), approvals=[given]).outcome == "allow"
    limited, undated = approvable(max_unknown_age_days=7), with_score(None)
    given = approval(limited, undated, approved_at=later(999))
    assert decide(limited, undated, at=later(999), approvals=[given]).outcome == "allow"


def test_an_excepted_rule_takes_no_approval():
    policy, files = excepted(EXCEPTION), scored(None)
    found = finding(decide(policy, files, at=AT, approvals=[approval(policy, files)]), "r")
    assert found.effect == "excepted"
    assert "Approved" not in found.why


# -- neighbours, order and files -----------------------------------------------------


@pytest.mark.parametrize("other", ["a", "z"])
def test_an_exception_is_for_its_rule_only(other):
    both = [rule(), rule(id=other, value="images", min=0)]
    for several in (
        [{**EXCEPTION, "rule": other}],
        [{**EXCEPTION, "rule": other}, EXCEPTION],
        [EXCEPTION, {**EXCEPTION, "rule": other}],
    ):
        decision = decide(parse_policy({**policy_mapping(*both), "exceptions": several}), scored(0.9), at=AT)
        assert finding(decision, "r").effect == ("excepted" if EXCEPTION in several else "block")


@pytest.mark.parametrize("other", ["a", "z"])
def test_an_approval_of_a_neighbour_does_not_count(other):
    policy = parse_policy(policy_mapping(rule(), rule(id=other, value="missing", min=0)))
    files = scored(None)
    decision = decide(policy, files, at=AT, approvals=[approval(policy, files, rule=other)])
    assert (finding(decision, "r").effect, finding(decision, other).effect) == ("block", "approved")


@pytest.mark.parametrize("digit", ["0", "f"])
@pytest.mark.parametrize("field", ["evidence", "policy"])
def test_no_other_digest_will_do(field, digit):
    policy, files = approvable(), scored(None)
    with pytest.raises(EvidenceMismatch, match=f"is about another {field}"):
        decide(policy, files, at=AT, approvals=[approval(policy, files, **{field: sha(digit)})])


def test_an_exception_of_a_warning_or_of_what_rests_changes_nothing():
    rules = [
        rule(value="images", min=0, id="ok"),
        rule(severity="warn"),
        rule(id="s", value="gone[*].x", when_absent="skip"),
    ]
    both = [EXCEPTION, {**EXCEPTION, "rule": "s"}]
    files = scored(0.9)
    files["evaluate.tsbd"]["results"]["gone"] = []
    decision = decide(parse_policy({**policy_mapping(*rules), "exceptions": both}), files, at=AT)
    assert (finding(decision, "r").effect, finding(decision, "s").effect) == ("warn", "skipped")
    assert "Ada" not in finding(decision, "r").why + finding(decision, "s").why


def test_more_people_than_needed_are_enough():
    policy, files = approvable(require={"approvals": 2}), scored(None)
    given = [approval(policy, files, identity=name) for name in ("ada", "bob", "cleo")]
    assert decide(policy, files, at=AT, approvals=given).outcome == "allow"


def test_an_approved_rule_does_not_become_overdue():
    policy, files = approvable(max_unknown_age_days=7), scored(None)
    found = finding(decide(policy, files, at=later(60), approvals=[approval(policy, files)]), "r")
    assert (found.verdict, found.effect) == (UNKNOWN, "approved")
    assert "Undecided for" not in found.why


def from_file(value):
    """As it comes from a file: words equal the program's own, and are other objects."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    ("kind", "score", "outcome"), [("fail", 0.9, "allow"), ("unknown", 0.9, "deny"), ("fail", None, "allow")]
)
def test_words_of_a_file_are_the_programs_words(kind, score, outcome):
    mapping = policy_mapping(rule(approvable=kind), rule(id="never", approvable="never", value="images", min=0))
    policy, files = parse_policy(from_file({**mapping, "max_unknown_age_days": 7})), from_file(scored(score))
    assert approvable_rules(policy) == {"r": kind}
    late = approval(policy, files, approved_at=later(8))
    assert decide(policy, files, at=later(9), approvals=[late]).outcome == outcome


def test_an_exception_of_a_file_finds_its_artifact():
    policy = parse_policy(from_file({**policy_mapping(rule()), "exceptions": [{**EXCEPTION, "source": SOURCE}]}))
    assert decide(policy, from_file(scored(0.9)), at=AT).outcome == "allow"
