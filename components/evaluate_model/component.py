# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: evaluate."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def evaluate_model(
    bundle: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    name: str,
    loading: str,
    seed: int,
    device: str,
    run: str,
    execution: str,
    evidence: dsl.Output[dsl.Artifact],
    reference: dsl.Input[dsl.Model] | None = None,
) -> None:
    """Measure clean accuracy, attack success and recovery, with intervals.

    Args:
        bundle: The model to measure.
        data: The run's images and probes.
        name: "before", or the method's name.
        loading: JSON, limits and trusted modules.
        seed: Seed of the splits.
        device: auto, cpu or cuda.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        evidence: The figures; an empty file where there is no candidate to measure.
        reference: The unpurified model, to compare with image by image.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope(f"evaluate.{name}", run, execution) as scope:
        from components._runtime import inputs
        from components.evaluate_model import step

        given = inputs.for_images(data.path, loading)
        before = Path(reference.path) if reference is not None else None
        done = step.evaluate_candidate(
            Path(bundle.path),
            name=name,
            clean=given.clean,
            test=given.test,
            reference=before,
            probes=given.probes,
            loading=given.loading,
            seed=seed,
            device=device,
            progress=scope.progress,
        )
        scope.finish(done, evidence.path)
