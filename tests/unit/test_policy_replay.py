"""The same inputs give the same decision, byte for byte, years later."""

import copy
import json
import math
import re

import pytest

from defense_core.config import digest
from defense_core.policy import decide, parse_policy
from tests.unit.policy_records import (
    CLEANED,
    GOOD,
    OTHER,
    damage,
    policy,
    policy_mapping,
    probe,
    record,
    rule,
    run,
    shipped,
    with_score,
)


def test_the_same_inputs_give_the_same_bytes():
    files = run(GOOD, probe())
    first = decide(parse_policy(shipped("standard")), files).to_json()
    shuffled = json.loads(json.dumps({name: files[name] for name in reversed(files)}))
    again = parse_policy(dict(reversed(shipped("standard").items())))
    assert decide(again, shuffled).to_json() == first
    assert json.loads(first)["outcome"] == "allow"


def test_inputs_are_left_alone():
    files, mapping = run(GOOD, probe()), shipped("standard")
    files_before, mapping_before = copy.deepcopy(files), copy.deepcopy(mapping)
    decide(parse_policy(mapping), files)
    assert files == files_before
    assert mapping == mapping_before


@pytest.mark.parametrize("name", ["gate", "promote", "report"])
def test_what_comes_after_the_decision_is_no_evidence_for_it(name):
    later = {**run(), name: record(name, {"model": OTHER}, {}, {})}
    later[name]["verdict"] = "FAIL"
    assert decide(policy(), later).to_json() == decide(policy(), run()).to_json()


def test_the_evidence_digest_changes_with_every_part_of_every_file():
    seen = {decide(policy(), run()).evidence_digest}
    for name in run():
        for change in ({"environment": {"seed": 1}}, {"findings": [1]}, {"extra": 1}, {"results": {"x": 1}}):
            seen.add(decide(policy(), damage(name, **change)).evidence_digest)
        files = run()
        del files[name]
        seen.add(decide(policy(), files).evidence_digest)
    assert len(seen) == 1 + 5 * len(run())
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in seen)


def test_nan_has_a_digest_of_its_own():
    digests = [
        decide(policy(), with_score(each)).evidence_digest
        for each in (math.nan, math.inf, -math.inf, None, "nan", [math.nan])
    ]
    assert len(set(digests)) == len(digests)
    assert decide(policy(), with_score(math.nan)).to_json() == decide(policy(), with_score(float("nan"))).to_json()


def test_the_decision_is_plain_json():
    mapping = json.loads(decide(policy(), with_score(math.nan)).to_json())
    assert set(mapping) == {
        "schema", "verdict", "outcome", "findings", "policy_name", "policy_digest", "evidence_digest", "subject",
    }  # fmt: skip
    assert (mapping["schema"], mapping["verdict"], mapping["outcome"]) == (1, "UNKNOWN", "unknown")
    assert set(mapping["findings"][-1]) == {"rule", "verdict", "value", "bound", "why", "effect"}
    assert mapping["policy_name"] == "test"
    assert mapping["policy_digest"] == policy().digest
    assert mapping["subject"]["model"] == CLEANED


def test_the_policy_digest_speaks_of_content_only():
    base = policy_mapping()
    spelt_out = copy.deepcopy(base)
    spelt_out["rules"][0]["when_absent"] = "unknown"
    spelt_out["description"] = ""
    assert parse_policy(spelt_out).digest == parse_policy(base).digest
    digests = {parse_policy(base).digest}
    for change in (
        {"name": "other"}, {"promote": False}, {"description": "x"}, {"rules": [rule(max=0.4)]},
        {"rules": [rule(min=0.5)]},
        {"rules": [rule(id="s")]}, {"rules": [rule(evidence="fetch")]}, {"rules": [rule(value="other")]},
        {"rules": [rule(when_absent="skip")]}, {"rules": [rule(why="Else.")]}, {"rules": [rule(), rule(id="two")]},
        {"rules": [rule(equals=0.5)]}, {"rules": [rule(one_of=[0.5])]},
        {"rules": [rule(severity="warn"), rule(id="q")]},
    ):  # fmt: skip
        digests.add(parse_policy({**base, **change}).digest)
    assert len(digests) == 15


def test_the_evidence_digest_reaches_into_lists():
    scores = ([1], [2], [[1]], [{"a": math.nan}], [], [1, 1])
    assert len({decide(policy(), with_score(each)).evidence_digest for each in scores}) == len(scores)


def test_the_digest_of_evidence_with_nan_is_pinned():
    """A folder from today replays to the same digest in every later release."""
    files = {"fetch": record("fetch", {}, {}, {"x": [math.nan]})}
    marked = {"fetch": record("fetch", {}, {}, {"x": [{"$nonfinite": "nan"}]})}
    assert decide(policy(), files).evidence_digest == digest(marked)
