"""Three states, and UNKNOWN never passes."""

import json
from itertools import product

import pytest

from defense_core.errors import EXIT_FAIL, EXIT_PASS, EXIT_UNKNOWN
from defense_core.verdict import Finding, Verdict, combine

PASS, FAIL, UNKNOWN = Verdict.PASS, Verdict.FAIL, Verdict.UNKNOWN


def test_exit_codes():
    assert (PASS.exit_code, FAIL.exit_code, UNKNOWN.exit_code) == (EXIT_PASS, EXIT_FAIL, EXIT_UNKNOWN) == (0, 1, 2)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_no_verdict_is_true_or_false(verdict):
    with pytest.raises(TypeError, match=r"^a Verdict has three states; compare it with `is Verdict.PASS`$"):
        bool(verdict)
    with pytest.raises(TypeError):
        _ = verdict or None
    with pytest.raises(TypeError):
        _ = not verdict


@pytest.mark.parametrize("verdict", list(Verdict))
def test_text_and_json_are_the_bare_name(verdict):
    assert str(verdict) == f"{verdict}" == verdict.value == verdict.name
    assert json.loads(json.dumps(verdict)) == verdict.name
    assert Verdict(verdict.name) is verdict


def test_nothing_checked_is_unknown():
    assert combine([]) is UNKNOWN


@pytest.mark.parametrize("length", [1, 2, 3])
def test_combination_over_all_sequences(length):
    for verdicts in product(Verdict, repeat=length):
        expected = FAIL if FAIL in verdicts else UNKNOWN if UNKNOWN in verdicts else PASS
        assert combine(verdicts) is expected
        assert combine(iter(verdicts)) is expected


@pytest.mark.parametrize("impostor", ["PASS", None, 1, True])
def test_what_is_no_verdict_never_passes(impostor):
    assert combine([PASS, impostor]) is UNKNOWN


def test_a_finding_is_immutable():
    finding = Finding("rule", PASS, 0.1, "<= 0.2", "why")
    with pytest.raises(AttributeError):
        finding.verdict = FAIL
    assert finding == Finding("rule", PASS, 0.1, "<= 0.2", "why")
