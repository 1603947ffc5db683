"""Run a pipeline on this machine: the same definition as on a cluster, by kfp.local, in a work folder.

What happened is read from the run's records, never from kfp's state.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components._runtime.addresses import split_address
from components._runtime.environment import local_environment
from components._runtime.evidence import PROMOTION, REPORT_PAGE
from components._runtime.outcome import RunOutcome, outcome_of
from components._runtime.plan import Plan, RunSettings, run_settings
from components._runtime.resumption import Resumption
from components._runtime.signing_keys import (
    CERTIFICATE_VARIABLE,
    CHAIN_VARIABLE,
    KEY_VARIABLE,
    PUBLIC_KEY_VARIABLE,
    PUBLIC_NAME,
    SigningKey,
    load_public_key,
    load_signing_key,
    signing_key_from_environment,
    trusted_signer_from_environment,
)
from components._runtime.step import STEP_LINE, failure_record, interruptible
from components._runtime.store import EvidenceStore, open_store
from components.report.step import report_run
from defense_core.errors import Cancelled, ConfigError, OutputExists, QuarantineError, StorageError
from defense_core.files import reading, write_atomic
from defense_core.policy import parse_policy

STOP_GRACE_S = 20.0
"""Time for the steps to record why they stopped, before they are killed."""

EVIDENCE_FOLDER = "evidence"
LOG_NAME = "pipeline.log"

logger = logging.getLogger("quarantine")


@dataclass(frozen=True)
class LocalRun:
    """How a run on this machine ended.

    Attributes:
        name: of the execution.
        outcome: decision, failed step and exit code, from the records.
        evidence: folder with one JSON file a step, failure records, and the report.
        report: the HTML page; ``None`` where even that could not be written.
        log: everything that the steps and kfp said.
        tracking_uri: where MLflow's records are.
        promotion: ``results`` of promote; ``None`` where it was not reached.
        signed: ``results`` of sign; ``None`` where it was not reached.
        release: the folder that was registered; ``None`` where there is none.
        statement: of the promotion, signed; ``None`` where nothing was registered or there is no key.
        seconds: wall time.
    """

    name: str
    outcome: RunOutcome
    evidence: Path
    report: Path | None
    log: Path
    tracking_uri: str
    promotion: Mapping[str, Any] | None
    signed: Mapping[str, Any] | None
    release: Path | None
    statement: Path | None
    seconds: float

    @property
    def exit_code(self) -> int:
        """0 allowed or observed, 1 denied, 2 undecided; that of the failed step's error otherwise."""
        return self.outcome.exit_code


def run_local(
    asked: Plan | Resumption,
    work: Path,
    *,
    model_name: str,
    alias: str = "champion",
    controls: str = "",
    name: str = "",
    signing_key: Path | None = None,
    on_line: Callable[[str], None] = lambda line: None,
) -> LocalRun:
    """Run a pipeline; every failure of a step is in the result, and the report is written whatever failed.

    Args:
        asked: what to do: a plan for the whole pipeline, or a request to resume a run that ended at its decision.
        work: folder for artifacts, evidence and log; kept. Runs in one folder share the MLflow file.
        model_name: the registered model.
        alias: what moves on allow.
        controls: where positive controls are kept, a folder or ``s3://bucket/prefix``; empty: nowhere.
        name: of the execution; empty: the time.
        signing_key: private key that signs the release; ``None``: as ``QUARANTINE_SIGNING_KEY`` says. Promotion trusts
            its public half, unless ``QUARANTINE_PUBLIC_KEY`` or ``QUARANTINE_CERTIFICATE_CHAIN`` names somebody.
        on_line: called with every message that a step logs; what kfp says is in the log only.

    MLflow is where ``MLFLOW_TRACKING_URI`` says; without it, in ``mlflow.db`` in ``work``.

    Raises:
        ConfigError: ``model_name``, ``alias``, ``name``, ``signing_key`` or the policy is not usable, or promotion
            trusts another key or somebody while there is no key, or a certificate signs what the policy demands to be
            signed and promotion trusts nobody.
        StorageError: ``work`` cannot be written, or holds a run of this name.
    """
    started = time.monotonic()
    work = Path(work).absolute()
    name = name or datetime.now(UTC).strftime("run-%Y%m%d-%H%M%S-%f")
    wanted = RunSettings(
        evidence=str(work / EVIDENCE_FOLDER), model_name=model_name, alias=alias, name=name, controls=_reached(controls)
    )
    settings = run_settings(wanted.to_json())
    key = load_signing_key(signing_key) if signing_key is not None else signing_key_from_environment()
    _require_trusted(key, asked)
    folder, root = work / EVIDENCE_FOLDER / name, work / "artifacts" / name
    with reading(work, StorageError, "a writable folder"):
        taken = folder.exists() or root.exists()
    if taken:
        raise OutputExists(
            f"{work} holds a run called {name}", expected="a new name", hint="Name the run otherwise, or not at all"
        )
    request, log = root / "request.json", root / LOG_NAME
    told = {
        "root": str(root),
        "workspace": str(root / "workspace"),
        "pipeline": "quarantine" if isinstance(asked, Plan) else "promote",
        "arguments": {**asked.arguments(), "run": settings.to_json()},
    }
    write_atomic(request, json.dumps(told).encode())
    variables = {KEY_VARIABLE: str(Path(signing_key).absolute()), CERTIFICATE_VARIABLE: ""} if signing_key else {}
    environment = local_environment(work, {**variables, **_with_public_half(key, root)})
    store = open_store(settings.evidence, name)
    stopped = _run_worker(request, log, environment.variables, on_line)
    _finish_report(settings, store, folder, environment.variables, stopped)
    records = store.records()
    page, statement = folder / REPORT_PAGE, folder / PROMOTION
    signed = records.evidence.get("sign", {}).get("results")
    return LocalRun(
        name=name,
        outcome=outcome_of(records, stopped=stopped),
        evidence=folder,
        report=page if page.is_file() else None,
        log=log,
        tracking_uri=environment.tracking_uri,
        promotion=records.evidence.get("promote", {}).get("results"),
        signed=signed,
        release=_release(root) if signed else None,
        statement=statement if statement.is_file() else None,
        seconds=time.monotonic() - started,
    )


