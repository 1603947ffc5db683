"""``quarantine report`` and ``quarantine fleet``: pages from evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from defense_core.errors import ConfigError, SourceNotFound
from defense_core.verdict import Verdict
from pipelines import options as o
from pipelines import panels

app = typer.Typer()

Page = Annotated[Path, typer.Option(help="HTML file to write; one file that needs no network.")]


@app.command(rich_help_panel=panels.EVIDENCE)
def report(
    out: Page,
    evidence: Annotated[str, typer.Option(help="Folder of one run's evidence, one <name>.json a step.")] = "",
    compare: Annotated[
        tuple[str, str], typer.Option(help="Two such folders, to be compared.", metavar="A B", show_default=False)
    ] = ("", ""),
    as_json: o.AsJson = False,
) -> None:
    """Write the report of a run, or of two runs side by side. Exit code 0 once it is written, whatever it says."""
    from components._runtime.fleet import report_of_folder
    from defense_core.report import Report, render_report
    from defense_core.report_compare import RunComparison, compare_reports, render_comparison

    if (bool(evidence), *map(bool, compare)) not in {(True, False, False), (False, True, True)}:
        raise ConfigError("nothing to report on", expected="either --evidence DIR or --compare A B", got="both or none")
    made: Report | RunComparison
    if evidence:
        made = report_of_folder(Path(evidence))
        page = render_report(made)
    else:
        first, second = (report_of_folder(Path(folder)) for folder in compare)
        made = compare_reports(first, second, names=_names(*compare))
        page = render_comparison(made)
    _finish(out, page, made.to_mapping(), made.headline, as_json=as_json)


@app.command(rich_help_panel=panels.EVIDENCE)
def fleet(
    out: Page,
    evidence: Annotated[str, typer.Option(help="Folder below which runs lie, each with its evidence.")] = "",
    tracking_uri: Annotated[
        str, typer.Option(help="MLflow whose registry is read: http(s)://… or sqlite:///…", metavar="URI")
    ] = "",
    model: Annotated[list[str], typer.Option(help="Only this registered model; repeatable.")] = [],
    as_json: o.AsJson = False,
) -> None:
    """Write one page over all versions: decisions, trend and drift. Exit code 1 where something drifted."""
    from components._runtime.fleet import folder_versions, registry_versions
    from components._runtime.mlflow_connection import MlflowSettings, connect
    from defense_core.report_fleet import build_fleet, render_fleet

    if bool(evidence) == bool(tracking_uri):
        raise ConfigError(
            "no source of versions", expected="either --evidence DIR or --tracking-uri URI", got="both or none"
        )
    if evidence:
        rows = folder_versions(Path(evidence))
        found = [row for row in rows if not model or row.model in model]
        _require_every(model, {row.model for row in rows}, evidence)
    else:
        found = registry_versions(connect(MlflowSettings(tracking_uri), create=False), model)
    made = build_fleet(found)
    _finish(out, render_fleet(made), made.to_mapping(), made.headline, as_json=as_json)
    raise typer.Exit(Verdict.FAIL.exit_code if made.drift else Verdict.PASS.exit_code)


def _require_every(asked: list[str], known: set[str], evidence: str) -> None:
    """Refuse a model without a row: a page without it would say that nothing of it drifted. Raises SourceNotFound."""
    missing = [name for name in asked if name not in known]
    if missing:
        raise SourceNotFound(
            f"there is no run of {', '.join(missing)} below {evidence}",
            expected="one of " + ", ".join(sorted(known)),
            got=", ".join(missing),
            hint="Check --model",
        )


def _names(first: str, second: str) -> tuple[str, str]:
    """Short names of two folders, told apart."""
    a, b = (Path(folder).absolute().name for folder in (first, second))
    return (a, b) if a != b else (first, second)


def _finish(out: Path, page: str, mapping: dict[str, Any], headline: str, *, as_json: bool) -> None:
    from defense_core.files import write_atomic
    from pipelines.console import out as console
    from pipelines.console import print_json

    write_atomic(out, page.encode())
    if as_json:
        print_json(mapping)
    else:
        console.print(headline, markup=False)
        console.print(f"page in {out}", markup=False)
