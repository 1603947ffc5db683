"""``quarantine promote``: resume a run that ended at its decision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipelines import options as o
from pipelines import panels
from pipelines.option_groups import takes
from pipelines.promotion_options import PromotionOrder, promotion_order

app = typer.Typer()


@app.command(rich_help_panel=panels.WHOLE)
@takes(promotion_order, into="order")
def promote(
    *,
    order: PromotionOrder,
    out: Annotated[Path, typer.Option(help="Work folder, e.g. that of the former run.")] = Path("quarantine-run"),
    signing_key: o.SigningKey = None,
    as_json: o.AsJson = False,
) -> None:
    """Decide again with approvals about a model that a run has measured, and promote it if allowed.

    Nothing is scanned, purified or measured again. The new decision states which one it supersedes; asked twice, it
    promotes once.
    """
    from pipelines.local import run_local
    from pipelines.summary import print_line, print_run

    result = run_local(
        order.request,
        out,
        model_name=order.model_name,
        alias=order.alias,
        signing_key=signing_key,
        on_line=(lambda line: None) if as_json else print_line,
    )
    print_run(result, as_json=as_json, approver_files=order.approver_files)
    raise typer.Exit(result.exit_code)
