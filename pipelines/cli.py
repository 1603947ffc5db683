"""``quarantine``: the command line. Exit codes: 0 pass, 1 fail, 2 unknown, 3 usage or bad input."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from components._runtime.plan import Loading
from defense_core import __version__
from defense_core.errors import EXIT_UNKNOWN, EXIT_USAGE, ConfigError, QuarantineError
from defense_core.verdict import Verdict
from pipelines import options as o
from pipelines import panels
from pipelines.gate_cli import app as gate_app
from pipelines.hooks_cli import app as hooks_app
from pipelines.inspect_cli import inspect
from pipelines.lab_cli import app as lab_app
from pipelines.model_options import loading_of, model_spec, pinned_loading, tuned_spec
from pipelines.option_groups import takes
from pipelines.output_streams import drop, escape_what_cannot_be_shown, flush
from pipelines.plan_options import Request, run_request
from pipelines.policy_cli import app as policy_app
from pipelines.promote_cli import app as promote_app
from pipelines.report_cli import app as report_app
from pipelines.scan_cli import app as scan_app
from pipelines.schedule_cli import app as schedule_app
from pipelines.submit_cli import app as submit_app
from pipelines.sweep_cli import app as sweep_app
from pipelines.verify_cli import app as verify_app

app = typer.Typer(
    name="quarantine",
    help="Scan, purify, measure and gate an untrusted model before it reaches the registry.\n\n"
    "Exit codes: 0 pass, 1 fail, 2 unknown (cannot be decided), 3 usage or bad input.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

app.add_typer(lab_app, name="lab", rich_help_panel=panels.STEP)
app.add_typer(gate_app)
app.add_typer(promote_app)
app.add_typer(hooks_app, name="hooks", rich_help_panel=panels.CLUSTER)
app.add_typer(policy_app, name="policy", rich_help_panel=panels.EVIDENCE)
app.add_typer(verify_app)
app.add_typer(report_app)
app.add_typer(scan_app)
app.add_typer(submit_app)
app.add_typer(schedule_app, name="schedule", rich_help_panel=panels.CLUSTER)
app.add_typer(sweep_app)

# typer brings a click of its own, under a private name; this is the base of its usage errors.
_CLICK_ERROR: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

Out = Annotated[Path, typer.Option(help="Folder to create; nothing is left of it if the command ends in an error.")]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Print the version when asked to."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command(rich_help_panel=panels.WHOLE)
@takes(run_request, into="request")
@takes(pinned_loading, into="loading")
def run(
    *,
    model: Annotated[str, typer.Option(help="s3://bucket/key[?versionId=…], models:/name/3, or a path.")],
    clean: Annotated[str, typer.Option(help="Clean set: s3://… or a path, .parquet or .npz, or an image folder.")],
    out: Annotated[Path, typer.Option(help="Work folder: evidence, report, artifacts, and mlflow.db.")] = Path(
        "quarantine-run"
    ),
    request: Request,
    signing_key: o.SigningKey = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Run the whole pipeline on this machine: the same definition that runs on a cluster."""
    from pipelines.local import run_local
    from pipelines.summary import print_line, print_run

    result = run_local(
        request.plan(model=model, clean=clean, seed=seed, device=device, loading=loading),
        out,
        model_name=request.model_name,
        alias=request.alias,
        controls=request.controls,
        signing_key=signing_key,
        on_line=(lambda line: None) if as_json else print_line,
    )
    print_run(result, as_json=as_json)
    raise typer.Exit(result.exit_code)


@app.command(rich_help_panel=panels.WHOLE)
def demo(
    out: Annotated[Path, typer.Option(help="Work folder.")] = Path("demo-output"),
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
) -> None:
    """Plant a backdoor into a digits classifier and take it through the whole pipeline, offline."""
    from components._runtime.signing_keys import PUBLIC_NAME
    from pipelines.demo import KEYS, run_demo
    from pipelines.summary import print_line, print_run

    result = run_demo(out, seed=seed, on_line=(lambda line: None) if as_json else print_line)
    print_run(result, as_json=as_json, public_key=out / KEYS / PUBLIC_NAME)
    raise typer.Exit(result.exit_code)


