"""``quarantine gate`` and ``quarantine approve``: decide by a policy; let a person sign for one rule."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from defense_core.errors import ConfigError, PolicyError, StorageError
from defense_core.files import reading
from defense_core.verdict import Verdict
from pipelines import options as o
from pipelines import panels

app = typer.Typer()

At = Annotated[
    str, typer.Option(help="Time of the decision, ISO 8601 with a zone; default: now. Ages and expiries count to it.")
]
Evidence = Annotated[Path, typer.Option(help="Folder of evidence files, one <name>.json a step.")]


@app.command(rich_help_panel=panels.STEP)
def gate(
    policy: Annotated[str, typer.Option(help="strict, standard, observe, or a policy file.")],
    evidence: Evidence,
    out: Annotated[str, typer.Option(help="Folder for the decision and all that it rests on.")] = "",
    at: At = "",
    approval: Annotated[
        list[Path], typer.Option(help="A signed approval, from `quarantine approve`; repeatable.")
    ] = [],
    approver_key: o.ApproverKeys = [],
    supersedes: Annotated[
        str, typer.Option(help="Folder of the earlier decision that this one takes the place of; it stays as it is.")
    ] = "",
    as_json: o.AsJson = False,
) -> None:
    """Decide, offline: apply a policy to evidence. The same inputs at the same time give the same decision."""
    from components._runtime.approvals import read_approvals
    from components._runtime.evidence import read_folder
    from components.gate_promotion.step import gate_promotion
    from pipelines.console import coloured, print_findings, print_json
    from pipelines.console import out as console

    decision = gate_promotion(
        read_folder(evidence),
        o.read_policy(policy),
        o.optional_path(out),
        at=at or None,
        approvals=read_approvals(approval, o.approvers(approver_key)),
        supersedes=o.optional_path(supersedes),
    )
    verdict = Verdict(decision["verdict"])
    if as_json:
        print_json(decision)
    else:
        print_findings(decision["findings"])
        console.print(f"{coloured(verdict.value)}  ", end="")
        console.print(f"policy {decision['results']['policy_name']}: {decision['results']['outcome']}", markup=False)
    raise typer.Exit(verdict.exit_code)


@app.command(rich_help_panel=panels.EVIDENCE)
def approve(
    evidence: Evidence,
    rule: Annotated[str, typer.Option(help="Id of the rule that need not hold for this model.")],
    identity: Annotated[str, typer.Option(help="Who approves, as the gate's --approver-key names the key.")],
    reason: Annotated[str, typer.Option(help="Why, a sentence.")],
    key: Annotated[Path, typer.Option(help="Private key, PEM, of whoever approves.")],
    out: Annotated[Path, typer.Option(help="Signed file to write.")],
    policy: Annotated[
        str, typer.Option(help="The policy that is approved under; default: the one in the decision's folder.")
    ] = "",
    at: Annotated[str, typer.Option(help="Time of the approval, ISO 8601 with a zone; default: now.")] = "",
    as_json: o.AsJson = False,
) -> None:
    """Sign that a rule need not hold for the model that this evidence speaks of. Decides nothing by itself."""
    from components._runtime.approvals import sign_approval
    from components._runtime.evidence import POLICY, Clock, read_folder
    from components._runtime.signing_keys import load_signing_key
    from defense_core.evidence import parse_evidence
    from defense_core.files import sha256_bytes, write_atomic
    from defense_core.policy import decide, parse_policy
    from defense_core.policy_time import parse_time, time_text
    from defense_core.policy_waivers import made_after
    from pipelines.console import out as console
    from pipelines.console import print_json

    with reading(out, StorageError, "a new file in a folder that may be written"):
        taken = out.exists()
    if taken:
        raise ConfigError(f"{out} exists", expected="a new file", got="a file", hint="An approval is never changed")
    for option, value in (("--identity", identity), ("--reason", reason)):
        if not value.strip():
            raise ConfigError(f"{option} is empty", expected="a name or sentence", got=repr(value))
    parsed = parse_policy(o.read_policy(policy or str(evidence / POLICY)))
    moment = time_text(parse_time(at or Clock.start().started, "--at"))
    files = read_folder(evidence)
    decision = decide(parsed, files, at=moment)
    if later := made_after(moment, parse_evidence(files)):
        raise ConfigError(
            "an approval must come after what it approves",
            expected=f"a time after evidence {later} was made",
            got=moment,
            hint="It would count for nothing: approve at the present time",
        )
    _require_approvable(decision, parsed, rule)
    said = {
        "rule": rule,
        "identity": identity.strip(),
        "reason": reason.strip(),
        "approved_at": moment,
        "evidence": decision.evidence_digest,
        "policy": parsed.digest,
    }
    data = sign_approval(load_signing_key(key), **said)
    write_atomic(out, data)
    if as_json:
        print_json({**said, "envelope": sha256_bytes(data), "file": str(out)})
        return
    console.print(f"{said['identity']} approves {rule}: {out}", markup=False)
    console.print("It counts at: quarantine gate --approval FILE --approver-key NAME=PUBKEY", markup=False)


def _require_approvable(decision: Any, policy: Any, rule: str) -> None:
    from defense_core.policy import approvable_rules

    known = approvable_rules(policy)
    if rule not in known:
        raise PolicyError(
            f"{rule} is no rule that can be approved", expected="one of " + ", ".join(known), got=repr(rule)
        )
    (found,) = [finding for finding in decision.findings if finding.rule == rule]
    if found.verdict is Verdict.PASS or found.effect != "block":
        raise PolicyError(
            f"{rule} needs no approval", expected="a rule that blocks", got=f"{found.verdict.value}, {found.effect}"
        )
    if found.verdict is Verdict.FAIL and known[rule] != "fail":
        raise PolicyError(
            f"{rule} failed, and a failure of this rule cannot be approved",
            expected="a rule that is undecided",
            got=found.why,
            hint="Say approvable: fail in the policy if it may be",
        )
