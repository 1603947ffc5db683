"""Models that MLflow takes for prompts: a tag keeps them, or all their versions, out of every search.

Any writer of the registry can set that tag on a model, or on one version of it, and the model still loads by
its alias. A prompt that MLflow made has the tag itself, so has each of its versions, and none of these has files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.registered_decisions import read_version
from defense_core.errors import RegistryConflict

PROMPT_TAG = "mlflow.prompt.is_prompt"
PROMPT_SOURCE = "prompt-template"
"""What MLflow registers in place of an address of files."""
HIDDEN = f"MLflow takes it for a prompt and lists none of its versions: take away the tag {PROMPT_TAG}."
"""What to say of a model that :func:`taken_for_prompts` names."""
_PROMPTS = f"tags.`{PROMPT_TAG}` = 'true'"
_PAGE = 200


def taken_for_prompts(connection: MlflowConnection) -> list[str]:
    """Names of the models that MLflow's searches leave out, or show without versions, and that are no prompts.

    Raises:
        RegistryUnavailable, AccessDenied: MLflow does not answer.
    """
    models = {model.name: model for model in _found(connection, connection.client.search_registered_models)}
    tagged: dict[str, dict[int, str]] = defaultdict(dict)
    for version in _found(connection, connection.client.search_model_versions):
        tagged[version.name][int(version.version)] = version.source or ""
    return sorted(
        name
        for name in {*models, *tagged}
        if name not in models
        or any(source != PROMPT_SOURCE for source in tagged[name].values())
        or any(_is_there(connection, name, number) for number in _untagged(models[name], tagged[name]))
    )


def require_versions_shown(connection: MlflowConnection, name: str) -> None:
    """Refuse a model whose versions MLflow's searches leave out, because one of them is tagged as a prompt.

    Raises:
        RegistryConflict: what was decided about this work before could not be found.
    """
    tagged = connection.client.search_model_versions(f"name = '{name}' and {_PROMPTS}", max_results=1)
    if tagged:
        raise RegistryConflict(
            f"the versions of models:/{name} cannot be searched",
            expected=f"no version with the tag {PROMPT_TAG}",
            got=f"version {tagged[0].version}, which has it, so that MLflow takes the model for a prompt",
            hint="Find out who set the tag, take it away and run again",
        )


def _untagged(model: Any, tagged: dict[int, str]) -> Iterator[int]:
    """Numbers of ``model`` that no tagged version has: those of other versions, and of deleted ones."""
    last = max((int(version.version) for version in model.latest_versions or ()), default=0)
    yield from (number for number in range(1, last + 1) if number not in tagged)


def _is_there(connection: MlflowConnection, name: str, number: int) -> bool:
    return read_version(connection, name, number) is not None


def _found(connection: MlflowConnection, search: Callable[..., Any]) -> Iterator[Any]:
    token: str | None = None
    while True:
        with mlflow_errors("look for models that are taken for prompts", connection.settings):
            page = search(filter_string=_PROMPTS, max_results=_PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return
