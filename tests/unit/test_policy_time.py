"""Ages and clocks: time is an argument of a decision and stands in it."""

import json
from datetime import datetime

import pytest

from defense_core.errors import ConfigError
from defense_core.policy import decide, parse_policy
from defense_core.policy_time import days_between, expired, is_day, parse_time, time_text
from tests.unit.policy_records import (
    AT,
    FAIL,
    FETCHED,
    PASS,
    UNKNOWN,
    dated,
    finding,
    later,
    policy_mapping,
    record,
    rule,
    run,
)

LIMITED = {**policy_mapping(rule(value="images", min=0)), "require": {"max_evidence_age_days": 10}}


@pytest.mark.parametrize(
    ("given", "stated"),
    [
        ("2027-01-31T12:00:00+00:00", "2027-01-31T12:00:00+00:00"),
        ("2027-01-31T12:00:00Z", "2027-01-31T12:00:00+00:00"),
        ("2027-01-31T13:30:00.999+01:30", "2027-01-31T12:00:00+00:00"),
    ],
)
def test_times_are_utc_and_whole_seconds(given, stated):
    assert time_text(parse_time(given, "x")) == stated
    assert parse_time(given, "x") == datetime.fromisoformat(stated)


@pytest.mark.parametrize(
    "given", ["2027-01-31T12:00:00", "2027-01-31", "", "soon", None, 3, "0001-01-01T00:00:00+23:00"]
)
def test_what_is_no_time_is_refused(given):
    with pytest.raises(ConfigError, match="x is no time: expected ISO 8601 with a zone"):
        parse_time(given, "x")


def test_days():
    one, two = parse_time("2027-01-01T00:00:00Z", ""), parse_time("2027-01-02T12:00:00Z", "")
    assert (days_between(one, two), days_between(two, one), days_between(one, one)) == (1.5, -1.5, 0)
    assert is_day("2028-02-29")
    for each in ("2027-02-29", "2027-1-1", "20270101", "2027-01-01T00:00:00", "", None, 3):
        assert not is_day(each)


def test_a_day_holds_until_its_end():
    assert not expired("2027-01-31", parse_time("2027-01-31T23:59:59Z", ""))
    assert expired("2027-01-31", parse_time("2027-02-01T00:00:00Z", ""))
    assert not expired("2027-01-31", parse_time("2027-02-01T00:30:00+01:00", ""))


@pytest.mark.parametrize(
    ("days", "verdict", "outcome"),
    [
        (0, PASS, "allow"),
        (9.99, PASS, "allow"),
        (10, PASS, "allow"),
        (10 + 1 / 86400, FAIL, "deny"),
        (4000, FAIL, "deny"),
    ],
)
def test_evidence_has_a_largest_age(days, verdict, outcome):
    decision = decide(parse_policy(LIMITED), dated(), at=later(days))
    found = finding(decision, "require.max_evidence_age_days")
    assert (found.verdict, found.effect, found.bound) == (verdict, "block", "<= 10 days")
    assert found.value == round(days, 5)
    met = "Met" if verdict is PASS else "Not met"
    told = "10.000011574074074" if 10 < days < 11 else f"{days:g}"  # six digits would say 10, which is permitted
    assert found.why == (
        f"{met}: the oldest evidence (evaluate.before) is {told} days old. "
        "What was measured long ago says little about what is promoted today."
    )
    assert decision.outcome == outcome


def test_the_oldest_evidence_counts():
    files = dated()
    files["export"]["environment"]["started"] = later(-3)
    found = finding(decide(parse_policy(LIMITED), files, at=later(8)), "require.max_evidence_age_days")
    assert (found.verdict, found.value) == (FAIL, 11)
    assert "(export)" in found.why


@pytest.mark.parametrize(
    ("started", "at", "problem"),
    [
        (AT, None, "the decision states no time"),
        (None, AT, "evidence export states no time"),
        ("yesterday", AT, "evidence export states no time"),
        ("2027-01-01T00:00:00", AT, "evidence export states no time"),
        (7, AT, "evidence export states no time"),
        (later(1), AT, "evidence export is from after the decision"),
        (later(301 / 86400), AT, "evidence export is from after the decision"),
    ],
)
def test_an_age_that_cannot_be_told_is_unknown(started, at, problem):
    files = dated()
    files["export"]["environment"]["started"] = started
    decision = decide(parse_policy(LIMITED), files, at=at)
    found = finding(decision, "require.max_evidence_age_days")
    assert (found.verdict, found.value, found.bound) == (UNKNOWN, None, "<= 10 days")
    assert found.why.startswith(f"Not decided: {problem}. ")
    assert decision.outcome == "unknown"


def test_clocks_may_differ_a_little():
    files = dated()
    files["export"]["environment"]["started"] = later(300 / 86400)
    assert decide(parse_policy(LIMITED), files, at=AT).outcome == "allow"


@pytest.mark.parametrize("environment", [None, "x", {}, {"started": None}])
def test_evidence_without_environment_states_no_time(environment):
    files = dated()
    files["fetch"]["environment"] = environment
    found = finding(decide(parse_policy(LIMITED), files, at=AT), "require.max_evidence_age_days")
    assert found.why.startswith("Not decided: evidence fetch states no time.")


