"""What the pipelines share: how a task is set up, and how a decided model is published."""

from __future__ import annotations

from typing import Any

from kfp import dsl

from components.attest_promotion.component import attest_promotion
from components.promote_model.component import promote_model
from components.sign_evidence.component import sign_evidence
from pipelines.pods import configure


def set_up(task: dsl.PipelineTask, component: str) -> dsl.PipelineTask:
    """``task`` with the pod of its component, never from KFP's cache."""
    # A cached task would leave no record in this run's store, and the registry would not be asked.
    task.set_caching_options(False)
    return configure(task, component)


def publish(
    bundle: Any, onnx: Any, decision: Any, records: dict[str, Any], *, policy: Any = "", approvers: Any = "{}"
) -> None:
    """Sign → promote → attest.

    Args:
        bundle, onnx, decision: outputs of earlier tasks.
        records: the parameters ``run`` and ``execution``.
        policy: JSON, what must have decided; empty where a former run's policy decides again.
        approvers: JSON, public keys by the name of whose approvals count.
    """
    signed = set_up(
        sign_evidence(bundle=bundle, onnx=onnx, decision=decision, policy=policy, **records), "sign_evidence"
    )
    promoted = set_up(promote_model(release=signed.outputs["release"], approvers=approvers, **records), "promote_model")
    set_up(attest_promotion(promoted=promoted.outputs["evidence"], **records), "attest_promotion")
