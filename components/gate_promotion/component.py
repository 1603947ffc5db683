# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: gate."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate_promotion(
    run: str,
    execution: str,
    decision: dsl.Output[dsl.Artifact],
    evidence: dsl.Output[dsl.Artifact],
    fetched: dsl.Input[dsl.Artifact] = None,
    before: dsl.Input[dsl.Artifact] = None,
    scanned: dsl.Input[dsl.Artifact] = None,
    rescanned: dsl.Input[dsl.Artifact] = None,
    control: dsl.Input[dsl.Artifact] = None,
    purified: dsl.Input[list[dsl.Artifact]] = None,
    evaluated: dsl.Input[list[dsl.Artifact]] = None,
    mixed: dsl.Input[dsl.Artifact] = None,
    mixed_evaluated: dsl.Input[dsl.Artifact] = None,
    selected: dsl.Input[dsl.Artifact] = None,
    exported: dsl.Input[dsl.Artifact] = None,
    policy: str = "",
    former: dsl.Input[dsl.Artifact] = None,
    approvals: str = "[]",
    approvers: str = "{}",
    reopened: dsl.Input[dsl.Artifact] = None,
) -> None:
    """Decide by policy and evidence whether the model may be promoted.

    A whole run gives the evidence of each step and the policy; a promote run gives the former decision instead.

    Args:
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        decision: Folder with the decision, the policy and all evidence that was judged.
        evidence: The decision, one finding a rule.
        fetched: Evidence of fetch.
        before: Evidence of the evaluation of the fetched model.
        scanned: Evidence of the scan of the fetched model.
        rescanned: Evidence of the scan of the chosen model.
        control: Evidence of the positive control; an empty file where the policy asks for none.
        purified: Evidence of the purifiers.
        evaluated: Evidence of the evaluations of their models.
        mixed: Evidence of their mean; an empty file where none was asked for.
        mixed_evaluated: Evidence of the evaluation of the mean; an empty file where there is none.
        selected: Evidence of the choice.
        exported: Evidence of the export.
        policy: JSON, the policy.
        former: Folder of a decision that the new one takes the place of; brings its own evidence and policy.
        approvals: JSON, texts of signed approvals.
        approvers: JSON, public keys by the name of whose approvals count.
        reopened: Evidence of the reopening, which says when a promote run began.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("gate", run, execution) as scope:
        from components._runtime import approval_texts
        from components.gate_promotion import step

        single = [fetched, before, scanned, rescanned, selected, exported, *(purified or ()), *(evaluated or ())]
        done = step.decide_given(
            [Path(each.path) for each in single if each is not None],
            policy,
            Path(decision.path),
            optional=[Path(each.path) for each in (control, mixed, mixed_evaluated) if each is not None],
            former=Path(former.path) if former is not None else None,
            approvals=approval_texts.parse_approvals(approvals, approvers).signed(),
            earlier=scope.store.earlier(scope.name),
            reopened=Path(reopened.path) if reopened is not None else None,
        )
        scope.finish(done, evidence.path)
