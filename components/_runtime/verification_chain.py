"""The statements of a release: opened, compared with the evidence, and followed from output to input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components._runtime.envelopes import unseal
from components._runtime.release import ATTESTATIONS, BUNDLE_FOLDER, ONNX_NAME
from components._runtime.statements import (
    RELEASE,
    Statement,
    chain_order,
    file_name,
    flat_inputs,
    parse_statement,
    release_predicate_problem,
    step_statements,
)
from defense_core.config import canonical_json
from defense_core.errors import EvidenceMismatch
from defense_core.files import sha256_bytes

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

MAX_STATEMENT_BYTES = 16 << 20
CHAINED = ("model", "reference", "onnx")
"""Inputs that must have come out of an earlier step; each of ``candidates`` too. ``members`` came out of
their purifiers, whose names may come later in the order."""

OWN_OF_A_REPEATED_SCAN = ("repeats", "residuals", "suspected_residuals", "residual_max")
"""What a re-scan says for itself where it repeats the scan's results."""


@dataclass(frozen=True)
class Problem:
    """A file, and what is different in it."""

    file: str
    expected: str
    got: str
    sentence: str


@dataclass(frozen=True)
class Statements:
    """What the envelopes hold.

    Attributes:
        problems: what is missing, unexpected, not signed, or not what the evidence says.
        release: the payload of the release statement; ``None`` where it does not hold.
    """

    problems: tuple[Problem, ...]
    release: bytes | None


def read_statements(
    folder: Path, evidence: Mapping[str, Mapping[str, Any]], digests: Mapping[str, str], key: SSlibKey
) -> Statements:
    """Open every envelope in ``folder`` and compare it with what ``evidence`` gives.

    Args:
        digests: of the evidence files, by name of the evidence.
    """
    steps = step_statements(evidence, digests)
    names = [*(statement.name for statement in steps), RELEASE]
    files = [file_name(index, name) for index, name in enumerate(names)]
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    problems = [
        Problem(
            f"{ATTESTATIONS}/{name}",
            "no such statement",
            "a statement of no step",
            f"{ATTESTATIONS}/{name} is unexpected.",
        )
        for name in present
        if name not in files
    ]
    release = None
    for index, file in enumerate(files):
        where = f"{ATTESTATIONS}/{file}"
        if file not in present:
            sentence = f"{where} is missing: the statement of {names[index]}."
            problems.append(Problem(where, f"a statement of {names[index]}", "no such file", sentence))
            continue
        try:
            payload = _payload(folder / file, key, where)
            if names[index] == RELEASE:
                _require_release(payload, steps, evidence, where)
                release = payload
            else:
                _require_same(steps[index], payload, where)
        except EvidenceMismatch as error:
            problems.append(Problem(where, error.expected or "a statement", error.got or "another", str(error)))
    return Statements(tuple(problems), release)


def chain_problems(evidence: Mapping[str, Mapping[str, Any]], decision: str) -> list[Problem]:
    """Where a step took in something that did not come out of an earlier one.

    Args:
        decision: digest of ``decision.json``, which the gate must name.
    """
    return [*_chain(evidence), *_last_steps(evidence), *_repeated(evidence), *_decided(evidence, decision)]


def _decided(evidence: Mapping[str, Mapping[str, Any]], decision: str) -> Iterator[Problem]:
    stated = _value(evidence, "gate", "outputs", "decision")
    if "gate" in evidence and stated != decision:
        sentence = f"evidence/gate.json: it gave the decision {stated}, here lies {decision}."
        yield Problem("evidence/gate.json", decision, str(stated), sentence)


