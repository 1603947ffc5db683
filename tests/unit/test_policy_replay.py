"""The same inputs give the same decision, byte for byte, years later."""

import copy
import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from defense_core.config import digest
from defense_core.files import sha256_bytes
from defense_core.policy import decide, parse_policy
from tests.unit.policy_records import (
    AT,
    CLEANED,
    GOOD,
    OTHER,
    damage,
    dated,
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
    files = dated(run(GOOD, probe()))
    first = decide(parse_policy(shipped("standard")), files, at=AT).to_json()
    shuffled = json.loads(json.dumps({name: files[name] for name in reversed(files)}))
    again = parse_policy(dict(reversed(shipped("standard").items())))
    assert decide(again, shuffled, at=AT).to_json() == first
    assert json.loads(first)["outcome"] == "allow"


def test_inputs_are_left_alone():
    files, mapping = run(GOOD, probe()), shipped("standard")
    files_before, mapping_before = copy.deepcopy(files), copy.deepcopy(mapping)
    decide(parse_policy(mapping), files)
    assert files == files_before
    assert mapping == mapping_before


@pytest.mark.parametrize("name", ["gate", "sign", "promote", "report"])
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


# -- what was decided by earlier releases --------------------------------------------

FIRST = Path(__file__).parent / "policies-v1"
"""The policies that the first release shipped, with what it decided by them: digests of policy and decision."""
DECIDED = {
    "standard": (
        "sha256:d213362944c2850e0459168e5ac4fe6895ab0274b81c41eb4537160d7988e795",
        "sha256:c0b88f24f02f2551a6c6400a0829ad72e87eee0123fa65bef72cf4a3493ef55f",
    ),
    "strict": (
        "sha256:45e1a747ded76d41a704825cac44ac8750d0de39d1ff52ee8b8e4f80fb4d7b5f",
        "sha256:be3871b7356cebc933ffbbdaa5fe179eb3cfec4867eda52df63d30bfe8d21c01",
    ),
    "observe": (
        "sha256:532ad11d578ef10838370f4e18618936e2d0ec2eea466ffea808efa05593637b",
        "sha256:7c060e28cebb899e652fd2ee6efa7700876a05285efb74bab4721b4ab2065342",
    ),
}


@pytest.mark.parametrize("name", DECIDED)
def test_decisions_of_the_first_release_are_made_again_byte_for_byte(name):
    read = parse_policy(yaml.safe_load((FIRST / f"{name}.yaml").read_text()))
    decision = decide(read, run(GOOD, probe()))
    assert (read.digest, sha256_bytes(decision.to_json())) == DECIDED[name]


def test_the_policy_digest_speaks_of_requirements_and_exceptions():
    base = policy_mapping()
    exception = {"rule": "r", "owner": "Ada", "reason": "Why.", "expires": "2027-01-31"}
    spelt_out = {**base, "require": {"positive_control": False, "approvals": 1}, "exceptions": []}
    spelt_out["rules"] = [rule(approvable="unknown")]
    assert parse_policy(spelt_out).digest == parse_policy({**base, "require": {}}).digest == parse_policy(base).digest
    digests = {parse_policy(base).digest}
    for change in (
        {"max_unknown_age_days": 3}, {"max_unknown_age_days": 4}, {"require": {"max_evidence_age_days": 3}},
        {"require": {"min_clean_images": 3}}, {"require": {"positive_control": True}}, {"require": {"sources": ["a"]}},
        {"require": {"licences": ["a"]}}, {"require": {"formats": ["a"]}}, {"require": {"signatures": ["model"]}},
        {"require": {"approvals": 2}}, {"rules": [rule(approvable="fail")]}, {"rules": [rule(approvable="never")]},
        {"rules": [rule(matches=["a"])]}, {"exceptions": [exception]}, {"exceptions": [exception, exception]},
        {"exceptions": [{**exception, "owner": "Bob"}]}, {"exceptions": [{**exception, "expires": "2027-02-01"}]},
        {"exceptions": [{**exception, "source": "sha256:" + "a" * 64}]}, {"exceptions": [{**exception, "reason": "x"}]},
    ):  # fmt: skip
        digests.add(parse_policy({**base, **change}).digest)
    assert len(digests) == 20


def test_an_outcome_that_was_read_from_a_file_promotes_the_same():
    for outcome, promotes in (("allow", True), ("deny", False), ("unknown", False), ("observe", False)):
        decision = dataclasses.replace(decide(policy(), run()), outcome=json.loads(json.dumps(outcome)))
        assert decision.promotes is promotes


def test_the_gate_is_light():
    """It runs in a pod without torch, and in an admission hook; so may the commands that read policies."""
    code = (
        "import sys, defense_core.policy, defense_core.policy_diff, defense_core.policy_explain;"
        "print({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
