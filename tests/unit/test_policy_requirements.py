"""What a policy requires of every model, without writing rules for it."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from defense_core.policy import decide, parse_policy, signature_findings
from defense_core.policy_types import Requirements, matches
from tests.unit.policy_records import (
    AT,
    FAIL,
    FETCHED,
    INTEGRITY,
    PASS,
    UNKNOWN,
    dated,
    finding,
    policy,
    policy_mapping,
    record,
    rule,
)

ANY = rule(id="any", value="images", min=0)


def requiring(**require):
    return parse_policy({**policy_mapping(ANY), "require": require})


def decided(files, **require):
    decision = decide(requiring(**require), files, at=AT)
    return decision, finding(decision, f"require.{next(iter(require))}")


def fetched(**results):
    files = dated()
    files["fetch"]["results"] = results
    return files


CASES = [
    ({"min_clean_images": 500}, {"clean_images": 500}, PASS, ">= 500"),
    ({"min_clean_images": 500}, {"clean_images": 499}, FAIL, ">= 500"),
    ({"min_clean_images": 500}, {}, UNKNOWN, ">= 500"),
    ({"sources": ["s3://models/*"]}, {"uri": "s3://models/a.pt"}, PASS, "matching s3://models/*"),
    ({"sources": ["s3://models/*"]}, {"uri": "s3://others/a.pt"}, FAIL, "matching s3://models/*"),
    (
        {"sources": ["s3://models/*", "models:/**"]},
        {"uri": "models:/a/3"},
        PASS,
        "matching s3://models/* or models:/**",
    ),
    ({"sources": ["s3://models/*"]}, {"uri": None}, UNKNOWN, "matching s3://models/*"),
    ({"sources": ["s3://models/*"]}, {"uri": 3}, UNKNOWN, "matching s3://models/*"),
    ({"licences": ["MIT", "Apache-2.0"]}, {"licence": "MIT"}, PASS, "one of MIT, Apache-2.0"),
    ({"licences": ["MIT", "Apache-2.0"]}, {"licence": "GPL-3.0"}, FAIL, "one of MIT, Apache-2.0"),
    ({"licences": ["MIT"]}, {}, UNKNOWN, "one of MIT"),
    ({"formats": ["safetensors", "json"]}, {"formats": ["json", "safetensors"]}, PASS, "one of safetensors, json"),
    ({"formats": ["safetensors", "json"]}, {"formats": ["json", "torch zip"]}, FAIL, "one of safetensors, json"),
    ({"formats": ["safetensors"]}, {"formats": []}, UNKNOWN, "one of safetensors"),
    ({"formats": ["safetensors"]}, {}, UNKNOWN, "one of safetensors"),
]


@pytest.mark.parametrize(("require", "results", "verdict", "bound"), CASES)
def test_requirements_read_what_fetch_found(require, results, verdict, bound):
    decision, found = decided(fetched(**results), **require)
    assert (found.verdict, found.effect, found.bound) == (verdict, "block", bound)
    assert decision.outcome == {PASS: "allow", FAIL: "deny", UNKNOWN: "unknown"}[verdict]


@pytest.mark.parametrize(
    ("results", "state", "verdict"),
    [
        ({"detected": True}, "PASS", PASS),
        ({"detected": False}, "PASS", FAIL),
        ({"detected": False}, "FAIL", FAIL),
        ({"detected": None}, "PASS", UNKNOWN),
        ({"detected": 1}, "PASS", UNKNOWN),
        ({}, "PASS", UNKNOWN),
        ({"detected": True}, "UNKNOWN", UNKNOWN),
        (None, "PASS", UNKNOWN),
    ],
)
def test_a_positive_control_must_have_found_its_backdoor(results, state, verdict):
    files = dated()
    if results is not None:
        files["control"] = {**record("control", {"model": FETCHED}, {}, results), "verdict": state}
    decision, found = decided(files, positive_control=True)
    assert (found.verdict, found.bound) == (verdict, "= true")
    assert decision.outcome == {PASS: "allow", FAIL: "deny", UNKNOWN: "unknown"}[verdict]


def test_a_control_of_another_model_does_not_count():
    files = dated()
    files["control"] = record("control", {"source": "sha256:" + "e" * 64}, {}, {"detected": True})
    assert decide(requiring(positive_control=True), files, at=AT).outcome == "deny"


@pytest.mark.parametrize(
    ("results", "verdict"),
    [({"purified": True}, PASS), ({"purified": False}, FAIL), ({"purified": 1}, UNKNOWN), ({}, UNKNOWN)],
)
def test_a_model_must_have_been_purified_where_the_policy_says_so(results, verdict):
    files = dated()
    files["select"]["results"] = {"method": "tsbd", **results}
    decision, found = decided(files, purification=True)
    assert (found.verdict, found.bound) == (verdict, "= true")
    assert decision.outcome == {PASS: "allow", FAIL: "deny", UNKNOWN: "unknown"}[verdict]


def test_what_is_not_required_gives_no_finding():
    assert requiring(positive_control=False, purification=False).require == Requirements()
    decision = decide(requiring(positive_control=False, approvals=1), dated(), at=AT)
    assert [each.rule for each in decision.findings] == [*INTEGRITY, "any"]


def test_requirements_stand_between_built_in_and_own_rules_in_a_fixed_order():
    everything = {
        "signatures": ["model"], "formats": ["x"], "licences": ["x"], "sources": ["x"], "positive_control": True,
        "purification": True, "min_clean_images": 1, "max_evidence_age_days": 1,
    }  # fmt: skip
    names = [
        "min_clean_images",
        "purification",
        "positive_control",
        "sources",
        "licences",
        "formats",
        "max_evidence_age_days",
    ]
    decision = decide(requiring(**everything), dated(), at=AT)
    required = [f"require.{name}" for name in [*names, "signatures"]]
    assert [each.rule for each in decision.findings] == [*INTEGRITY, *required, "any"]
    assert all(each.why.count(". ") and each.why.endswith(".") for each in decision.findings[5:12])


# -- patterns ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        ("s3://models/*", "s3://models/a.pt", True),
        ("s3://models/*", "s3://models/", True),
        ("s3://models/*", "s3://models", False),
        ("s3://models/*", "s3://models/x/a.pt", False),
        ("s3://models/**", "s3://models/x/a.pt", True),
        ("s3://models/**", "s3://models-evil/a.pt", False),
        ("s3://models/*.safetensors", "s3://models/a.safetensors", True),
        ("s3://models/*.safetensors", "s3://models/a.pt", False),
        ("s3://models/*.pt", "s3://models/aXpt", False),
        ("s3://models/**/*.pt", "s3://models/a/b/c.pt", True),
        ("s3://*/a.pt", "s3://x/a.pt", True),
        ("s3://Models/*", "s3://models/a.pt", False),
        ("s3://models/*", "xs3://models/a.pt", False),
        ("s3://models/a", "s3://models/ab", False),
        ("file:///data/**", "file:///data/../etc/passwd", False),
        ("file:///data/**", "file:///data/%2e%2E/etc/passwd", False),
        ("file:///data/**", "file:///data\\..\\etc", False),
        ("file:///data/**", "file:///data/..x/a", True),
        ("file:///data/**", "file:///data/a\nb", True),
        ("file:///data/*", "file:///data/a\nb", True),
        ("[a]+", "[a]+", True),
        ("[a]+", "aa", False),
        ("**", "anything/at all", True),
    ],
)
def test_patterns_of_addresses(pattern, text, fits):
    assert matches(pattern, text) is fits


def test_rules_may_match_too():
    files = dated()
    files["fetch"]["results"]["uri"] = "models:/vision/3"
    for pattern, verdict in (("models:/vision/*", PASS), ("models:/text/*", FAIL)):
        one = rule(evidence="fetch", value="uri", matches=["s3://a", pattern])
        assert finding(decide(policy(one), files), "r").verdict is verdict


# -- signatures ----------------------------------------------------------------------


def test_signatures_are_decided_after_the_gate():
    decision, found = decided(dated(), signatures=["model", "attestations"])
    assert (found.verdict, found.effect, found.value) == (UNKNOWN, "later", None)
    assert found.bound == "signed: model, attestations"
    assert found.why.startswith("Checked at promotion and by verify")
    assert decision.outcome == "allow"


@pytest.mark.parametrize(
    ("signed", "verdict", "value", "why"),
    [
        (None, UNKNOWN, None, "Signatures were not checked. "),
        ((), FAIL, None, "Not signed: model, attestations. "),
        (("model",), FAIL, "model", "Not signed: attestations. "),
        (("attestations",), FAIL, "attestations", "Not signed: model. "),
        (("model", "attestations"), PASS, "attestations, model", "Signed: attestations, model. "),
        (("model", "attestations", "report"), PASS, "attestations, model, report", "Signed: "),
    ],
)
def test_a_finished_release_must_be_signed_as_required(signed, verdict, value, why):
    (found,) = signature_findings(requiring(signatures=["model", "attestations"]), signed)
    assert (found.rule, found.verdict, found.value) == ("require.signatures", verdict, value)
    assert found.bound == "signed: model, attestations"
    assert found.why.startswith(why)
    assert found.why.endswith("Whoever serves the model must be able to check that nobody changed it or its evidence.")


def test_no_signature_is_demanded_where_none_is_required():
    assert signature_findings(policy(), None) == ()
    assert signature_findings(policy(), ["model"]) == ()


def _by_regular_expression(pattern: str, text: str) -> bool:
    wild = {"**": ".*", "*": "[^/]*"}
    parts = re.split(r"(\*\*|\*)", pattern)
    return re.fullmatch("".join(wild.get(part, re.escape(part)) for part in parts), text, re.DOTALL) is not None


@settings(max_examples=500, deadline=None)
@given(pattern=st.text("a/*b\n", max_size=9), text=st.text("a/*b\n", max_size=12))
def test_a_pattern_matches_as_the_regular_expression_of_it(pattern, text):
    assert matches(pattern, text) is _by_regular_expression(pattern, text)


def test_a_pattern_of_many_stars_is_judged_in_no_time():
    started = time.process_time()
    assert not matches("*a" * 99 + "*b", "a" * 10_000)
    assert matches("*a" * 99 + "*", "a" * 10_000)
    assert not matches("*" * 100_000, "a")
    assert time.process_time() - started < 10
