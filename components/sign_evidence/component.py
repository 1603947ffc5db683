# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: sign."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def sign_evidence(
    bundle: dsl.Input[dsl.Model],
    onnx: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Artifact],
    run: str,
    execution: str,
    release: dsl.Output[dsl.Model],
    evidence: dsl.Output[dsl.Artifact],
    policy: str = "",
) -> None:
    """Lay out the version that is to be registered, and sign it. Sees the key, and no registry.

    Args:
        bundle: The chosen model.
        onnx: Folder with model.onnx.
        decision: Folder that the gate wrote.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        release: Exactly the files of the version, with statements and signature.
        evidence: Whether it is signed, and with which key.
        policy: JSON, what must have decided; empty where a former run's policy decides again.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("sign", run, execution) as scope:
        from components._runtime import signing_keys, statements
        from components.sign_evidence import step

        done = step.sign_evidence(
            Path(bundle.path),
            Path(onnx.path),
            Path(decision.path),
            Path(release.path),
            destination=statements.Destination(scope.settings.model_name, scope.settings.alias),
            key=signing_keys.signing_key_from_environment(),
            policy=policy,
        )
        scope.finish(done, evidence.path)
