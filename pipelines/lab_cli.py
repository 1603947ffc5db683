"""``quarantine lab``: plant backdoors into models of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from components._runtime.plan import Loading
from defense_core.verdict import Verdict
from pipelines import options as o
from pipelines.model_options import ESSENTIAL, loading_of, tuned_spec
from pipelines.option_groups import takes
from pipelines.yaml_files import read_mapping

app = typer.Typer(
    help="Plant backdoors into models of your own, to see how scan and purification fare on them.",
    no_args_is_help=True,
)


@app.command()
@takes(tuned_spec, into="spec", required=ESSENTIAL)
@takes(loading_of, into="loading")
def plant(
    *,
    attack: Annotated[Path, typer.Option(help="Attack specification, YAML: kind, target and settings.")],
    train: Annotated[str, typer.Option(help="Training images: .parquet, .npz or an image folder.")],
    test: Annotated[str, typer.Option(help="Images that figures are measured on.")],
    out: Annotated[Path, typer.Option(help="Folder to create; nothing is left of it if the command ends in an error.")],
    spec: dict[str, Any],
    rate: Annotated[float, typer.Option(help="Poisoned samples as a share of the training set.")] = 0.1,
    settings: Annotated[
        list[str],
        typer.Option("--set", help="Training: epochs=30, lr=0.05, adaptive=sam…; repeatable.", metavar="KEY=VALUE"),
    ] = [],
    min_asr: Annotated[float, typer.Option("--min-asr", help="Smaller success of the attack is a failure.")] = 0.9,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    loading: Loading,
    as_json: o.AsJson = False,
) -> None:
    """Train a backdoored model; --out gets bundle/, probe.yaml and result.json with ACC and ASR."""
    from components._runtime.step import interruptible
    from defense_core.progress import default_progress
    from pipelines.console import coloured, print_findings, print_json, table
    from pipelines.console import out as console
    from pipelines.lab import plant_backdoor

    with interruptible() as stop:
        evidence = plant_backdoor(
            o.beside(attack, read_mapping(attack)),
            Path(train),
            Path(test),
            out,
            rate=rate,
            spec=spec,
            training=o.parse_settings(settings),
            min_asr=min_asr,
            seed=seed,
            device=device,
            loading=loading,
            progress=default_progress(stop),
        )
    verdict = Verdict(evidence["verdict"])
    if as_json:
        print_json(evidence)
    else:
        table("The backdoored model (95 % intervals)", ("figure", "value", "low", "high", "images"), _figures(evidence))
        print_findings(evidence["findings"])
        console.print(f"{coloured(verdict.value)}  ", end="")
        console.print(f"backdoored model in {out / 'bundle'}, its trigger in {out / 'probe.yaml'}", markup=False)
    raise typer.Exit(verdict.exit_code)


@app.command(name="list")
def list_attacks(as_json: o.AsJson = False) -> None:
    """List the attacks, their label mode and their settings."""
    from defense_core.attacks.catalogue import ATTACKS, default_settings
    from defense_core.config import canonical_json
    from pipelines.console import out as console
    from pipelines.console import print_json, table

    rows: dict[str, dict[str, Any]] = {
        kind: {
            "summary": row.summary,
            "labels": ", ".join(row.label_modes),
            "cover_share": row.cover_share,
            "learned": row.training is not None,
            "settings": default_settings(kind),
        }
        for kind, row in ATTACKS.items()
    }
    if as_json:
        print_json(rows)
        return
    for kind, facts in rows.items():
        cover = (
            f"cover samples: {facts['cover_share']:g} times the poisoned ones" if facts["cover_share"] else "no cover"
        )
        trigger = "learnt trigger" if facts["learned"] else "fixed trigger"
        console.print(f"\n{kind}: {facts['summary']}", style="bold", markup=False)
        console.print(f"labels: {facts['labels']} (the first by default); {cover}; {trigger}", markup=False)
        settings = [(key, canonical_json(value).decode()) for key, value in facts["settings"].items()]
        table("", ("setting", "default"), settings)
    console.print("\nEvery attack also takes name, target, clean_label and cover_rate (a share of the training set).")


def _figures(evidence: dict[str, Any]) -> list[tuple[str, ...]]:
    from pipelines.console import shown

    (probe,) = evidence["results"]["probes"]
    named = {"ACC": evidence["results"]["acc"], "ASR": probe["asr"], "RA": probe["ra"]}
    return [
        (name, *(shown(row[key]) for key in ("value", "low", "high")), str(row["trials"]))
        for name, row in named.items()
    ]
