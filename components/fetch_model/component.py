# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: fetch."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def fetch_model(
    model: str,
    clean: str,
    test: str,
    pool: str,
    policy: str,
    spec: str,
    probes: str,
    methods: list[str],
    configs: str,
    scan: str,
    loading: str,
    licence: str,
    seed: int,
    device: str,
    run: str,
    execution: str,
    bundle: dsl.Output[dsl.Model],
    data: dsl.Output[dsl.Dataset],
    evidence: dsl.Output[dsl.Artifact],
) -> None:
    """Fetch the model and its images, pin and check them, and open the run in MLflow.

    Args:
        model: s3://bucket/key[?versionId=...], models:/name/3, file:// or a path.
        clean: Address or path of the clean set, parquet or npz.
        test: The same for the test set; empty: the report split of the clean set is quoted.
        pool: The same for a calibration pool of the scan; empty: the one that comes along for this kind of model.
        policy: JSON, the policy.
        spec: JSON, how to read a bare state dict; {} for a bundle.
        probes: JSON, a list of trigger specifications.
        methods: Names of the purifiers, in order of preference.
        configs: JSON, configuration by method.
        scan: JSON, settings of the backdoor scan.
        loading: JSON, limits, expected digest and trusted modules.
        licence: SPDX expression that is declared for the model; empty: none is.
        seed: Seed of the splits and methods.
        device: auto, cpu or cuda.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        bundle: The checked model.
        data: The checked images and probes.
        evidence: What went in, by digest.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    asked = {
        "model": model,
        "clean": clean,
        "test": test,
        "pool": pool,
        "policy": policy,
        "spec": spec,
        "probes": probes,
        "methods": methods,
        "configs": configs,
        "scan": scan,
        "loading": loading,
        "licence": licence,
        "seed": seed,
        "device": device,
    }
    with step_scope("fetch", run, execution) as scope:
        from components._runtime import journal, plan
        from components.fetch_model import step

        parsed = plan.plan_from_arguments(asked)
        connection = journal.open_connection()
        found = step.fetch_model(parsed, Path(bundle.path), Path(data.path), progress=scope.progress)
        journal.begin(connection, parsed, scope.settings, found)
        bundle.metadata["digest"] = found["outputs"]["model"]
        scope.finish(found, evidence.path)
