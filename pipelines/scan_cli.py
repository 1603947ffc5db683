"""``quarantine scan`` and ``quarantine calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from defense_core.verdict import Verdict
from pipelines import options as o
from pipelines.yaml_files import read_mapping

app = typer.Typer()


@app.command()
def scan(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="Folder to create: scan.json, pictures, inverted triggers.")],
    clean: o.Clean = "",
    architecture: o.Architecture = "",
    architecture_args: o.ArchitectureArgs = "",
    input_size: o.InputSize = "",
    mean: o.Mean = "",
    std: o.Std = "",
    class_names: o.ClassNames = "",
    trusted_module: o.TrustedModule = [],
    fpr: Annotated[float, typer.Option(help="False positive rate of the whole scan.")] = 0.05,
    budget_s: Annotated[
        float, typer.Option("--budget-s", help="Seconds for the detectors; 0: as long as it takes.")
    ] = 0.0,
    pool: o.PoolFile = "",
    config: Annotated[str, typer.Option(help="Settings of the detectors, a YAML file.")] = "",
    settings: o.Settings = [],
    seed: o.Seed = 0,
    device: o.Device = "auto",
    max_bytes: o.MaxBytes = o.DEFAULT_LIMITS.max_bytes,
    load_timeout_s: o.LoadTimeout = o.DEFAULT_LIMITS.timeout_s,
    as_json: o.AsJson = False,
) -> None:
    """Look for a backdoor: PASS (no evidence found), FAIL (found and confirmed) or UNKNOWN."""
    from components._runtime.step import interruptible
    from components.scan_backdoor.step import scan_model
    from defense_core.progress import default_progress

    base = read_mapping(Path(config)) if config else {}
    with interruptible() as stop:
        evidence = scan_model(
            Path(model),
            out,
            clean=o.optional_path(clean),
            whole=True,
            spec=o.parse_spec(
                architecture=architecture,
                architecture_args=architecture_args,
                input_size=input_size,
                mean=mean,
                std=std,
                class_names=class_names,
                augment="",
            ),
            config={"fpr": fpr, "budget_s": budget_s, "settings": o.parse_settings(settings, base)},
            pool=o.optional_path(pool),
            seed=seed,
            device=device,
            loading=o.parse_loading(trusted_module=trusted_module, max_bytes=max_bytes, load_timeout_s=load_timeout_s),
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


@app.command()
def calibrate(
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
    seed: o.Seed = 0,
    device: o.Device = "auto",
) -> None:
    """Make the calibration pool that scans of one kind of model are compared with.

    Only statistics are kept, no weights. References that were read are kept beside --out while the
    command runs, so that one that was stopped goes on where it was.
    """
    from components._runtime.step import interruptible
    from components.scan_backdoor.calibrate import calibrate_pool
    from defense_core.progress import default_progress

    specs = [
        o.parse_spec(
            architecture=architecture,
            architecture_args=arguments,
            input_size=input_size,
            mean=mean,
            std=std,
            class_names=class_names,
            augment="",
        )
        for arguments in architecture_args or [""]
    ]
    with interruptible() as stop:
        pool = calibrate_pool(
            out,
            clean=Path(clean),
            specs=specs,
            train=o.optional_path(train),
            count=references,
            given=reference,
            training=o.parse_settings(settings),
            settings=read_mapping(Path(config)) if config else {},
            seed=seed,
            device=device,
            progress=default_progress(stop),
        )
    typer.echo(f"{out}: {len(pool.references)} references of {pool.stratum.architecture}, {pool.digest}")


@app.command()
def control(
    model: o.Model,
    clean: o.Clean,
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    architecture: o.Architecture = "",
    architecture_args: o.ArchitectureArgs = "",
    input_size: o.InputSize = "",
    mean: o.Mean = "",
    std: o.Std = "",
    class_names: o.ClassNames = "",
    trusted_module: o.TrustedModule = [],
    pool: o.PoolFile = "",
    settings: Annotated[
        list[str], typer.Option("--set", help="Of the control: method=tsbd; repeatable.", metavar="KEY=VALUE")
    ] = [],
    seed: o.Seed = 0,
    device: o.Device = "auto",
    max_bytes: o.MaxBytes = o.DEFAULT_LIMITS.max_bytes,
    load_timeout_s: o.LoadTimeout = o.DEFAULT_LIMITS.timeout_s,
    as_json: o.AsJson = False,
) -> None:
    """Plant a known backdoor into a copy of the model: would the scan find it, and purification remove it?"""
    from components._runtime.evidence import write_evidence
    from components._runtime.step import interruptible
    from components.control_model.step import control_model
    from defense_core.progress import default_progress
    from pipelines.console import coloured, print_json
    from pipelines.console import out as console

    with interruptible() as stop:
        evidence = control_model(
            Path(model),
            Path(clean),
            config=o.parse_settings(settings),
            pool=o.optional_path(pool),
            spec=o.parse_spec(
                architecture=architecture,
                architecture_args=architecture_args,
                input_size=input_size,
                mean=mean,
                std=std,
                class_names=class_names,
                augment="",
            ),
            seed=seed,
            device=device,
            loading=o.parse_loading(trusted_module=trusted_module, max_bytes=max_bytes, load_timeout_s=load_timeout_s),
            progress=default_progress(stop),
        )
        write_evidence(out, evidence)
    if as_json:
        print_json(evidence)
    else:
        console.print(f"{coloured(evidence['verdict'])}  ", end="")
        console.print(evidence["findings"][0]["why"], markup=False)
    raise typer.Exit(Verdict(evidence["verdict"]).exit_code)
