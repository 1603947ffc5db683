# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: purify with one method."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def purify_model(
    bundle: dsl.Input[dsl.Model],
    data: dsl.Input[dsl.Dataset],
    method: str,
    configs: str,
    loading: str,
    seed: int,
    device: str,
    run: str,
    execution: str,
    purified: dsl.Output[dsl.Model],
    evidence: dsl.Output[dsl.Artifact],
    made: dsl.Input[list[dsl.Model]] = None,
    methods: list[str] = [],  # noqa: B006 - KFP reads the default, nothing changes it
) -> None:
    """Purify the model with one method, on clean images only.

    A method that diverges ends with the verdict UNKNOWN and without a model; the others go on.
    A pod that is killed goes on from its last checkpoint when it is started again.

    Args:
        bundle: The fetched model.
        data: The run's images and probes; only the clean set is read.
        method: Name of the purifier.
        configs: JSON, configuration by method.
        loading: JSON, limits and trusted modules.
        seed: Seed of the splits and the method.
        device: auto, cpu or cuda.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        purified: The purified model, with result.json.
        evidence: The method's configuration, facts and history; an empty file where there is nothing to mix.
        made: What the purifiers of the run left, for a method that averages them; left out, it runs by itself.
        methods: With made: names of the purifiers that were asked for.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope(f"purify.{method}", run, execution) as scope:
        from components._runtime import inputs
        from components._runtime.checkpoint_store import step_checkpoints
        from components.purify_model import step

        checkpoints = step_checkpoints(scope.settings.evidence)
        given = inputs.for_method(data.path, loading, configs, method)
        done = step.purify_candidate(
            Path(bundle.path),
            given.clean,
            Path(purified.path),
            method=method,
            config=given.config,
            report=given.report,
            loading=given.loading,
            seed=seed,
            device=device,
            progress=scope.progress,
            checkpoints=checkpoints.of_work,
            made=[Path(each.path) for each in made or ()],
            methods=methods,
        )
        purified.metadata["digest"] = step.digest_of(done)
        scope.finish(done, evidence.path)
        checkpoints.clear()
