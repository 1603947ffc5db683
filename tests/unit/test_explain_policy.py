# ruff: noqa: E501 - tables of cases, one a line
"""Policies in plain sentences, remarks on them, and the difference of two."""

import pytest

from defense_core.policy import parse_policy
from defense_core.policy_diff import Change, Direction, diff, overall
from defense_core.policy_explain import explain, remarks
from defense_core.policy_time import parse_time
from tests.unit.policy_records import AT, SHIPPED, policy, policy_mapping, rule, sha, shipped

NOW = parse_time(AT, "now")
EXCEPTION = {"rule": "r", "owner": "Ada", "reason": "Known.", "expires": "2027-01-31"}


def made(*rules, **changes):
    return parse_policy({**policy_mapping(*rules), **changes})


def said(read, about):
    (found,) = [each.text for each in explain(read) if each.about == about]
    return found


# -- explain -------------------------------------------------------------------------


def test_a_rule_is_a_sentence():
    assert said(policy(), "r") == (
        "Blocks unless score of evaluate.selected is at most 0.5. Because. Where there is nothing to read, "
        "it is undecided. If it is undecided, a person may approve it; a failure never."
    )
    assert said(policy(rule(), rule(id="w", severity="warn", when_absent="skip", equals=True)), "w") == (
        "Only warns unless score of evaluate.selected is true. Because. Where there is nothing to read, it rests."
    )


@pytest.mark.parametrize(
    ("bound", "words"),
    [
        ({"max": 3.0}, "at most 3"), ({"min": 3}, "at least 3"), ({"equals": "x"}, "x"), ({"one_of": ["a", 1]}, "a or 1"),
        ({"matches": ["s3://a/*"]}, "an address or text like s3://a/*"),
    ],
)  # fmt: skip
def test_bounds_are_said_in_words(bound, words):
    assert f"evaluate.selected is {words}. Because." in said(policy(rule(**bound)), "r")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("never", "Nobody may approve it."),
        ("unknown", "If it is undecided, a person may approve it; a failure never."),
        ("fail", "A person may approve it, even if it failed."),
    ],
)
def test_it_is_said_what_may_be_approved(kind, sentence):
    assert said(policy(rule(approvable=kind)), "r").endswith(sentence)


def test_everything_that_a_policy_says_is_explained():
    read = made(
        rule(),
        description="Text.",
        max_unknown_age_days=3,
        require={"max_evidence_age_days": 4, "min_clean_images": 5, "signatures": ["model", "attestations"], "approvals": 2},
        exceptions=[{**EXCEPTION, "source": sha("a")}, {**EXCEPTION, "rule": "require.min_clean_images"}],
    )  # fmt: skip
    assert said(read, "description") == "Text."
    assert said(read, "promote").startswith("A model is promoted only if")
    assert said(read, "max_unknown_age_days").startswith("What is still undecided 3 days after")
    assert "clean_images of fetch must be at least 5" in said(read, "require.min_clean_images")
    assert "no evidence is older than 4 days" in said(read, "require.max_evidence_age_days")
    assert said(read, "require.signatures").endswith("signatures over its model and attestations.")
    assert "2 different people" in said(read, "require.approvals")
    assert said(read, "exception of r") == (
        f"Does not count for the artifact {sha('a')} until 2027-01-31, as Ada decided: Known."
    )
    assert "for every model" in said(read, "exception of require.min_clean_images")


def test_what_is_not_said_is_explained_too():
    assert said(policy(), "max_unknown_age_days") == "What is undecided stays undecided until somebody acts."
    assert said(policy(promote=False), "promote").endswith("nothing is ever promoted.")
    assert [each.about for each in explain(policy())] == ["promote", "integrity", "max_unknown_age_days", "r"]


# -- remarks -------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_there_is_nothing_to_remark_on_what_is_shipped(name):
    assert remarks(parse_policy(shipped(name)), NOW) == ()


