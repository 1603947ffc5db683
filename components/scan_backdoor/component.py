# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: scan."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def scan_backdoor(
    bundle: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    name: str,
    scan: str,
    policy: str,
    methods: list[str],
    loading: str,
    seed: int,
    device: str,
    run: str,
    execution: str,
    scanned: dsl.Output[dsl.Artifact],
    evidence: dsl.Output[dsl.Artifact],
    earlier: dsl.Input[dsl.Artifact] | None = None,
    reference: dsl.Input[dsl.Model] | None = None,
) -> list[str]:
    """Look for a backdoor: PASS, FAIL or UNKNOWN; only after a PASS, and if the policy allows it, is nothing purified.

    Args:
        bundle: The model to scan.
        data: The run's images; only the clean set is read.
        name: "scan", or "rescan" after purification.
        scan: JSON, settings of the scan.
        policy: JSON, the policy.
        methods: Names of the purifiers that were asked for.
        loading: JSON, limits and trusted modules.
        seed: Seed of the splits.
        device: auto, cpu or cuda.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        scanned: Folder with the inverted triggers and the pictures.
        evidence: Verdict, p-values and every detector's words.
        earlier: Folder of the scan before purification, whose triggers are tried again.
        reference: The model before purification.

    Returns:
        Names of the purifiers to run, or "untouched" where nothing is to be purified.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope(name, run, execution) as scope:
        from components._runtime import inputs
        from components.scan_backdoor import step

        given = inputs.for_scan(data.path, loading, scan)
        done = step.scan_model(
            Path(bundle.path),
            Path(scanned.path),
            name=name,
            clean=given.clean,
            report=given.report,
            config=given.config,
            pool=given.pool,
            earlier=Path(earlier.path) if earlier is not None else None,
            reference=Path(reference.path) if reference is not None else None,
            seed=seed,
            device=device,
            loading=given.loading,
            progress=scope.progress,
        )
        scope.finish(done, evidence.path)
        return step.methods_after(done, methods, policy)
