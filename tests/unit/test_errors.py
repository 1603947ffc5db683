"""Errors are sentences, carry exit codes, and become JSON."""

from __future__ import annotations

import json
import pickle

import pytest

from defense_core import errors
from defense_core.errors import EXIT_FAIL, EXIT_UNKNOWN, EXIT_USAGE, DataError, QuarantineError


def kinds(base: type[QuarantineError] = QuarantineError) -> list[type[QuarantineError]]:
    return [
        base,
        *(each for child in base.__subclasses__() for each in kinds(child) if each.__module__ == errors.__name__),
    ]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (QuarantineError("it failed"), "it failed."),
        (QuarantineError("it failed."), "it failed."),
        (QuarantineError("it failed", expected=3), "it failed: expected 3."),
        (QuarantineError("it failed", got=4), "it failed: got 4."),
        (QuarantineError("it failed", expected=3, got=4), "it failed: expected 3, got 4."),
        (QuarantineError("it failed", got=0), "it failed: got 0."),
        (QuarantineError("it failed", got=""), "it failed: got ."),
        (QuarantineError("it failed", hint="Try again"), "it failed. Try again."),
        (QuarantineError("it failed", hint="Try again."), "it failed. Try again."),
        (QuarantineError("it failed", hint="Did you mean 'n'?"), "it failed. Did you mean 'n'?"),
        (QuarantineError("it failed", expected="a", got="b", hint="Do c"), "it failed: expected a, got b. Do c."),
    ],
)
def test_sentences(error: QuarantineError, sentence: str) -> None:
    assert str(error) == sentence


def test_what_strangers_wrote_steers_no_terminal_and_writes_no_line() -> None:
    name = "conv\x1b[2J\r\nquarantine INFO gate: PASS\u202e\x9b1m"
    error = QuarantineError(f"no {name}", expected=name, got=ValueError(name), hint=f"Rename {name}")
    shown = "conv\\u001b[2J\\u000d\\u000aquarantine INFO gate: PASS\\u202e\\u009b1m"
    assert str(error) == f"no {shown}: expected {shown}, got {shown}. Rename {shown}."
    assert all(str(each).isprintable() for each in error.to_mapping().values())
    assert error.args == (f"no {shown}",)
    assert errors.visible("Füße, 95 % “quoted”, C:\\x") == "Füße, 95 % “quoted”, C:\\x"


@pytest.mark.parametrize("kind", kinds())
def test_every_error_is_documented_and_has_an_exit_code(kind: type[QuarantineError]) -> None:
    assert kind.__doc__
    assert kind.exit_code in (EXIT_FAIL, EXIT_UNKNOWN, EXIT_USAGE)


def test_what_cannot_be_decided_is_unknown_and_what_was_found_bad_is_a_failure() -> None:
    by_code = {code: {kind.__name__ for kind in kinds() if kind.exit_code == code} for code in (1, 2, 3)}
    assert by_code[EXIT_FAIL] == {"ExportError", "RegistryConflict"}
    assert by_code[EXIT_UNKNOWN] == {
        "TransferFailed",
        "MethodDiverged",
        "NonFiniteOutputs",
        "Cancelled",
        "StorageError",
        "EvidenceMissing",
        "RegistryUnavailable",
        "ScanInconclusive",
    }
    assert {"ConfigError", "OutputExists", "DataError", "UnsafeArtifact", "PolicyError", "EvidenceMismatch"} <= by_code[
        EXIT_USAGE
    ]


def test_facts_for_machines() -> None:
    error = DataError("no images", expected=(3, 8, 8), got=None, hint="Add some")
    facts = json.loads(json.dumps(error.to_mapping()))
    assert facts == {
        "error": "DataError",
        "what": "no images",
        "expected": "(3, 8, 8)",
        "got": None,
        "hint": "Add some",
        "exit_code": 3,
    }


def test_an_error_is_caught_by_its_family() -> None:
    with pytest.raises(errors.ArtifactError):
        raise errors.LoadTimeout("slow")
    with pytest.raises(errors.MethodDiverged):
        raise errors.NonFiniteOutputs("nan")
    with pytest.raises(errors.SourceError):
        raise errors.DigestMismatch("other")


def test_an_error_survives_a_process_boundary() -> None:
    error = DataError("no images", expected=1, got=2, hint="Add some")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is DataError
    assert str(again) == str(error)
