# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: gate."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def gate_promotion(
    fetched: dsl.Input[dsl.Artifact],
    before: dsl.Input[dsl.Artifact],
    scanned: dsl.Input[dsl.Artifact],
    rescanned: dsl.Input[dsl.Artifact],
    control: dsl.Input[dsl.Artifact],
    purified: dsl.Input[list[dsl.Artifact]],
    evaluated: dsl.Input[list[dsl.Artifact]],
    selected: dsl.Input[dsl.Artifact],
    exported: dsl.Input[dsl.Artifact],
    policy: str,
    run: str,
    execution: str,
    decision: dsl.Output[dsl.Artifact],
    evidence: dsl.Output[dsl.Artifact],
) -> None:
    """Decide by policy and evidence whether the model may be promoted.

    Args:
        fetched: Evidence of fetch.
        before: Evidence of the evaluation of the fetched model.
        scanned: Evidence of the scan of the fetched model.
        rescanned: Evidence of the scan of the chosen model.
        control: Evidence of the positive control; an empty file where the policy asks for none.
        purified: Evidence of the purifiers.
        evaluated: Evidence of the evaluations of their models.
        selected: Evidence of the choice.
        exported: Evidence of the export.
        policy: JSON, the policy.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        decision: Folder with the decision, the policy and all evidence that was judged.
        evidence: The decision, one finding a rule.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("gate", run, execution) as scope:
        from components._runtime import evidence as files
        from components._runtime import plan
        from components.gate_promotion import step

        given = [fetched, before, scanned, rescanned, control, *purified, *evaluated, selected, exported]
        mappings = [files.read_evidence(path) for each in given if (path := Path(each.path)).stat().st_size]
        named = {str(each["name"]): each for each in mappings}
        done = step.gate_promotion(named, plan.parse_json(policy, "policy"), Path(decision.path))
        scope.finish(done, evidence.path)
