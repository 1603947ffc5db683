"""Follow a run on a cluster to its end, and say what it came to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from components._runtime.outcome import NO_DECISION, RunOutcome, outcome_of
from components._runtime.store import open_store
from defense_core.errors import EXIT_PASS, EXIT_UNKNOWN, QuarantineError
from pipelines.kfp_api import KfpClient
from pipelines.kfp_errors import EndpointUnreachable, NotOnCluster
from pipelines.kfp_records import Run

OUTAGE_S = 600.0
"""A run takes hours, an API server's upgrade minutes."""


class StillRunning(QuarantineError):
    """The run has not ended within the time that it was to be followed."""

    exit_code = EXIT_UNKNOWN


@dataclass(frozen=True)
class Followed:
    """A run that has ended.

    Attributes:
        run: as the cluster tells it.
        outcome: decision, failed step and exit code, from the run's evidence.
    """

    run: Run
    outcome: RunOutcome


def follow(
    client: KfpClient,
    run_id: str,
    *,
    on_change: Callable[[Run, list[str]], None] = lambda run, lines: None,
    poll_s: float = 5.0,
    timeout_s: float = 0.0,
    outage_s: float = OUTAGE_S,
) -> Run:
    """Ask for the run until its state is final.

    Args:
        on_change: called with the run and one sentence for each state that changed since the last call.
        poll_s: time between two questions.
        timeout_s: longest time to wait; 0: as long as it takes.
        outage_s: longest time without an answer of the endpoint.

    Raises:
        StillRunning: it has not ended in time; it goes on.
        NotOnCluster: somebody removed it.
        KfpError: the endpoint cannot be asked any more; the run goes on.
    """
    started = answered = time.monotonic()
    known: dict[str, str] = {}
    while True:
        try:
            run = _asked(client, run_id)
        except EndpointUnreachable:
            now = time.monotonic()
            left_s = timeout_s - (now - started) if timeout_s else poll_s
            if now - answered >= outage_s or left_s <= 0:
                raise
            time.sleep(min(poll_s, left_s))
            continue
        answered = time.monotonic()
        lines = _changes(run, known)
        if lines:
            on_change(run, lines)
        if run.finished:
            return run
        left_s = timeout_s - (time.monotonic() - started) if timeout_s else poll_s
        if left_s <= 0:
            raise StillRunning(
                f"run {run.name} has not ended",
                expected=f"its end within {timeout_s:g} s",
                got=run.state,
                hint="It goes on; submit again with the same --name to follow it again",
            )
        time.sleep(min(poll_s, left_s))


def outcome(run: Run, evidence: str) -> RunOutcome:
    """What a run that has ended came to, from the records in its evidence store.

    KFP's own state says that the steps ran, not what the gate decided: a denied model is a run that SUCCEEDED. Where
    the records cannot be read, or contradict the state, nothing is known: exit code 2.

    Args:
        evidence: the root of the evidence store that the run was given.
    """
    stopped = (
        "" if run.state == "SUCCEEDED" else f"the cluster says {run.state}" + (f": {run.error}" if run.error else "")
    )
    try:
        found = outcome_of(open_store(evidence, run.run_id).records(), stopped=stopped)
    except QuarantineError as error:
        why = f"{stopped}; " if stopped else ""
        return RunOutcome(NO_DECISION, "", f"{why}the decision cannot be read from here: {error}", EXIT_UNKNOWN)
    if stopped and found.exit_code == EXIT_PASS:
        return RunOutcome(found.decision, "", stopped, EXIT_UNKNOWN)
    return found


def _asked(client: KfpClient, run_id: str) -> Run:
    try:
        return client.get_run(run_id)
    except NotOnCluster as error:
        raise NotOnCluster(
            f"run {run_id} was removed while it was followed",
            expected="the run",
            got=error.got,
            hint="Where it was submitted twice at one moment, one of the two stayed: "
            "look for it, or submit again with the same --name",
        ) from error


def _changes(run: Run, known: dict[str, str]) -> list[str]:
    """What to say about states that are not in ``known``, which is brought up to date."""
    states = {task.task_id: (task.name, task.state, task.error) for task in run.tasks}
    states[""] = (f"run {run.name}", run.state, run.error)
    lines = []
    for key, (name, state, error) in states.items():
        if known.get(key) != state:
            known[key] = state
            lines.append(f"{name}: {state}" + (f", {error}" if error else ""))
    return lines