@pytest.mark.parametrize(
    ("rules", "changes", "about", "words"),
    [
        ([rule(), rule(id="s")], {"exceptions": [{**EXCEPTION, "expires": "2026-12-31"}]}, "exception of r", "It expired on 2026-12-31; Ada"),
        ([rule(), rule(id="w", severity="warn", max=1)], {"exceptions": [{**EXCEPTION, "rule": "w"}]}, "exception of w", "has no effect"),
        ([rule()], {"exceptions": [EXCEPTION]}, "exceptions", "Every blocking rule is excepted"),
        ([rule(), rule(id="w", severity="warn", approvable="fail", max=1)], {}, "w", "approvable has no effect"),
        ([rule(), rule(id="s")], {}, "s", "It demands the same as r."),
        ([rule(), rule(id="s", min=0.6)], {}, "s", "No value satisfies both this rule and r."),
        ([rule(min=0.6), rule(id="s", max=0.5)], {}, "s", "No value satisfies both"),
        ([rule(equals=True), rule(id="s", max=0.5)], {}, "s", "No value satisfies both"),
        ([rule(one_of=[1, 2]), rule(id="s", equals=3)], {}, "s", "No value satisfies both"),
        ([rule()], {"max_unknown_age_days": 9, "require": {"max_evidence_age_days": 8}}, "max_unknown_age_days", "never comes into play"),
    ],
)  # fmt: skip
def test_what_does_not_do_what_was_meant_is_remarked(rules, changes, about, words):
    found = [each for each in remarks(made(*rules, **changes), NOW) if each.about == about]
    assert any(words in each.text for each in found), found


@pytest.mark.parametrize(
    ("rules", "changes"),
    [
        ([rule(), rule(id="s", value="other")], {"exceptions": [EXCEPTION]}),
        ([rule()], {"exceptions": [{**EXCEPTION, "source": sha("a")}]}),
        ([rule()], {"exceptions": [EXCEPTION], "require": {"positive_control": True}}),
        ([rule()], {"exceptions": [EXCEPTION], "require": {"signatures": ["model"]}}),
        ([rule(), rule(id="s", min=0.5)], {}),
        ([rule(), rule(id="s", max=0.4)], {}),
        ([rule(), rule(id="s", equals=0.4)], {}),
        ([rule(equals=1), rule(id="s", one_of=[1, 2])], {}),
        ([rule(equals=1), rule(id="s", one_of=[1, True])], {}),
        ([rule(), rule(id="s", evidence="fetch", min=0.6)], {}),
        ([rule()], {"max_unknown_age_days": 8, "require": {"max_evidence_age_days": 8}}),
    ],
)
def test_what_is_in_order_is_not_remarked(rules, changes):
    assert remarks(made(*rules, **changes), NOW) == ()


def test_an_expired_exception_excepts_nothing():
    expired = made(rule(), exceptions=[{**EXCEPTION, "expires": "2026-12-31"}])
    assert [each.about for each in remarks(expired, NOW)] == ["exception of r"]
    required = [EXCEPTION, {**EXCEPTION, "rule": "require.positive_control"}]
    everything = made(rule(), exceptions=required, require={"positive_control": True})
    assert [each.about for each in remarks(everything, NOW)] == ["exceptions"]


# -- diff ----------------------------------------------------------------------------

OLD = made(rule())


def one_change(old, new):
    (change,) = diff(old, new)
    return change


