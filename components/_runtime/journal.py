"""What a pipeline run leaves in MLflow: a parent run, a nested run per method, numbers, digests and files.

Fetch opens the parent run, so that an MLflow that does not answer ends the run in its first seconds;
the report, which always runs, writes the rest from the run's evidence. The steps in between need
neither MLflow nor its credentials, and hours of purification are not lost to its outage.
"""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from components._runtime.evidence import FAILED
from components._runtime.mlflow_connection import MlflowConnection, MlflowSettings, connect
from components._runtime.outcome import RunOutcome
from components._runtime.plan import Plan, RunSettings, identity_of
from components._runtime.release import Identity
from components._runtime.run_election import TrackedRun
from components._runtime.store import Records
from components._runtime.tracking import (
    Status,
    close_run,
    log_files,
    log_history,
    log_metrics,
    log_parameters,
    log_tags,
    open_method_run,
    open_run,
)
from defense_core.config import canonical_json, to_mapping
from defense_core.files import write_atomic

DECISION_TAG = "quarantine.decision"
EXECUTION_TAG = "quarantine.execution"
FAILED_STEP_TAG = "quarantine.failed_step"
MODEL_TAG = "quarantine.model"
URI_TAG = "quarantine.uri"
VERDICT_TAG = "quarantine.verdict"
KEY_CHARACTERS = 24
MAX_PART = 200
"""Longest part of a metric's name that a probe gives; MLflow takes 250 characters in all."""
SCANS = ("scan", "rescan", "control")
"""Steps whose verdict becomes the tag ``quarantine.<step>`` of the parent run."""


def open_connection(environment: Mapping[str, str] | None = None, *, create: bool = True) -> MlflowConnection:
    """MLflow as the environment (by default this process's) names it.

    Args:
        create: whether an SQL store that is not there is made; not for who only reads.

    Raises:
        RegistryUnavailable, AccessDenied, ConfigError: see :func:`components._runtime.mlflow_connection.connect`.
    """
    return connect(MlflowSettings.from_environment(environment), create=create)


def run_key(identity: Identity) -> str:
    """The parent run's key: the same work, started again, comes back to the same run."""
    return identity.digest.removeprefix("sha256:")[:KEY_CHARACTERS]


def parent_run(connection: MlflowConnection, identity: Identity) -> TrackedRun:
    """The parent run of the work that ``identity`` names."""
    return open_run(connection, run_key(identity), name=f"quarantine-{run_key(identity)[:8]}")


def begin(connection: MlflowConnection, plan: Plan, settings: RunSettings, fetch: Mapping[str, Any]) -> TrackedRun:
    """Open the parent run: what was asked for as parameters, digests as tags."""
    run = parent_run(connection, identity_of(fetch))
    parameters = {**to_mapping(plan), "policy": fetch["results"]["policy"]}
    # The same work may be fetched from elsewhere next time, and a parameter never changes.
    for place in ("model", "clean", "test", "pool"):
        del parameters[place]
    log_parameters(connection, run, {name: _text(value) for name, value in parameters.items()})
    digests = {f"quarantine.{name}": str(value) for name, value in fetch["inputs"].items() if value is not None}
    log_tags(connection, run, {**digests, EXECUTION_TAG: settings.name, URI_TAG: str(fetch["results"]["uri"])})
    return run


def end(
    connection: MlflowConnection,
    settings: RunSettings,
    records: Records,
    files: Mapping[str, bytes],
    outcome: RunOutcome,
) -> TrackedRun:
    """Write every number and file that there is, and close the parent run.

    Args:
        records: what the steps left.
        files: the report, by name; logged beside the records.
        outcome: how the run ended.
    """
    fetch = records.evidence.get("fetch")
    # Without a fetched artifact the work has no identity yet; the execution's name stands in.
    run = (
        parent_run(connection, identity_of(fetch))
        if fetch
        else open_run(connection, f"unfetched/{settings.name}", name=settings.name)
    )
    before = records.evidence.get("evaluate.before")
    if before:
        log_metrics(connection, run, {f"before/{name}": value for name, value in _figures(before["results"])})
    for name in SCANS:
        if name in records.evidence:
            _log_scan(connection, run, name, records.evidence)
    for name in records.evidence:
        step, _, method = name.partition(".")
        if step == "purify":
            _log_method(connection, run, method, records)
    evidence = {f"evidence/{name}.json": each for name, each in records.evidence.items()}
    failures = {f"evidence/{name}{FAILED}": each for name, each in records.failures.items()}
    _log_bytes(connection, run, {**files, **_lines({**evidence, **failures})})
    log_tags(
        connection,
        run,
        {DECISION_TAG: outcome.decision, FAILED_STEP_TAG: outcome.failed_step or "none", EXECUTION_TAG: settings.name},
    )
    status: Status = "FAILED" if outcome.failed_step else "FINISHED"
    close_run(connection, run, status)
    return run


