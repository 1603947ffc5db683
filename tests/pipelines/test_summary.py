"""The end of a run on a terminal."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from components._runtime.outcome import RunOutcome
from pipelines.console import print_findings, table
from pipelines.local import LocalRun
from pipelines.summary import print_run

BLANKS = Path("my models") / "run"


def ended(**changes: object) -> LocalRun:
    """A run that was signed and registered, in a folder with a blank in its name."""
    run = LocalRun(
        name="run",
        outcome=RunOutcome("allow", "", "", 0),
        evidence=BLANKS / "evidence",
        report=None,
        log=BLANKS / "run.log",
        tracking_uri=f"sqlite:///{BLANKS}/mlflow.db",
        promotion={"registered": True, "name": "net", "version": "3", "alias": "champion", "alias_moved": True},
        signed={"signed": True, "key_id": "ab" * 32},
        release=BLANKS / "release",
        statement=None,
        seconds=1.0,
    )
    return replace(run, **changes)  # type: ignore[arg-type]


def said(run: LocalRun, capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What a run prints, by the word before the colon."""
    print_run(run, as_json=False, public_key=BLANKS / "signing.pub")
    lines = [line.partition(":") for line in capsys.readouterr().out.splitlines()]
    return {name: rest.strip() for name, _, rest in lines}


def test_commands_can_be_pasted_where_a_path_has_blanks(capsys: pytest.CaptureFixture[str]) -> None:
    found = said(ended(), capsys)
    verify = ["quarantine", "verify", str(BLANKS / "release"), "--public-key", str(BLANKS / "signing.pub")]
    assert shlex.split(found["verify"]) == verify
    shown = shlex.split(found["MLflow"].partition("   then")[0])
    assert shown == ["mlflow", "ui", "--backend-store-uri", f"sqlite:///{BLANKS}/mlflow.db"]
    assert found["registry"] == "net version 3 is now champion"


def test_what_rests_on_approvals_is_verified_with_the_approvers_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    approvals = [{"identity": name} for name in ("bob", "ada", "bob")]
    gate = {"schema": 1, "name": "gate", "results": {"findings": [], "approvals": approvals}}
    (tmp_path / "gate.json").write_text(json.dumps(gate))
    print_run(ended(evidence=tmp_path), as_json=False, approver_files={"ada": Path("my keys") / "ada.pub"})
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("verify:")]
    named = ["--approver-key", "ada=my keys/ada.pub", "--approver-key", "bob=PUBLIC_KEY"]
    assert shlex.split(line)[-4:] == named


def test_a_failing_warning_is_told_from_a_failing_rule(capsys: pytest.CaptureFixture[str]) -> None:
    said = {"rule": "r", "verdict": "FAIL", "value": 0.0500001, "bound": "<= 0.05", "why": "Because."}
    print_findings([{**said, "effect": "warn"}, {**said, "effect": "block"}])
    lines = capsys.readouterr().out.splitlines()
    words = ["effect", "warn", "block"]
    assert [word for line in lines for word in words if word in line] == words
    assert sum("0.0500001" in line for line in lines) == 2
    print_findings([said])
    assert "effect" not in capsys.readouterr().out


def test_a_policy_that_only_observes_registers_nothing_and_the_summary_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    observed = {"registered": False, "outcome": "observe", "identity": "sha256:1", "signature_required": False}
    found = said(ended(outcome=RunOutcome("observe", "", "", 0), promotion=observed), capsys)
    assert found["registry"] == "nothing was registered, because the policy only observes"


def test_a_strangers_text_in_a_table_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table("Rules", ("why",), [("\x1b[2Jlayer",)])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\\u001b[2Jlayer" in printed