def _chain(evidence: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    order = chain_order(list(evidence))
    for name in ("fetch", "select", "export", "gate"):
        if name not in evidence:
            yield Problem(f"evidence/{name}.json", "evidence", "no such file", f"evidence/{name}.json is missing.")
    source = evidence.get("fetch", {}).get("inputs", {}).get("source")
    outputs: set[str] = set()
    for name in order:
        file = f"evidence/{name}.json"
        inputs = flat_inputs(evidence[name]["inputs"])
        if inputs.get("source") != source:
            yield _problem(file, "source", str(source), str(inputs.get("source")), "what fetch took in")
        for key, value in inputs.items():
            if (key in CHAINED or key.startswith("candidates.")) and value not in outputs:
                yield _problem(file, key, "an earlier output", value, "what an earlier step gave")
            member = key.removeprefix("members.")
            if member != key and value != (made := _value(evidence, f"purify.{member}", "outputs", "model")):
                yield _problem(file, key, str(made), value, f"what purify.{member} gave")
        outputs.update(flat_inputs(evidence[name]["outputs"]).values())


def _last_steps(evidence: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    chosen = _value(evidence, "select", "outputs", "model")
    exported = _value(evidence, "export", "outputs", "onnx")
    for name, key, expected, meaning in (
        ("export", "model", chosen, "what select chose"),
        ("gate", "model", chosen, "what select chose"),
        ("gate", "onnx", exported, "what export wrote"),
    ):
        got = _value(evidence, name, "inputs", key)
        if name in evidence and got != expected:
            yield _problem(f"evidence/{name}.json", key, str(expected), str(got), meaning)


def _repeated(evidence: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """A re-scan that repeats the scan's words must repeat those of the scan that lies here."""
    stated = _value(evidence, "rescan", "inputs", "scan")
    if stated is None:
        return
    file, scan = "evidence/rescan.json", evidence.get("scan", {})
    held = sha256_bytes(canonical_json(scan) + b"\n")
    if stated != held:
        yield _problem(file, "scan", held, str(stated), "the evidence of the scan")
    facts, own = scan.get("results", {}), evidence["rescan"].get("results", {})
    others = [key for key in sorted(facts) if key not in OWN_OF_A_REPEATED_SCAN and own.get(key) != facts[key]]
    if others:
        sentence = f"{file}: it repeats the scan's results, but for {', '.join(others)}."
        yield Problem(file, "the results of evidence/scan.json", f"another {others[0]}", sentence)


def _value(evidence: Mapping[str, Mapping[str, Any]], name: str, section: str, key: str) -> Any:
    return evidence.get(name, {}).get(section, {}).get(key)


def _problem(file: str, key: str, expected: str, got: str, meaning: str) -> Problem:
    return Problem(file, expected, got, f"{file}: its input {key} is {got}, which is not {meaning} ({expected}).")


def _payload(path: Path, key: SSlibKey, where: str) -> bytes:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_STATEMENT_BYTES:
        raise EvidenceMismatch(f"{where} is no statement", expected="a small plain file", got="something else")
    return unseal(path.read_bytes(), key, where)


def _require_same(expected: Statement, payload: bytes, where: str) -> None:
    stated = parse_statement(payload, where)
    if payload == expected.payload:
        return
    wanted = json.loads(expected.payload)
    raise EvidenceMismatch(
        f"{where} does not say what the evidence says",
        expected=_first_difference(wanted, stated),
        got="another statement",
    )


def _require_release(
    payload: bytes, steps: Sequence[Statement], evidence: Mapping[str, Mapping[str, Any]], where: str
) -> None:
    outputs = {
        f"{BUNDLE_FOLDER}/bundle.json": str(_value(evidence, "select", "outputs", "model")),
        ONNX_NAME: str(_value(evidence, "export", "outputs", "onnx")),
    }
    problem = release_predicate_problem(parse_statement(payload, where), steps, outputs)
    if problem:
        raise EvidenceMismatch(f"{where} does not fit the evidence", expected=problem, got="another statement")


def _first_difference(wanted: Any, stated: Any, path: str = "") -> str:
    """Where two statements differ first, and what the evidence gives there."""
    if isinstance(wanted, dict) and isinstance(stated, dict):
        for key in sorted({*wanted, *stated}):
            if wanted.get(key) != stated.get(key) or (key in wanted) != (key in stated):
                return _first_difference(wanted.get(key), stated.get(key), f"{path}.{key}" if path else key)
    return f"{path or 'the statement'} to be {json.dumps(wanted)[:200]}, not {json.dumps(stated)[:200]}"
