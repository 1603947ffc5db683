"""The end of a run on a terminal: figures, decision with a reason per rule, and what to open."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.markup import escape

from components._runtime.evidence import read_folder
from components._runtime.verification import Verification
from defense_core.config import to_mapping
from defense_core.errors import QuarantineError
from pipelines.console import coloured, err, out, print_comparison, print_findings, print_json, table
from pipelines.local import LocalRun


def print_line(message: str) -> None:
    """A message of a running step, with the time."""
    err.print(f"[dim]{time.strftime('%H:%M:%S')}[/dim] {escape(message)}")


def print_run(
    run: LocalRun,
    *,
    as_json: bool,
    public_key: Path | None = None,
    approver_files: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """What a run on this machine came to.

    Args:
        public_key: where the key to verify it with is, if known.
        approver_files: where the public keys of the approvers are, by their names.
    """
    evidence = _evidence(run)
    if as_json:
        print_json(_facts(run))
        return
    out.print()
    print_comparison(evidence, selected=evidence.get("select", {}).get("results", {}).get("method"))
    gate = evidence.get("gate")
    if gate is not None:
        print_findings(gate["results"]["findings"])
    if run.outcome.failed_step:
        out.print(f"[red]{run.outcome.failed_step} failed:[/red] {escape(run.outcome.why)}")
    out.print(f"decision: {coloured(run.outcome.decision)}   ({run.seconds:.0f} s)")
    if run.promotion is not None:
        out.print(escape(_promotion_sentence(run.promotion)))
    out.print(f"evidence: {run.evidence}", markup=False)
    out.print(f"log:      {run.log}", markup=False)
    if run.report is not None:
        out.print(f"report:   {run.report}  (open it in a browser)", markup=False)
    if run.signed is not None and run.release is not None:
        decided = {} if gate is None else gate["results"]
        people = sorted({each["identity"] for each in decided.get("approvals", [])})
        _print_release(run, public_key, {name: approver_files.get(name) for name in people})
    shown = shlex.join(["mlflow", "ui", "--backend-store-uri", run.tracking_uri])
    out.print(f"MLflow:   {shown}   then http://127.0.0.1:5000", markup=False)


def print_verification(verified: Verification) -> None:
    """What a verification found: every difference, or that there is none."""
    rows = [(each.rule, each.verdict, each.file or "–", each.why) for each in verified.differences]
    if rows:
        table("Differences", ("rule", "verdict", "file", "difference"), rows)
    out.print(f"{coloured(verified.verdict.value)}  ", end="")
    checks = len({each.rule for each in verified.findings})
    said = f"{verified.what}: {checks} kinds of checks, {verified.files} files, {len(rows)} differences"
    out.print(said, markup=False)
    if verified.decision:
        out.print(f"decision: {coloured(verified.decision)} by the policy {escape(verified.policy)}")
    if verified.signer:
        out.print(f"signed by: {verified.signer}", markup=False)


def verification_facts(verified: Verification) -> dict[str, Any]:
    """A verification as JSON types."""
    return {**to_mapping(verified), "verdict": verified.verdict.value}


def _print_release(run: LocalRun, public_key: Path | None, approvers: Mapping[str, Path | None]) -> None:
    if not (run.signed and run.signed["signed"]):
        out.print(f"release:  {run.release}  (not signed: no --signing-key)", markup=False)
        return
    out.print(f"release:  {run.release}  (signed, key {run.signed['key_id'][:16]}…)", markup=False)
    words = ["quarantine", "verify", str(run.release), "--public-key", str(public_key or "PUBLIC_KEY")]
    if run.statement is not None and not (run.promotion and run.promotion["reused"]):
        # A version that was there before holds the files of the run that made it.
        words += ["--promotion", str(run.statement)]
    for name, path in approvers.items():
        words += ["--approver-key", f"{name}={path or 'PUBLIC_KEY'}"]
    out.print(f"verify:   {shlex.join(words)}", markup=False)


def _promotion_sentence(promotion: Mapping[str, Any]) -> str:
    if not promotion.get("registered"):
        return "registry: nothing was registered, because the policy only observes"
    version = f"{promotion.get('name')} version {promotion.get('version')}"
    if promotion.get("alias_moved"):
        return f"registry: {version} is now {promotion.get('alias')}"
    return f"registry: {version} is tagged {promotion.get('decision')}; no alias moved"


def _facts(run: LocalRun) -> dict[str, Any]:
    return {
        "run": run.name,
        "decision": run.outcome.decision,
        "failed_step": run.outcome.failed_step or None,
        "why": run.outcome.why or None,
        "exit_code": run.exit_code,
        "evidence": str(run.evidence),
        "report": str(run.report) if run.report is not None else None,
        "log": str(run.log),
        "tracking_uri": run.tracking_uri,
        "promotion": run.promotion,
        "signed": run.signed,
        "release": str(run.release) if run.release is not None else None,
        "statement": str(run.statement) if run.statement is not None else None,
        "seconds": round(run.seconds, 1),
    }


def _evidence(run: LocalRun) -> dict[str, Any]:
    try:
        return dict(read_folder(run.evidence))
    except QuarantineError as error:
        # A run that failed early leaves no evidence at all; the outcome below says why.
        err.print(f"[dim]{escape(str(error))}[/dim]")
        return {}
