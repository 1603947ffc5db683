# mypy: disable-error-code="untyped-decorator"
"""KFP component: promote."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def promote_model(
    release: dsl.Input[dsl.Model],
    run: str,
    execution: str,
    evidence: dsl.Output[dsl.Artifact],
    approvers: str = "{}",
) -> None:
    """Register the decided model; move the alias only on allow, quarantine it otherwise.

    Args:
        release: Folder that the sign step wrote; registered exactly as it is.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        evidence: What the registry now says.
        approvers: JSON, public keys by the name of whose approvals count.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("promote", run, execution) as scope:
        from components._runtime import approval_texts, journal, signing_keys
        from components.promote_model import step

        done = step.promote_model(
            Path(release.path),
            name=scope.settings.model_name,
            alias=scope.settings.alias,
            connection=journal.open_connection(),
            trusted=signing_keys.trusted_signer_from_environment(),
            approvers=approval_texts.parse_approvals("[]", approvers).keys(),
        )
        scope.finish(done, evidence.path)