@pytest.mark.parametrize(
    ("old", "new", "direction"),
    [
        ({"max": 0.5}, {"max": 0.4}, "stricter"), ({"max": 0.5}, {"max": 0.6}, "looser"),
        ({"min": 0.5}, {"min": 0.6}, "stricter"), ({"min": 0.5}, {"min": 0.4}, "looser"),
        ({"one_of": [1, 2]}, {"one_of": [1]}, "stricter"), ({"one_of": [1]}, {"one_of": [1, 2]}, "looser"),
        ({"one_of": [1]}, {"one_of": [2]}, "other"), ({"matches": ["a", "b"]}, {"matches": ["b"]}, "stricter"),
        ({"equals": 1}, {"equals": 2}, "other"), ({"max": 1}, {"min": 1}, "other"),
        ({"severity": "warn"}, {"severity": "block"}, "stricter"), ({"severity": "block"}, {"severity": "warn"}, "looser"),
        ({"when_absent": "skip"}, {}, "stricter"), ({}, {"when_absent": "skip"}, "looser"),
        ({}, {"approvable": "never"}, "stricter"), ({}, {"approvable": "fail"}, "looser"),
        ({}, {"why": "Else."}, "wording"), ({}, {"value": "other"}, "other"), ({}, {"evidence": "fetch"}, "other"),
        ({"max": 0.5}, {"max": 0.4, "why": "Else."}, "stricter"), ({}, {"max": 0.4, "approvable": "fail"}, "other"),
        ({"severity": "warn"}, {"severity": "warn", "max": 9}, "wording"),
        ({"severity": "block"}, {"severity": "warn", "max": 0.1}, "looser"),
        ({"severity": "warn"}, {"severity": "block", "max": 9, "value": "other"}, "stricter"),
        ({"equals": True}, {"equals": 1}, "other"), ({"one_of": [0, 1]}, {"one_of": [False, 1]}, "other"),
        ({"one_of": [True, "a"]}, {"one_of": [1, "a", 2]}, "other"),
    ],
)  # fmt: skip
def test_a_changed_rule_is_stricter_looser_or_neither(old, new, direction):
    base = rule(id="base", value="base")
    change = one_change(made(base, rule(**old)), made(base, rule(**new)))
    assert (change.about, change.direction.value) == ("r", direction)
    assert " → " in change.text


def test_the_change_is_spelt_out():
    change = one_change(OLD, made(rule(max=0.4, approvable="never")))
    assert change == Change("r", Direction.STRICTER, "bound: <= 0.5 → <= 0.4; approvable: unknown → never")


def test_rules_that_come_and_go():
    more = made(rule(), rule(id="s"))
    assert one_change(OLD, more) == Change(
        "s", Direction.STRICTER, "added: block unless score of evaluate.selected is <= 0.5"
    )
    assert one_change(more, OLD).direction is Direction.LOOSER
    assert one_change(OLD, made(rule(), rule(id="w", severity="warn"))).direction is Direction.WORDING


@pytest.mark.parametrize(
    ("old", "new", "about", "direction", "text"),
    [
        ({}, {"max_unknown_age_days": 7}, "max_unknown_age_days", "stricter", "none → 7"),
        ({"max_unknown_age_days": 7}, {"max_unknown_age_days": 8.5}, "max_unknown_age_days", "looser", "7 → 8.5"),
        ({}, {"require": {"max_evidence_age_days": 7}}, "require.max_evidence_age_days", "stricter", "none → 7"),
        ({}, {"require": {"approvals": 2}}, "require.approvals", "stricter", "1 → 2"),
        ({}, {"require": {"signatures": ["model"]}}, "require.signatures", "stricter", "none → model"),
        ({"require": {"signatures": ["model"]}}, {"require": {"signatures": ["attestations"]}}, "require.signatures", "other", "model → attestations"),
        ({}, {"require": {"sources": ["a"]}}, "require.sources", "stricter", "added: block unless uri of fetch is matching a"),
        ({"require": {"min_clean_images": 9}}, {"require": {"min_clean_images": 8}}, "require.min_clean_images", "looser", "bound: >= 9 → >= 8"),
        ({}, {"promote": False}, "promote", "stricter", "true → false"),
        ({"promote": False}, {}, "promote", "looser", "false → true"),
        ({}, {"description": "Text."}, "description", "wording", " → Text."),
        ({}, {"name": "other"}, "name", "wording", "test → other"),
        ({"exceptions": [EXCEPTION]}, {"exceptions": [{**EXCEPTION, "expires": "2027-02-01"}]}, "exception of r", "looser", "expires: 2027-01-31 → 2027-02-01"),
        ({"exceptions": [EXCEPTION]}, {"exceptions": [{**EXCEPTION, "expires": "2027-01-01"}]}, "exception of r", "stricter", "expires: 2027-01-31 → 2027-01-01"),
        ({"exceptions": [EXCEPTION]}, {"exceptions": [{**EXCEPTION, "owner": "Bob"}]}, "exception of r", "wording", "Ada: Known. → Bob: Known."),
    ],
)  # fmt: skip
def test_other_changes(old, new, about, direction, text):
    change = one_change(made(rule(), **old), made(rule(), **new))
    assert (change.about, change.direction.value, change.text) == (about, direction, text)


