# mypy: disable-error-code="untyped-decorator"
"""KFP component: report, the exit handler."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def report(
    run: str,
    execution: str,
    status: dsl.PipelineTaskFinalStatus,
    page: dsl.Output[dsl.HTML],
) -> None:
    """Collect every record of the run into one page, whatever failed, and close the run in MLflow.

    Args:
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        status: How the orchestrator says that the run ended.
        page: The report.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("report", run, execution) as scope:
        from components.report import step

        said = status.error_message if status is not None and status.error_message else ""
        step.report_run(scope.settings, scope.store, Path(page.path), orchestrator_message=said)