app.command(rich_help_panel=panels.STEP)(inspect)


@app.command(rich_help_panel=panels.STEP)
@takes(tuned_spec, into="spec")
@takes(loading_of, into="loading")
def purify(
    *,
    model: o.Model,
    clean: o.Clean,
    method: Annotated[str, typer.Option(help="tsbd, fine_tuning (the control), or another of `quarantine methods`.")],
    out: Out,
    spec: dict[str, Any],
    config: Annotated[str, typer.Option(help="The method's settings, a YAML file.")] = "",
    settings: o.Settings = [],
    report: Annotated[float, typer.Option(help="Share of the clean set left untouched for quoting figures.")] = 0.2,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Purify a model; --out becomes a bundle with result.json beside it."""
    from components._runtime.step import interruptible
    from components.purify_model.step import purify_model
    from defense_core.progress import default_progress

    with interruptible() as stop:
        evidence = purify_model(
            Path(model),
            Path(clean),
            out,
            method=method,
            config=o.parse_settings(settings, o.optional_mapping(config)),
            spec=spec,
            seed=seed,
            device=device,
            report=report,
            loading=loading,
            progress=default_progress(stop),
        )
    facts = evidence["results"]["facts"]
    chosen = ", ".join(f"{key}={facts[key]:g}" for key in ("n", "lr") if facts.get(key) is not None)
    _finish(evidence, as_json, f"{method}: purified model in {out} ({chosen}); see {out / 'result.json'}")


@app.command(rich_help_panel=panels.STEP)
@takes(model_spec, into="spec")
@takes(loading_of, into="loading")
def evaluate(
    *,
    model: o.Model,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    clean: o.Clean = "",
    test: o.Test = "",
    reference: Annotated[str, typer.Option(help="The unpurified model: enables drops and DER.")] = "",
    probe: o.Probes = [],
    name: Annotated[str, typer.Option(help="What the evidence is called: evaluate.<name>.")] = "model",
    spec: dict[str, Any],
    report: Annotated[float, typer.Option(help="Share of the clean set that is quoted on, as purify was given.")] = 0.2,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Measure ACC, and for each probe ASR, RA and DER, with 95 % intervals."""
    from components._runtime.evidence import write_evidence
    from components._runtime.step import interruptible
    from components.evaluate_model.step import evaluate_model
    from defense_core.files import require_writable
    from defense_core.progress import default_progress
    from pipelines.console import print_comparison

    require_writable(out)
    with interruptible() as stop:
        evidence = evaluate_model(
            Path(model),
            name=name,
            clean=o.optional_path(clean),
            test=o.optional_path(test),
            reference=o.optional_path(reference),
            probes=o.read_probes(probe),
            spec=spec,
            seed=seed,
            report=report,
            device=device,
            loading=loading,
            progress=default_progress(stop),
        )
        write_evidence(out, evidence)
    if not as_json:
        print_comparison({evidence["name"]: evidence}, selected=None)
    _finish(evidence, as_json, f"measured: {out}", judged=False)


@app.command(rich_help_panel=panels.STEP)
@takes(model_spec, into="spec")
@takes(loading_of, into="loading")
def export(
    *,
    model: o.Model,
    out: Out,
    clean: o.Clean = "",
    test: o.Test = "",
    probe: o.Probes = [],
    spec: dict[str, Any],
    seed: o.Seed = 0,
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Export to ONNX and prove that the file answers like the model."""
    from components._runtime.step import interruptible
    from components.export_onnx.step import export_onnx
    from defense_core.progress import default_progress

    with interruptible() as stop:
        evidence = export_onnx(
            Path(model),
            out,
            clean=o.optional_path(clean),
            test=o.optional_path(test),
            probes=o.read_probes(probe),
            spec=spec,
            seed=seed,
            loading=loading,
            progress=default_progress(stop),
        )
    _finish(evidence, as_json, f"ONNX file and evidence in {out}")


@app.command(name="compile", rich_help_panel=panels.CLUSTER)
def compile_pipeline(
    out: Annotated[Path, typer.Option(help="Folder for the compiled pipeline.")] = Path("build"),
    node_pools: o.NodePoolsFile = "",
    as_json: o.AsJson = False,
) -> None:
    """Write the pipeline's KFP intermediate representation, byte for byte reproducible."""
    from pipelines.compile import compile_to
    from pipelines.console import print_json
    from pipelines.node_pools import read_node_pools

    done = compile_to(out, read_node_pools(node_pools) if node_pools else None)
    if as_json:
        print_json({"written": [str(path) for path in done.written], "removed": [str(path) for path in done.removed]})
        return
    for path in done.written:
        typer.echo(path)
    for path in done.removed:
        typer.echo(f"removed {path}, of an earlier compilation: this one has no admission policies")


@app.command(rich_help_panel=panels.STEP)
def methods(as_json: o.AsJson = False) -> None:
    """List the purification methods and their settings."""
    from defense_core.config import to_mapping
    from defense_core.purify import METHODS
    from pipelines.console import print_json, table

    if as_json:
        print_json(
            {name: {"summary": row.summary, "config": to_mapping(row.config())} for name, row in METHODS.items()}
        )
        return
    for name, row in METHODS.items():
        table(f"{name}: {row.summary}", ("setting", "default"), to_mapping(row.config()).items())


def _finish(evidence: dict[str, Any], as_json: bool, sentence: str, *, judged: bool = True) -> None:
    """Print what was found and end with the verdict's exit code.

    Args:
        judged: whether PASS says something of the model; where it only says that the step was done, it is left out.
    """
    from pipelines.console import coloured, out, print_findings, print_json

    verdict = Verdict(evidence["verdict"])
    if as_json:
        print_json(evidence)
    else:
        print_findings(evidence["findings"])
        if judged or verdict is not Verdict.PASS:
            out.print(f"{coloured(verdict.value)}  ", end="")
        out.print(sentence, markup=False)
    raise typer.Exit(verdict.exit_code)


def main() -> None:
    """Entry point of ``quarantine``."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    streams = escape_what_cannot_be_shown()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("quarantine").setLevel(logging.INFO)
    try:
        code = _ended(as_json="--json" in sys.argv)
        flush(streams)
    except OSError as error:
        # Nobody reads on, or the disk is full: what was found is not told, which is neither a pass nor a fail.
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                traceback.print_exc()
        drop(streams)
        code = EXIT_UNKNOWN
    sys.exit(code)


def _ended(*, as_json: bool) -> int:
    """Run the command; its exit code. Raises BrokenPipeError if the reader of its output is gone."""
    from pipelines.console import print_error

    try:
        code = app(standalone_mode=False)
    except QuarantineError as error:
        print_error(error, as_json=as_json)
        code = error.exit_code
    except _CLICK_ERROR as error:
        if as_json:
            print_error(ConfigError(error.format_message(), hint="See --help"), as_json=True)
        else:
            error.show()
        code = EXIT_USAGE
    except (typer.Abort, KeyboardInterrupt):
        code = EXIT_UNKNOWN
    except SystemExit as error:
        # So typer answers a broken pipe, with exit code 1.
        if isinstance(error.__context__, BrokenPipeError):
            raise error.__context__ from error
        raise
    except BrokenPipeError:
        raise
    except Exception:  # noqa: BLE001 - a defect of ours decides nothing: its trace is shown, and it must not read as FAIL
        traceback.print_exc()
        code = EXIT_UNKNOWN
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