def _log_scan(
    connection: MlflowConnection, run: TrackedRun, name: str, evidence: Mapping[str, Mapping[str, Any]]
) -> None:
    """Verdict as a tag, p-values and residuals as metrics, pictures as files."""
    # Reports bring torch along; the steps that only open or find a run do without.
    from defense_core.report_scan import scan_part
    from defense_core.report_text import number

    results = evidence[name]["results"]
    # The control's figures are those of the scan of the copy.
    figures = dict(_scan_figures(results.get("scan") or results))
    figures |= {key: results.get(key) for key in ("planted_asr", "asr_after")}
    numbers = {
        _metric_name(f"{name}/{key}"): found for key, value in figures.items() if (found := number(value)) is not None
    }
    log_metrics(connection, run, numbers)
    log_tags(connection, run, {f"quarantine.{name}": str(evidence[name]["verdict"]).lower()})
    part = scan_part(evidence, name)
    pictures = part.pictures if part is not None else ()
    _log_bytes(
        connection,
        run,
        {f"pictures/{name}-{index:02}.png": base64.b64decode(each.data) for index, each in enumerate(pictures)},
    )


def _scan_figures(results: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    from defense_core.report_text import mappings_at

    yield from ((key, results.get(key)) for key in ("p_value", "probability", "score", "residual_max"))
    for channel in mappings_at(results, "channels"):
        yield f"p_value/{channel.get('name')}", channel.get("adjusted")
    for left in mappings_at(results, "residuals"):
        yield f"residual/{left.get('detector')}_{left.get('target')}", left.get("after")


def _log_method(connection: MlflowConnection, parent: TrackedRun, method: str, records: Records) -> None:
    named = {name: records.evidence.get(name) for name in (f"purify.{method}", f"evaluate.{method}")}
    purification, evaluation = records.evidence[f"purify.{method}"], named[f"evaluate.{method}"]
    results = purification["results"]
    run = open_method_run(connection, parent, method)
    log_parameters(connection, run, {"config": results["config"], "control": results["control"]})
    log_history(connection, run, _numbers_only(results["history"]))
    figures = dict(_figures(evaluation["results"])) if evaluation else {}
    if results.get("select"):
        figures["select/accuracy"] = float(results["select"]["accuracy"])
    log_metrics(connection, run, figures)
    log_tags(
        connection, run, {VERDICT_TAG: purification["verdict"], MODEL_TAG: str(purification["outputs"].get("model"))}
    )
    # By the names of their files: what evidence calls itself is text of whoever wrote it.
    _log_bytes(connection, run, _lines({f"{name}.json": each for name, each in named.items() if each}))
    close_run(connection, run, "FINISHED" if purification["verdict"] == "PASS" else "FAILED")


def _lines(mappings: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: canonical_json(mapping) + b"\n" for name, mapping in mappings.items()}


def _log_bytes(connection: MlflowConnection, run: TrackedRun, files: Mapping[str, bytes]) -> None:
    if not files:
        return
    with tempfile.TemporaryDirectory(prefix="quarantine-journal-") as folder:
        for name, data in files.items():
            write_atomic(Path(folder) / name, data)
        log_files(connection, run, Path(folder))


def _figures(results: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    named = {"acc": (results.get("acc") or {}).get("value"), "acc_drop": results.get("acc_drop")}
    probes = results.get("probes", ())
    for probe, part in zip(probes, _metric_parts([str(probe["name"]) for probe in probes]), strict=True):
        named |= {f"{figure}/{part}": probe[figure]["value"] for figure in ("asr", "ra")}
        named[f"der/{part}"] = probe["der"]
    yield from ((_metric_name(name), float(value)) for name, value in named.items() if value is not None)


def _numbers_only(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """History rows with what MLflow takes."""
    for row in rows:
        numbers = {
            key: value for key, value in row.items() if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        yield {**numbers, "phase": _metric_name(str(row.get("phase", "")))}


def _metric_name(name: str) -> str:
    """``name`` without ``=`` and the like, which MLflow refuses."""
    return re.sub(r"[^\w .:/-]", "_", name)


def _metric_parts(names: Sequence[str]) -> list[str]:
    """Strangers' names, each as one part of a metric's: no path, not empty, not too long, and no two alike."""
    parts: list[str] = []
    for name in names:
        part = _metric_name(name).replace("/", "_")[:MAX_PART].strip(" .") or "_"
        parts.append(part if part not in parts else f"{part}_{sha256(name.encode(errors='replace')).hexdigest()[:8]}")
    return parts


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
