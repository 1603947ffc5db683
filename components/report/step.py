"""Report: everything that the steps left, on one page. Runs last, whatever failed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components._runtime import journal
from components._runtime.evidence import PROMOTION, REPORT_DATA, REPORT_PAGE
from components._runtime.outcome import RunOutcome, outcome_of
from components._runtime.plan import RunSettings, identity_of
from components._runtime.promotion_files import keep_promotion
from components._runtime.store import EvidenceStore, Records
from defense_core.files import write_atomic


def report_run(
    settings: RunSettings,
    store: EvidenceStore,
    page: Path | None,
    *,
    environment: Mapping[str, str] | None = None,
    orchestrator_message: str = "",
) -> RunOutcome:
    """Collect the run's records, write the report beside them, and close the run in MLflow.

    The report is in the store before MLflow is asked, so that it is there also when MLflow is not.

    Args:
        page: where to write the page too; ``None``: only into the store.
        environment: where MLflow is; by default this process's environment.
        orchestrator_message: why the run was stopped, where no step says so itself.

    Returns:
        How the run ended.

    Raises:
        RegistryUnavailable: MLflow does not answer; the report is written.
        StorageError, SourceError: the store cannot be read or written.
    """
    records = store.records()
    outcome = outcome_of(records, stopped=orchestrator_message)
    html, data = _rendered(records, outcome)
    store.shelf.put(REPORT_DATA, data)
    store.shelf.put(REPORT_PAGE, html)
    if page is not None:
        write_atomic(page, html)
    connection = journal.open_connection(environment)
    if PROMOTION in store.shelf.names() and {"fetch", "promote"} <= set(records.evidence):
        run = journal.parent_run(connection, identity_of(records.evidence["fetch"]))
        keep_promotion(connection, run, records.evidence["promote"]["results"], store.shelf.get(PROMOTION))
    journal.end(connection, settings, records, {REPORT_PAGE: html, REPORT_DATA: data}, outcome)
    return outcome


def _rendered(records: Records, outcome: RunOutcome) -> tuple[bytes, bytes]:
    # Drawing takes a second to import; the tests of the rest do without.
    from defense_core.report import build_report, render_report

    report = build_report(records.evidence, failures=_failures(records, outcome))
    return render_report(report).encode(), report.to_json()


def _failures(records: Records, outcome: RunOutcome) -> list[dict[str, Any]]:
    """Failure records, the one that ended the run first; what left no record of its own gets one."""
    found = sorted(records.failures.values(), key=lambda each: each.get("name") != outcome.failed_step)
    found += [
        {"name": file, "error": "EvidenceMismatch", "message": why} for file, why in sorted(records.damaged.items())
    ]
    if outcome.failed_step and not found:
        found.append({"name": outcome.failed_step, "error": "Stopped", "message": outcome.why})
    return found