def test_without_evidence_there_is_no_age():
    found = finding(decide(parse_policy(LIMITED), {}, at=AT), "require.max_evidence_age_days")
    assert found.why.startswith("Not decided: there is no evidence.")


# -- the clock of what is undecided --------------------------------------------------

OPEN = {**policy_mapping(rule()), "max_unknown_age_days": 7}  # the score is not there: undecided


@pytest.mark.parametrize(
    ("days", "verdict", "outcome"), [(0, UNKNOWN, "unknown"), (7, UNKNOWN, "unknown"), (7.01, FAIL, "deny")]
)
def test_what_is_undecided_for_too_long_has_failed(days, verdict, outcome):
    decision = decide(parse_policy(OPEN), dated(), at=later(days))
    found = finding(decision, "r")
    assert (found.verdict, found.effect, decision.outcome) == (verdict, "block", outcome)
    overdue = " Undecided for 7.01 days, where the policy allows 7: this is a failure now."
    assert found.why == "Not decided: score is missing. Because." + (overdue if verdict is FAIL else "")


def test_without_limit_time_or_dates_nothing_becomes_overdue():
    unlimited = {key: value for key, value in OPEN.items() if key != "max_unknown_age_days"}
    assert decide(parse_policy(unlimited), dated(), at=later(999)).outcome == "unknown"
    assert decide(parse_policy(OPEN), dated()).outcome == "unknown"
    assert decide(parse_policy(OPEN), run(), at=later(999)).outcome == "unknown"


def test_the_clock_is_for_what_blocks_and_is_undecided_only():
    rules = [
        rule(id="warns", severity="warn"),
        rule(id="rests", value="probes[*].asr.high", when_absent="skip"),
        rule(id="holds", value="images", min=0),
        rule(id="fails", value="images", min=10**9),
    ]
    decision = decide(parse_policy({**policy_mapping(*rules), "max_unknown_age_days": 7}), dated(), at=later(99))
    found = {name: finding(decision, name) for name in ("warns", "rests", "holds", "fails")}
    assert [each.verdict for each in found.values()] == [UNKNOWN, UNKNOWN, PASS, FAIL]
    assert not any("Undecided for" in each.why for each in found.values())


def test_a_clock_that_has_just_run_out_shows_it():
    found = finding(decide(parse_policy(OPEN), dated(), at=later(7 + 1 / 86400)), "r")
    assert found.verdict is FAIL
    assert "Undecided for 7.000011574" in found.why


def test_a_control_that_was_kept_does_not_start_the_clock_and_yet_has_its_age():
    files = dated()
    files["control"] = record("control", {"model": FETCHED}, {}, {"detected": True, "repeats": "kept"})
    files["control"]["environment"]["started"] = later(-10)
    assert decide(parse_policy(OPEN), files, at=later(6)).outcome == "unknown"
    assert decide(parse_policy(OPEN), files, at=later(8)).outcome == "deny"
    files["control"]["results"]["repeats"] = None
    assert decide(parse_policy(OPEN), files, at=later(6)).outcome == "deny"
    files["control"]["results"]["repeats"] = "kept"
    aged = finding(decide(parse_policy(LIMITED), files, at=later(6)), "require.max_evidence_age_days")
    assert (aged.verdict, aged.value) == (FAIL, 16)


def test_the_clock_runs_for_built_in_rules_too():
    files = dated()
    del files["select"]
    decision = decide(parse_policy({**OPEN, "rules": [rule(value="images", min=0)]}), files, at=later(8))
    assert finding(decision, "integrity.model").verdict is FAIL
    assert decision.outcome == "deny"


# -- decisions and their time --------------------------------------------------------


def test_a_decision_states_its_time_and_is_made_again_from_it():
    parsed = parse_policy({**OPEN, "require": {"max_evidence_age_days": 10}})
    first = decide(parsed, dated(), at="2027-01-03T01:00:00+01:00")
    assert first.decided_at == "2027-01-03T00:00:00+00:00"
    mapping = json.loads(first.to_json())
    assert (mapping["schema"], mapping["approvals"], mapping["supersedes"]) == (2, [], None)
    assert decide(parsed, dated(), at=mapping["decided_at"]).to_json() == first.to_json()
    assert decide(parsed, dated(), at=later(99)).to_json() != first.to_json()


def test_a_decision_without_time_is_of_the_first_schema():
    mapping = json.loads(decide(parse_policy(OPEN), dated()).to_json())
    assert mapping["schema"] == 1
    assert not {"decided_at", "approvals", "supersedes"} & set(mapping)


def test_a_decision_may_take_the_place_of_another_and_names_it():
    former = "sha256:" + "f" * 64
    decision = decide(parse_policy(OPEN), dated(), at=AT, supersedes=former)
    assert json.loads(decision.to_json())["supersedes"] == former
    with pytest.raises(ConfigError, match="needs its time"):
        decide(parse_policy(OPEN), dated(), supersedes=former)
    for wrong in ("f" * 64, "sha256:f", former + "0", ""):
        with pytest.raises(ConfigError, match="supersedes is no digest: expected sha256:<64 hex digits>"):
            decide(parse_policy(OPEN), dated(), at=AT, supersedes=wrong)


def test_a_time_without_zone_decides_nothing():
    with pytest.raises(ConfigError, match="the time of the decision is no time"):
        decide(parse_policy(OPEN), dated(), at="2027-01-01T00:00:00")
