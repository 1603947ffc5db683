# mypy: disable-error-code="untyped-decorator"
"""The promote run: a decision is made again with approvals, from the release of a former run, and carried out.

Reopen → gate → sign → promote → attest; report always. Nothing is scanned, purified or measured again.
"""

from typing import Any

from kfp import dsl

from components.gate_promotion.component import gate_promotion
from components.reopen_release.component import reopen_release
from components.report.component import report
from pipelines.tasks import publish, set_up

PIPELINE_NAME = "model-quarantine-promote"


@dsl.pipeline(
    name=PIPELINE_NAME,
    description="Decide again with approvals about a model that a run has measured, and promote it only if allowed.",
)
def promote(
    release: str,
    run: str,
    approvals: str = "[]",
    approvers: str = "{}",
    public_key: str = "",
) -> None:
    """Resume a run that ended at its decision.

    Args:
        release: Address of the former run's release, models:/name/version or a folder.
        run: JSON, evidence store, registered model, alias, and the execution's name or nothing.
        approvals: JSON, texts of signed approvals.
        approvers: JSON, public keys by the name of whose approvals count.
        public_key: PEM, of whoever signed the former release; empty: whom promotion trusts, if anybody.
    """
    records: dict[str, Any] = {"run": run, "execution": dsl.PIPELINE_JOB_ID_PLACEHOLDER}
    last = set_up(report(**records), "report")
    with dsl.ExitHandler(last, name="promote-steps"):
        reopened = set_up(
            reopen_release(release=release, approvers=approvers, public_key=public_key, **records), "reopen_release"
        )
        taken_up = {"former": reopened.outputs["decision"], "reopened": reopened.outputs["evidence"]}
        gate = set_up(gate_promotion(approvals=approvals, approvers=approvers, **taken_up, **records), "gate_promotion")
        made = (reopened.outputs["bundle"], reopened.outputs["onnx"], gate.outputs["decision"])
        publish(*made, records, approvers=approvers)
