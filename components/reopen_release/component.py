# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: reopen."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def reopen_release(
    release: str,
    approvers: str,
    public_key: str,
    run: str,
    execution: str,
    bundle: dsl.Output[dsl.Model],
    onnx: dsl.Output[dsl.Model],
    decision: dsl.Output[dsl.Artifact],
    evidence: dsl.Output[dsl.Artifact],
) -> None:
    """Take up a run that ended at its decision: fetch its release, check it, and hand on what it consists of.

    Args:
        release: Address of the former run's release, models:/name/version or a folder.
        approvers: JSON, public keys of approvers by name.
        public_key: PEM, of whoever signed the former release; empty: whom promotion trusts, if anybody.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        bundle: The model that was chosen.
        onnx: Folder with model.onnx.
        decision: Folder of the former decision and all evidence that was judged.
        evidence: Which decision it is, and whether it was signed.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("reopen", run, execution) as scope:
        from components._runtime import approval_texts, resumption, signing_keys
        from components.reopen_release import step

        given = approval_texts.parse_approvals("[]", approvers)
        request = resumption.Resumption(release, given, public_key)
        paths = (Path(bundle.path), Path(onnx.path), Path(decision.path))
        trusted = signing_keys.trusted_signer_from_environment()
        done, former = step.reopen_release(request, *paths, trusted=trusted, progress=scope.progress)
        for each in former:
            scope.store.put(each)
        scope.finish(done, evidence.path)
