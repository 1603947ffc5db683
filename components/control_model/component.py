# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: control."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def control_model(
    bundle: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    scan: str,
    policy: str,
    loading: str,
    seed: int,
    device: str,
    run: str,
    execution: str,
    evidence: dsl.Output[dsl.Artifact],
) -> None:
    """Plant a known backdoor into a copy of the model, then scan and purify the copy, if the policy asks for it.

    Args:
        bundle: The fetched model; left as it is.
        data: The run's images; only the clean set is read.
        scan: JSON, settings of the scan.
        policy: JSON, the policy.
        loading: JSON, limits and trusted modules.
        seed: Seed of the splits, the trigger and the methods.
        device: auto, cpu or cuda.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        evidence: Whether the planted backdoor was found, and what purification left of it.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("control", run, execution) as scope:
        from components._runtime import inputs

        require = inputs.requirements(policy)
        if not require.positive_control:
            scope.finish(None, evidence.path)
            return
        from components._runtime.control_store import control_store
        from components.control_model import step

        given = inputs.for_scan(data.path, loading, scan)
        done = step.control_model(
            Path(bundle.path),
            given.clean,
            scan=given.config,
            pool=given.pool,
            report=given.report,
            seed=seed,
            device=device,
            loading=given.loading,
            kept=control_store(scope.settings.controls, max_age_days=require.max_evidence_age_days),
            progress=scope.progress,
        )
        scope.finish(done, evidence.path)