@pytest.mark.parametrize(
    ("old", "new", "direction"),
    [
        (["2027-01-31"], ["2027-01-31", "2099-01-01"], "looser"),
        (["2027-01-31"], ["2099-01-01", "2027-01-31"], "looser"),
        (["2027-01-31", "2099-01-01"], ["2027-01-31"], "stricter"),
        (["2027-01-31"], ["2027-01-31", "2026-01-01"], "wording"),
        (["2027-01-31"], ["2027-01-31", "2027-01-31"], "wording"),
        (["2027-01-31", "2028-01-01"], ["2027-01-31", "2029-01-01"], "looser"),
    ],
)
def test_exceptions_of_one_rule_beside_each_other(old, new, direction):
    before, after = (
        made(rule(), exceptions=[{**EXCEPTION, "expires": day} for day in several]) for several in (old, new)
    )
    assert one_change(before, after).direction.value == direction
    assert diff(after, made(rule(), exceptions=[{**EXCEPTION, "expires": day} for day in reversed(new)])) == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rules": [rule(one_of=[1, "a"])]}, {"rules": [rule(one_of=["a", 1])]}),
        ({"rules": [rule(matches=["a", "b"])]}, {"rules": [rule(matches=["b", "a"])]}),
        ({"require": {"licences": ["MIT", "Apache-2.0"]}}, {"require": {"licences": ["Apache-2.0", "MIT"]}}),
    ],
)
def test_the_order_of_what_may_stand_in_any_is_no_difference(old, new):
    assert diff(made(rule(), **old), made(rule(), **new)) == ()


def test_exceptions_that_come_and_go():
    excepted = made(rule(), exceptions=[{**EXCEPTION, "source": sha("a")}])
    assert one_change(OLD, excepted).direction is Direction.LOOSER
    assert one_change(excepted, OLD).direction is Direction.STRICTER
    assert one_change(OLD, excepted).about == f"exception of r for {sha('a')}"


@pytest.mark.parametrize(("old", "new"), [({"max": 1}, {"max": 1.0}), ({"one_of": [1]}, {"one_of": [1.0]})])
def test_one_number_written_in_two_ways_is_no_difference(old, new):
    assert diff(made(rule(**old)), made(rule(**new))) == ()


def test_a_number_and_a_truth_value_do_not_demand_the_same():
    found = remarks(made(rule(equals=1), rule(id="s", equals=True)), NOW)
    assert [each.text for each in found if "same" in each.text] == []


def test_the_same_policy_has_no_difference():
    for name in SHIPPED:
        assert diff(parse_policy(shipped(name)), parse_policy(shipped(name))) == ()


def test_the_loosest_change_speaks_for_all():
    of = [Change("x", direction, "") for direction in Direction]
    assert overall(tuple(of)) is Direction.LOOSER
    assert overall((of[0], of[2])) is Direction.OTHER
    assert overall((of[0], of[3])) is Direction.STRICTER
    assert overall((of[3],)) is Direction.WORDING
    assert overall(()) is None


def test_strict_is_stricter_than_standard():
    assert overall(diff(parse_policy(shipped("standard")), parse_policy(shipped("strict")))) is Direction.STRICTER
    assert overall(diff(parse_policy(shipped("strict")), parse_policy(shipped("standard")))) is Direction.LOOSER
