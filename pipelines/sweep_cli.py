"""``quarantine sweep``: what the webhook missed, what was moved by hand, what grew old."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from defense_core.errors import EXIT_PASS, EXIT_UNKNOWN, ConfigError
from pipelines import options as o
from pipelines import panels

if TYPE_CHECKING:
    from pipelines.sweep import SweepReport
    from pipelines.sweep_scope import Scope

app = typer.Typer()

_SCOPE, _PACE = "What is looked at", "Pace"
SHOWN = 50


@app.command(rich_help_panel=panels.CLUSTER)
def sweep(
    tracking_uri: Annotated[
        str,
        typer.Option(help="MLflow whose registry is read; default: MLFLOW_TRACKING_URI.", metavar="URI"),
    ] = "",
    watch: Annotated[
        str,
        typer.Option(
            envvar="QUARANTINE_WATCH",
            help="The hook's watch file: its models, its policies, and its aliases, which are guarded.",
            rich_help_panel=_SCOPE,
        ),
    ] = "",
    policy: Annotated[
        str,
        typer.Option(
            help="Or: one policy for every model: strict, standard, observe, or a file.", rich_help_panel=_SCOPE
        ),
    ] = "",
    alias: Annotated[
        list[str],
        typer.Option(help="With --policy: an alias guarded on every model; repeatable.", rich_help_panel=_SCOPE),
    ] = [],
    accept_policy: Annotated[
        list[str],
        typer.Option(
            help="A former policy whose allow decisions still cover an alias; repeatable.", rich_help_panel=_SCOPE
        ),
    ] = [],
    public_key: Annotated[
        Path | None,
        typer.Option(
            help="Public key, PEM, of the signer: promoted versions are verified whole.",
            show_default=False,
            rich_help_panel=_SCOPE,
        ),
    ] = None,
    certificate_chain: Annotated[
        Path | None,
        typer.Option(
            help="Or: certificates, PEM, that the signer's must lead to.", show_default=False, rich_help_panel=_SCOPE
        ),
    ] = None,
    signer: o.Signer = "",
    approver_key: o.ApproverKeys = [],
    queue: Annotated[
        str,
        typer.Option(
            envvar="QUARANTINE_QUEUE",
            help="The hook's queue, sqlite:////path/queue.db or postgresql+psycopg://…; default: nothing is enqueued.",
        ),
    ] = "",
    enforce: Annotated[
        bool, typer.Option("--enforce", help="Move a drifted alias back, or remove it where nothing covers it.")
    ] = False,
    journal: Annotated[
        Path | None, typer.Option(help="Where each such move is written down, JSON lines; default: beside --memory.")
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(
            envvar="QUARANTINE_SWEEP_MEMORY",
            help="File that makes the next sweep cheaper; may be lost at any time. Default: none.",
            rich_help_panel=_PACE,
        ),
    ] = None,
    full_after_days: Annotated[
        float, typer.Option(min=0, help="Look at every model at least this often; 0: now.", rich_help_panel=_PACE)
    ] = 7.0,
    reopen_after_h: Annotated[
        float,
        typer.Option(min=0, help="Submit again what left no decision for so many hours.", rich_help_panel=_PACE),
    ] = 24.0,
    max_enqueued: Annotated[
        int, typer.Option(min=0, help="Most runs that one sweep asks for; 0: any number.", rich_help_panel=_PACE)
    ] = 0,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit code 0 also for findings, where a scheduler calls 1 a failure.")
    ] = False,
    exit_unknown: Annotated[
        int,
        typer.Option(
            help="Exit code of a sweep that ended and could not find out about something, for schedulers that try "
            "again at 2.",
            min=0,
            max=125,
        ),
    ] = EXIT_UNKNOWN,
    as_json: o.AsJson = False,
) -> None:
    """Find versions without a current decision and aliases without an allow.

    With --queue such versions are enqueued for the hook's worker, with --enforce such aliases are moved back.

    Exit codes: 0 nothing found, 1 findings, 2 cannot be decided or no answer, 3 usage.
    """
    from components._runtime.mlflow_connection import MlflowSettings, connect
    from components._runtime.signing_keys import TrustedSigner
    from pipelines import sweep as sweeping
    from pipelines.console import print_json
    from pipelines.sweep_aliases import Journal
    from pipelines.triggers.serve import open_queue

    scope = _scope(watch, policy, alias, accept_policy)
    trusted = None
    if public_key is not None or certificate_chain is not None or signer:
        trusted = TrustedSigner(public_key, certificate_chain, signer)
        trusted.check()
    elif approver_key:
        raise ConfigError(
            "--approver-key is for --public-key and --certificate-chain",
            expected="one of these too",
            got="--approver-key alone",
        )
    kept = Journal(_journal(journal, memory)) if enforce else None
    settings = sweeping.SweepSettings(
        full_after_s=full_after_days * 86400.0,
        reopen_after_s=reopen_after_h * 3600.0,
        max_enqueued=max_enqueued or None,
        trusted=trusted,
        approvers=o.approvers(approver_key),
    )
    mlflow = MlflowSettings(tracking_uri) if tracking_uri else MlflowSettings.from_environment()
    connection = connect(mlflow, create=False)
    with ExitStack() as stack:
        known = sweeping.open_memory(connection, memory)
        stack.callback(known.close)
        to = stack.enter_context(open_queue(queue)) if queue else None
        report = sweeping.sweep(connection, known, scope, settings, queue=to, journal=kept)
    if as_json:
        print_json(report.to_mapping())
    else:
        _print(report)
    if report.exit_code == EXIT_UNKNOWN:
        raise typer.Exit(exit_unknown)
    raise typer.Exit(EXIT_PASS if exit_zero else report.exit_code)


def _scope(watch: str, policy: str, aliases: list[str], accepted: list[str]) -> Scope:
    from defense_core.policy import parse_policy
    from pipelines.sweep_scope import Scope
    from pipelines.triggers.watch import read_watch

    if bool(watch) == bool(policy):
        raise ConfigError(
            "what is to be looked at is not clear",
            expected="either --watch FILE (or QUARANTINE_WATCH) or --policy POLICY",
            got="both" if watch else "neither",
            hint="See docs/operations.md",
        )
    if watch and aliases:
        raise ConfigError("--alias is for --policy", expected="the aliases of the watch file", got=", ".join(aliases))
    scope = Scope(
        watch=read_watch(Path(watch)) if watch else None,
        policy=parse_policy(o.read_policy(policy)) if policy else None,
        aliases=tuple(dict.fromkeys(aliases)),
        accepted=frozenset(parse_policy(o.read_policy(each)).digest for each in accepted),
    )
    scope.check()
    return scope


def _journal(given: Path | None, memory: Path | None) -> Path:
    if given is None and memory is None:
        raise ConfigError(
            "--enforce writes down what it moves",
            expected="--journal FILE or --memory FILE",
            got="neither",
            hint="Name a file that outlives the sweep",
        )
    if given is not None and memory is not None and given.absolute() == memory.absolute():
        raise ConfigError(
            "--journal and --memory are one file",
            expected="two files",
            got=given,
            hint="The journal is kept for good, and the memory is made anew where it is of no use",
        )
    return given if given is not None else Path(f"{memory}.journal.jsonl")


def _print(report: SweepReport) -> None:
    from pipelines.console import out, table

    rows = [(each.kind, each.model, each.version, each.alias, each.why) for each in report.findings[:SHOWN]]
    if rows:
        table("Findings", ("found", "model", "version", "alias", "why"), rows)
    total = sum(report.found.values())
    if total > len(rows):
        out.print(f"… and {total - len(rows)} more; --json names {len(report.findings)}.", markup=False)
    if report.moves:
        moved = [(each.state, each.model, each.alias, each.origin, each.target or "–") for each in report.moves]
        table("Aliases", ("done", "model", "alias", "from", "to"), moved)
    found = ", ".join(f"{count} {kind}" for kind, count in report.found.items() if count) or "nothing found"
    out.print(f"{report.models} models, {report.versions} versions in {report.seconds} s: {found}.", markup=False)
    queued = {name: count for name, count in vars(report.queued).items() if count}
    if queued:
        out.print("Work: " + ", ".join(f"{count} {name}" for name, count in queued.items()) + ".", markup=False)
