"""How a run ended, read from its records alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from components._runtime.plan import UNTOUCHED
from components._runtime.store import Records
from defense_core.errors import EXIT_FAIL, EXIT_PASS, EXIT_UNKNOWN, EXIT_USAGE, visible

NO_DECISION = "none"
TO_ATTEST = "signature_required"
"""In the results of promote: the step ``attest`` follows it."""
_EXIT_CODES = {"allow": EXIT_PASS, "observe": EXIT_PASS, "deny": EXIT_FAIL, "unknown": EXIT_UNKNOWN}


@dataclass(frozen=True)
class RunOutcome:
    """A run's end.

    Attributes:
        decision: ``allow``, ``deny``, ``unknown``, ``observe``, or ``none`` where the gate was not reached.
        failed_step: the first step that failed, in the order of the pipeline; empty if none did.
        why: its error, one sentence or more.
        exit_code: 0 allowed or observed, 1 denied, 2 undecided; that of the failed step's error otherwise.
    """

    decision: str
    failed_step: str
    why: str
    exit_code: int


def outcome_of(records: Records, *, stopped: str = "") -> RunOutcome:
    """What the records say.

    Args:
        stopped: what the orchestrator says where it was stopped or failed. It matters only where no
            step has said why: a step that is killed outright leaves no record.
    """
    decision = str(_results(records, "gate").get("outcome", NO_DECISION))
    if records.failures:
        name = min(records.failures, key=lambda each: _place(each, expected_steps(records)))
        failure = records.failures[name]
        why = visible(str(failure["message"]))
        return RunOutcome(decision, name, why, int(failure.get("exit_code", EXIT_UNKNOWN)))
    if records.damaged:
        file, why = next(iter(sorted(records.damaged.items())))
        return RunOutcome(decision, file.removesuffix(".json"), why, EXIT_USAGE)
    missing = [name for name in expected_steps(records) if name not in records.evidence]
    if missing:
        why = stopped or "it ended without a record: it was killed, or could not start; see its log"
        return RunOutcome(decision, missing[0], why, EXIT_UNKNOWN)
    return RunOutcome(decision, "", "", _EXIT_CODES.get(decision, EXIT_UNKNOWN))


def expected_steps(records: Records) -> list[str]:
    """Names of all evidence of a whole run, in the order of the pipeline."""
    methods = [str(method) for method in _results(records, "fetch").get("methods", [])]
    if f"purify.{UNTOUCHED}" in {*records.evidence, *records.failures}:
        methods = [UNTOUCHED]
    branches = [f"{step}.{method}" for method in methods for step in ("purify", "evaluate")]
    before, after = ["fetch", "evaluate.before", "scan"], ["select", "rescan", "export", "gate", "sign", "promote"]
    # Where the policy asks for none, the positive control leaves no record.
    if _results(records, "fetch").get("positive_control") or "control" in {*records.evidence, *records.failures}:
        before.append("control")
    steps = [*before, *branches, *after]
    # Runs of earlier releases ended with promote, which did not say yet what there is to attest.
    return [*steps, "attest"] if TO_ATTEST in _results(records, "promote") else steps


def _place(name: str, order: list[str]) -> tuple[int, str]:
    return (order.index(name) if name in order else len(order), name)


def _results(records: Records, name: str) -> Mapping[str, Any]:
    results: Mapping[str, Any] = records.evidence.get(name, {}).get("results", {})
    return results
