"""``quarantine policy``: check, explain and compare policies, and try them on past evidence.

Exit codes: 0, 1 and 2 as each command says; 3 for a malformed policy, a missing file or wrong usage.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defense_core.verdict import Verdict, combine
from pipelines import options as o

if TYPE_CHECKING:
    from defense_core.policy_types import Policy

app = typer.Typer(
    help="Check, explain and compare policies, and try them on past evidence.\n\n"
    "Exit codes: 0 fine, 1 something is wrong, looser or different, 2 cannot be told, 3 usage or malformed policy.",
    no_args_is_help=True,
)

File = Annotated[str, typer.Argument(help="strict, standard, observe, or a policy file.")]


@app.command()
def lint(
    file: File,
    at: Annotated[str, typer.Option(help="Time that exceptions expire by, ISO 8601 with a zone; default: now.")] = "",
    as_json: o.AsJson = False,
) -> None:
    """Check a policy. Exit 0: nothing to remark; 1: valid, with remarks; 3: malformed."""
    from defense_core.policy_explain import remarks
    from defense_core.policy_time import parse_time
    from pipelines.console import out as console
    from pipelines.console import print_json

    policy = _policy(file)
    moment = parse_time(at, "--at") if at else datetime.now(UTC)
    found = remarks(policy, moment)
    if as_json:
        print_json({"policy": policy.name, "digest": policy.digest, "remarks": list(found)})
    else:
        for each in found:
            console.print(f"{each.about}: {each.text}", markup=False)
        console.print(f"{policy.name}: valid; remarks: {len(found)}", markup=False)
    raise typer.Exit((Verdict.FAIL if found else Verdict.PASS).exit_code)


@app.command()
def explain(file: File, as_json: o.AsJson = False) -> None:
    """Say in plain sentences what a policy means. Exit 0; 3: malformed."""
    from defense_core.policy_explain import explain as explained
    from pipelines.console import out as console
    from pipelines.console import print_json

    policy = _policy(file)
    sentences = explained(policy)
    if as_json:
        print_json({"policy": policy.name, "digest": policy.digest, "sentences": list(sentences)})
        return
    console.print(f"{policy.name} ({policy.digest})", markup=False)
    for each in sentences:
        console.print(f"- {each.about}: {each.text}", markup=False)


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="strict, standard, observe, or a policy file.")],
    new: Annotated[str, typer.Argument(help="The policy to compare with it.")],
    as_json: o.AsJson = False,
) -> None:
    """Compare two policies rule by rule.

    Exit 0: nothing lets more through; 1: something is looser; 2: nothing is, but some changes have no order.
    """
    from defense_core.policy_diff import Direction, overall
    from defense_core.policy_diff import diff as differences
    from pipelines.console import out as console
    from pipelines.console import print_json, table

    before, after = _policy(old), _policy(new)
    changes = differences(before, after)
    direction = overall(changes)
    if as_json:
        print_json(
            {
                "old": {"policy": before.name, "digest": before.digest},
                "new": {"policy": after.name, "digest": after.digest},
                "overall": direction,
                "changes": list(changes),
            }
        )
    elif changes:
        table(f"{before.name} → {after.name}", ("rule", "direction", "change"), _rows(changes))
    else:
        console.print("no difference", markup=False)
    verdicts = {Direction.LOOSER: Verdict.FAIL, Direction.OTHER: Verdict.UNKNOWN}
    raise typer.Exit((verdicts.get(direction, Verdict.PASS) if direction else Verdict.PASS).exit_code)


@app.command()
def replay(
    policy: Annotated[str, typer.Option(help="The policy to try: strict, standard, observe, or a file.")],
    evidence: Annotated[
        list[Path], typer.Option(help="A run's evidence folder, or a folder of such; repeatable.", exists=True)
    ],
    at: Annotated[
        str, typer.Option(help="Time of the decisions, ISO 8601 with a zone; default: as each was made.")
    ] = "",
    as_json: o.AsJson = False,
) -> None:
    """Decide past runs again by a policy, and show which outcomes would change. Nothing is written.

    Exit 0: none changes; 1: at least one does; 2: none does, but some cannot be decided or compared.
    """
    from defense_core.policy_time import parse_time
    from pipelines.console import out as console
    from pipelines.console import print_json, table
    from pipelines.policy_replay import find_runs, replay_run

    parsed = _policy(policy)
    if at:
        parse_time(at, "--at")
    runs = [run for folder in evidence for run in find_runs(folder)]
    replayed = [replay_run(parsed, run, at or None) for run in runs]
    verdict = combine(each.verdict for each in replayed)
    if as_json:
        print_json({"policy": parsed.name, "digest": parsed.digest, "verdict": verdict, "runs": replayed})
    else:
        headings = ("run", "was", "becomes", "reasons")
        table(
            f"Past decisions by {parsed.name}",
            headings,
            [(each.folder, each.was or "–", each.becomes or "–", _why(each)) for each in replayed],
        )
        changed = sum(each.verdict is Verdict.FAIL for each in replayed)
        console.print(f"{changed} of {len(replayed)} would be decided otherwise", markup=False)
    raise typer.Exit(verdict.exit_code)


def _policy(name: str) -> Policy:
    from defense_core.policy import parse_policy

    return parse_policy(o.read_policy(name))


def _rows(changes: Sequence[Any]) -> list[tuple[str, str, str]]:
    return [(each.about, each.direction.value, each.text) for each in changes]


def _why(run: Any) -> str:
    return run.problem or "\n".join(run.reasons if run.verdict is not Verdict.PASS else ())