def _reached(address: str) -> str:
    """``address`` as the steps, which run in another folder, reach it."""
    return str(Path(address).absolute()) if address and not split_address(address).scheme else address


def _require_trusted(key: SigningKey | None, asked: Plan | Resumption) -> None:
    """Refuse a run whose signature promotion would not let pass: now, because that step comes last."""
    trusted = trusted_signer_from_environment()
    if key is None and trusted is not None:
        raise ConfigError(
            "promotion was told whose signature counts, and this run has no key to sign with",
            expected=f"--signing-key, or {KEY_VARIABLE} to name a private key",
            got="nothing",
            hint=f"Sign, or unset {PUBLIC_KEY_VARIABLE} and {CHAIN_VARIABLE}: unsigned releases would not be promoted",
        )
    if key is None:
        return
    if trusted is None and key.certificate is not None and _demands_signatures(asked):
        raise ConfigError(
            "a certificate signs, and nobody was named whose signature would count",
            expected=f"{CHAIN_VARIABLE} to name the certificates that the signer's must lead to",
            got="nothing",
            hint=f"Set {CHAIN_VARIABLE}, or sign without the certificate",
        )
    if trusted is None or trusted.public_key is None:
        return
    expected = str(load_public_key(trusted.public_key).keyid)
    if key.key_id != expected:
        raise ConfigError(
            f"{PUBLIC_KEY_VARIABLE} is of another key than the one that signs",
            expected=f"the key {expected}",
            got=f"the key {key.key_id}",
            hint=f"Sign with the key that promotion trusts, or unset {PUBLIC_KEY_VARIABLE}",
        )


def _demands_signatures(asked: Plan | Resumption) -> bool:
    """Whether nothing is promoted unsigned; resuming, the former release's policy is not known before it is read."""
    return isinstance(asked, Plan) and bool(parse_policy(asked.policy).require.signatures)


def _with_public_half(key: SigningKey | None, root: Path) -> dict[str, str]:
    """Whom the promote step trusts where nobody was named: who runs all steps on one machine holds the key anyway.

    A certificate names its root nowhere, so that one has to be given.
    """
    if key is None or key.certificate is not None or trusted_signer_from_environment() is not None:
        return {}
    write_atomic(root / PUBLIC_NAME, key.public_pem.encode())
    return {PUBLIC_KEY_VARIABLE: str(root / PUBLIC_NAME)}


def _release(root: Path) -> Path | None:
    """The sign step's output among the artifacts of a run."""
    found = sorted(path.parent for path in root.glob("**/release/MLmodel"))
    return found[-1] if found else None


def _run_worker(request: Path, log: Path, variables: Mapping[str, str], on_line: Callable[[str], None]) -> str:
    """Run the worker to its end; why it was stopped, or an empty string."""
    command = [sys.executable, "-m", "pipelines.local_worker", str(request)]
    with (
        open(log, "w", encoding="utf-8") as sink,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(variables),
            start_new_session=True,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            with interruptible():
                assert process.stdout is not None
                for line in process.stdout:
                    sink.write(line)
                    # kfp indents what follows a parallel part ever deeper.
                    said = STEP_LINE.match(line.strip())
                    if said:
                        on_line(said["message"])
                process.wait()
        except Cancelled as error:
            _stop_group(process)
            return str(error)
    return "" if process.returncode == 0 else f"the orchestrator ended with exit code {process.returncode}; see {log}"


def _stop_group(process: subprocess.Popen[str]) -> None:
    """Ask the worker and every step to stop; kill those that do not within the grace time."""
    for number, patience_s in ((signal.SIGINT, STOP_GRACE_S), (signal.SIGKILL, 5.0)):
        if not _signalled(process, number):
            return
        deadline = time.monotonic() + patience_s
        try:
            while time.monotonic() < deadline:
                if not _signalled(process, 0):
                    return
                time.sleep(0.05)
        except KeyboardInterrupt:
            # Asked twice: no more patience.
            _signalled(process, signal.SIGKILL)
            raise


def _signalled(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the group had a process to receive the signal (0: only ask)."""
    # The worker leads the group; it must be reaped, or the group would live on as a zombie.
    process.poll()
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _finish_report(
    settings: RunSettings, store: EvidenceStore, folder: Path, variables: Mapping[str, str], stopped: str
) -> None:
    """Write the report here where the exit handler could not: it does not run when the run is stopped."""
    if (folder / REPORT_PAGE).is_file() or "report" in store.records().failures:
        return
    try:
        report_run(settings, store, None, environment=variables, orchestrator_message=stopped)
    except QuarantineError as error:
        logger.error("report failed: %s", error)  # noqa: TRY400 - the sentence is for the operator
        store.put_failure("report", failure_record("report", error))
