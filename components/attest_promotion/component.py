# mypy: disable-error-code="untyped-decorator"
"""KFP component: attest."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def attest_promotion(
    promoted: dsl.Input[dsl.Artifact],
    run: str,
    execution: str,
    evidence: dsl.Output[dsl.Artifact],
) -> None:
    """State what was promoted to where, signed, beside the release. Sees the key, and no registry.

    Args:
        promoted: Evidence of promote.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        evidence: Whether it is signed, and with which key.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("attest", run, execution) as scope:
        from components._runtime import evidence as files
        from components._runtime import signing_keys
        from components.attest_promotion import step

        key = signing_keys.signing_key_from_environment()
        done, statement = step.attest_promotion(files.read_evidence(Path(promoted.path)), key)
        if key is not None and statement is not None:
            step.keep_statement(scope.store.shelf, statement, key)
        scope.finish(done, evidence.path)
