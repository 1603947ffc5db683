# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: export."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def export_onnx(
    bundle: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    loading: str,
    seed: int,
    run: str,
    execution: str,
    onnx: dsl.Output[dsl.Model],
    evidence: dsl.Output[dsl.Artifact],
) -> None:
    """Export the chosen model as one ONNX file and compare it with the network.

    Args:
        bundle: The chosen model.
        data: The run's images and probes.
        loading: JSON, limits and trusted modules.
        seed: Seed of the splits.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        onnx: Folder with model.onnx.
        evidence: Digest, opset and parity; FAIL where the file answers differently.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("export", run, execution) as scope:
        from components._runtime import inputs
        from components.export_onnx import step

        given = inputs.for_images(data.path, loading)
        done = step.export_onnx(
            Path(bundle.path),
            Path(onnx.path),
            clean=given.clean,
            test=given.test,
            probes=given.probes,
            loading=given.loading,
            seed=seed,
            progress=scope.progress,
        )
        onnx.metadata["digest"] = done["outputs"]["onnx"]
        scope.finish(done, evidence.path)
