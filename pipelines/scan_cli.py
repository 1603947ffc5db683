"""``quarantine scan`` and ``quarantine calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from components._runtime.plan import Loading
from defense_core.verdict import Verdict
from pipelines import options as o
from pipelines import panels
from pipelines.model_options import loading_of, model_spec
from pipelines.option_groups import takes

app = typer.Typer()


@app.command(rich_help_panel=panels.STEP)
@takes(model_spec, into="spec")
@takes(loading_of, into="loading")
def scan(
    *,
    model: o.Model,
    out: Annotated[Path, typer.Option(help="Folder to create: scan.json, pictures, inverted triggers.")],
    clean: o.Clean = "",
    spec: dict[str, Any],
    fpr: Annotated[float, typer.Option(help="False positive rate of the whole scan.")] = 0.05,
    budget_s: Annotated[
        float, typer.Option("--budget-s", help="Seconds for the detectors, and as many to confirm; 0: no limit.")
    ] = 0.0,
    pool: o.PoolFile = "",
    config: Annotated[str, typer.Option(help="Settings of the detectors, a YAML file.")] = "",
    settings: o.Settings = [],
    seed: o.RecordedSeed = 0,
    device: o.Device = "auto",
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Look for a backdoor: PASS (no evidence found), FAIL (found and confirmed) or UNKNOWN."""
    from components._runtime.step import interruptible
    from components.scan_backdoor.step import scan_model
    from defense_core.progress import default_progress

    with interruptible() as stop:
        evidence = scan_model(
            Path(model),
            out,
            clean=o.optional_path(clean),
            spec=spec,
            config={
                "fpr": fpr,
                "budget_s": budget_s,
                "settings": o.parse_settings(settings, o.optional_mapping(config)),
            },
            pool=o.optional_path(pool),
            seed=seed,
            device=device,
            loading=loading,
            progress=default_progress(stop),
        )
    _print(evidence, out, as_json=as_json)
    raise typer.Exit(Verdict(evidence["verdict"]).exit_code)


def _print(evidence: dict[str, Any], out: Path, *, as_json: bool) -> None:
    from pipelines.console import coloured, print_json, table
    from pipelines.console import out as console

    results = evidence["results"]
    if as_json:
        print_json({**evidence, "results": {key: value for key, value in results.items() if key != "pictures"}})
        return
    table(
        "detectors",
        ("detector", "statistic", "p", "suspects", "why"),
        (
            (
                each["name"],
                f"{each['statistic']:.2f}",
                "" if each["p_value"] is None else f"{each['p_value']:.3f}",
                ", ".join(map(str, each["targets"])),
                each["why"],
            )
            for each in results["detectors"]
        ),
    )
    console.print(f"{coloured(evidence['verdict'])}  ", end="")
    console.print(evidence["findings"][0]["why"], markup=False)
    console.print(f"scan.json and pictures in {out}", markup=False)


@app.command(rich_help_panel=panels.STEP)
@takes(loading_of, into="loading")
def calibrate(
    *,
    out: Annotated[Path, typer.Option(help="Pool file to write, JSON.")],
    clean: Annotated[
        str, typer.Option(help="Clean images that no reference was trained on: what scans will have, or more.")
    ],
    architecture: o.Architecture,
    input_size: o.InputSize,
    mean: o.Mean,
    std: o.Std,
    train: Annotated[
        str, typer.Option(help="Training images: references are trained on them. Or give --reference.")
    ] = "",
    references: Annotated[int, typer.Option(help="How many to train; 59 is the least for a rate of 0.05.")] = 60,
    reference: Annotated[
        list[Path], typer.Option("--reference", help="A model known to be clean, instead of training; repeatable.")
    ] = [],
    architecture_args: Annotated[
        list[str],
        typer.Option(help="Arguments of the network, JSON; repeatable: references take turns.", metavar="JSON"),
    ] = [],
    class_names: o.ClassNames = "",
    config: Annotated[str, typer.Option(help="Settings of the detectors, a YAML file.")] = "",
    settings: Annotated[
        list[str], typer.Option("--set", help="Of the training: epochs=15; repeatable.", metavar="KEY=VALUE")
    ] = [],
    device: o.Device = "auto",
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Make the calibration pool that scans of one kind of model are compared with.

    Only statistics are kept, no weights. References that were read are kept beside --out while the
    command runs, so that one that was stopped goes on where it was.
    """
    from components._runtime.step import interruptible
    from components.scan_backdoor.calibrate import calibrate_pool
    from defense_core.progress import default_progress
    from pipelines.console import print_json

    specs = [
        model_spec(
            architecture=architecture,
            architecture_args=arguments,
            input_size=input_size,
            mean=mean,
            std=std,
            class_names=class_names,
        )
        for arguments in architecture_args or [""]
    ]
    if train or reference:
        _warn_of_few(references if train else len(reference))
    with interruptible() as stop:
        pool = calibrate_pool(
            out,
            clean=Path(clean),
            specs=specs,
            train=o.optional_path(train),
            count=references,
            given=reference,
            training=o.parse_settings(settings),
            settings=o.optional_mapping(config),
            device=device,
            loading=loading,
            progress=default_progress(stop),
        )
    if as_json:
        stratum = {"architecture": pool.stratum.architecture, "num_classes": pool.stratum.num_classes}
        print_json({"pool": str(out), "digest": pool.digest, "references": len(pool.references), **stratum})
        return
    typer.echo(f"{out}: {len(pool.references)} references of {pool.stratum.architecture}, {pool.digest}")


def _warn_of_few(references: int) -> None:
    from defense_core.scan.pool import MIN_REFERENCES
    from pipelines.console import err

    if 1 <= references < MIN_REFERENCES:
        err.print(
            f"[yellow]warning:[/yellow] {references} reference{'s' * (references > 1)}: a scan at a false positive "
            f"rate of 0.05 needs {MIN_REFERENCES}"
        )


@app.command(rich_help_panel=panels.STEP)
@takes(model_spec, into="spec")
@takes(loading_of, into="loading")
def control(
    *,
    model: o.Model,
    clean: o.Clean,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    spec: dict[str, Any],
    pool: o.PoolFile = "",
    settings: Annotated[
        list[str], typer.Option("--set", help="Of the control: method=tsbd; repeatable.", metavar="KEY=VALUE")
    ] = [],
    controls: o.Controls = "",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Plant a known backdoor into a copy of the model: would the scan find it, and purification remove it?"""
    from components._runtime.control_store import control_store
    from components._runtime.evidence import write_evidence
    from components._runtime.step import interruptible
    from components.control_model.step import control_model
    from defense_core.files import require_writable
    from defense_core.progress import default_progress
    from pipelines.console import coloured, print_json
    from pipelines.console import out as console

    require_writable(out)
    with interruptible() as stop:
        evidence = control_model(
            Path(model),
            Path(clean),
            config=o.parse_settings(settings),
            pool=o.optional_path(pool),
            spec=spec,
            seed=seed,
            device=device,
            loading=loading,
            kept=control_store(controls),
            progress=default_progress(stop),
        )
        write_evidence(out, evidence)
    if as_json:
        print_json(evidence)
    else:
        console.print(f"{coloured(evidence['verdict'])}  ", end="")
        console.print(evidence["findings"][0]["why"], markup=False)
    raise typer.Exit(Verdict(evidence["verdict"]).exit_code)
