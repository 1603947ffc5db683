# ruff: noqa: PLR0917
# mypy: disable-error-code="untyped-decorator"
"""KFP component: select."""

from kfp import dsl

from components._runtime.image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def select_model(
    candidates: dsl.Input[list[dsl.Model]],
    methods: list[str],
    run: str,
    execution: str,
    selected: dsl.Output[dsl.Model],
    evidence: dsl.Output[dsl.Artifact],
    mixed: dsl.Input[dsl.Model] = None,
) -> None:
    """Choose the best candidate by a declared rule, blind to attacks.

    Args:
        candidates: What the purifiers left.
        methods: Names of the purifiers, in order of preference.
        run: JSON, where records go and what is promoted.
        execution: Name of the execution where run names none.
        selected: The chosen model.
        evidence: The rule and every candidate's numbers.
        mixed: The mean of what the purifiers left, or an empty result.json where none was asked for.
    """
    from pathlib import Path

    from components._runtime.step import step_scope

    with step_scope("select", run, execution) as scope:
        from components.select_model import step

        made = [Path(each.path) for each in candidates]
        made += step.with_evidence([Path(mixed.path)] if mixed is not None else [])
        chosen = step.select_model(made, Path(selected.path), order=methods)
        selected.metadata["digest"] = chosen["outputs"]["model"]
        scope.finish(chosen, evidence.path)
