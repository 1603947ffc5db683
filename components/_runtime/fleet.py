"""The fleet's versions, read from folders of evidence or from the MLflow registry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components._runtime import registry_tags as tag
from components._runtime.decision_files import DecisionFolder, replay_decision
from components._runtime.evidence import DECISION, FAILED
from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from components._runtime.registered_decisions import UNREADABLE, registered_decision
from components._runtime.registry_prompts import HIDDEN, taken_for_prompts
from components._runtime.small_files import read_small
from components._runtime.store import open_store
from defense_core.errors import AccessDenied, EvidenceMismatch, EvidenceMissing
from defense_core.report import Report, build_report
from defense_core.report_fleet import FleetVersion, version_of_report, version_without_evidence
from defense_core.report_text import at, text

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

MALFORMED = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""What evidence of a shape that no step writes may make of the code that reads it: a defect, and of one version."""
MAX_DEPTH = 4
PAGE_VERSIONS = 200


def report_of_folder(folder: Path) -> Report:
    """The report of what lies in ``folder``: a run's records, or the evidence of a release with its decision.

    Raises:
        EvidenceMissing: it holds no record of any step.
        EvidenceMismatch, PolicyError: it holds a decision that its policy and evidence do not give.
        AccessDenied: this account may not read the folder or a file in it.
    """
    folder = Path(folder)
    with _readable(folder):
        if (folder / DECISION).is_file():
            return _decided_report(replay_decision(folder))
        records = open_store(str(folder.absolute().parent), folder.absolute().name).records()
    if not (records.evidence or records.failures or records.damaged):
        raise EvidenceMissing(
            f"no evidence in {folder}", expected="<step>.json files", got="none", hint="Name the run's evidence folder"
        )
    damaged = [{"name": file, "error": "EvidenceMismatch", "message": why} for file, why in records.damaged.items()]
    return build_report(records.evidence, failures=[*records.failures.values(), *damaged])


def folder_versions(root: Path) -> list[FleetVersion]:
    """One row for every folder of evidence at or below ``root``.

    An alias belongs to the version that the newest promotion of that model says; where it points now,
    only the registry knows.

    Raises:
        EvidenceMissing: there is no evidence anywhere below ``root``.
        AccessDenied: this account may not read a folder or file there; a page without it would not be whole.
    """
    with _readable(Path(root)):
        rows = [_folder_version(folder) for folder in _evidence_folders(Path(root), MAX_DEPTH)]
    if not rows:
        raise EvidenceMissing(
            f"no evidence below {root}", expected="folders of <step>.json files", got="none", hint="Check --evidence"
        )
    newest: dict[tuple[str, str], _Placed] = {}
    for row in rows:
        if row.alias and row.started >= newest.get((row.version.model, row.alias), row).started:
            newest[row.version.model, row.alias] = row
    aliases: dict[tuple[str, str], list[str]] = {}
    for (model, alias), row in newest.items():
        aliases.setdefault((model, row.alias_version), []).append(alias)
    return [
        replace(row.version, aliases=tuple(sorted(aliases.get((row.version.model, row.version.version), ()))))
        if row.version.version
        else row.version
        for row in rows
    ]


def registry_versions(connection: MlflowConnection, names: Sequence[str] = ()) -> list[FleetVersion]:
    """One row for every version of every registered model, or of those called ``names``.

    Only the evidence of a version is downloaded; its decision is made again from it, and the
    version's tags are compared with it. A model that MLflow takes for a prompt is one row that says so.

    Raises:
        RegistryUnavailable, AccessDenied: MLflow does not answer.
        SourceNotFound: there is no model of such a name.
    """
    with mlflow_errors("list the registered models", connection.settings):
        hidden = [name for name in taken_for_prompts(connection) if not names or name in names]
        models = (
            [connection.client.get_registered_model(name) for name in names if name not in hidden]
            if names
            else list(_models(connection))
        )
        rows = [
            _registered_version(connection, version, dict(model.aliases))
            for model in models
            for version in _versions(connection, model.name)
        ]
    return [*rows, *(_hidden(name) for name in hidden)]


# -- folders ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placed:
    """A row, and what its promotion said of the alias.

    Attributes:
        started: when the promotion began; a run may have waited for it longer than a later one.
    """

    version: FleetVersion
    started: str
    alias: str = ""
    alias_version: str = ""


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Files that this account may not read, as a typed error."""
    try:
        yield
    except PermissionError as error:
        raise AccessDenied(
            f"{error.filename or folder} cannot be read",
            expected="evidence that this account may read",
            got=error.strerror,
            hint="Give this account permission to read the folder and the files in it",
        ) from error


def _evidence_folders(folder: Path, depth: int) -> Iterator[Path]:
    """Folders that hold records of a run, by name; what lies below one of them belongs to it."""
    if any((folder / name).is_file() for name in ("fetch.json", DECISION, f"fetch{FAILED}")):
        yield folder
    elif depth and folder.is_dir():
        for below in sorted(folder.iterdir()):
            if below.is_dir() and not below.is_symlink():
                yield from _evidence_folders(below, depth - 1)


def _folder_version(folder: Path) -> _Placed:
    try:
        report = report_of_folder(folder)
    except UNREADABLE as error:
        return _unjudged(folder, str(error))
    except MALFORMED as error:
        return _unjudged(folder, _malformed(error))
    promoted = _promoted(folder)
    promotion = at(promoted, "results")
    origin = next((fact.value for fact in report.came_in if fact.label == "Address"), "")
    name = text(at(promotion, "name"), 128) or origin.split("?")[0].rstrip("/").rpartition("/")[2] or folder.name
    row = version_of_report(report, model=name, version=text(at(promotion, "version"), 40))
    alias_version = text(at(promotion, "alias_version"), 40)
    started = text(at(promoted, "environment", "started"), 40)
    return _Placed(row, started, text(at(promotion, "alias"), 80) if alias_version else "", alias_version)


def _promoted(folder: Path) -> Any:
    """What promote.json holds; ``None`` where there is none."""
    path = folder / "promote.json"
    try:
        return json.loads(read_small(path)) if path.is_file() else None
    except (ValueError, RecursionError, EvidenceMismatch):
        return None  # the report names the damaged file


def _decided_report(replayed: DecisionFolder) -> Report:
    return build_report(replayed.evidence, decision=json.loads(replayed.decision.to_json()))


# -- registry --------------------------------------------------------------------------


def _models(connection: MlflowConnection) -> Iterator[Any]:
    token: str | None = None
    while True:
        page = connection.client.search_registered_models(max_results=PAGE_VERSIONS, page_token=token)
        # A search does not give the aliases; a look at each does.
        yield from (connection.client.get_registered_model(model.name) for model in page)
        token = page.token
        if not token:
            return


def _hidden(name: str) -> FleetVersion:
    row = version_without_evidence(name, "", aliases=(), problem=HIDDEN)
    return replace(row, problems=(HIDDEN,))  # its aliases cannot be read either


def _versions(connection: MlflowConnection, name: str) -> Iterator[ModelVersion]:
    # MLflow's filters have no way to write a quote: such a model is picked out of all versions.
    wanted = None if "'" in name else f"name = '{name}'"
    token: str | None = None
    while True:
        page = connection.client.search_model_versions(wanted, max_results=PAGE_VERSIONS, page_token=token)
        yield from (version for version in page if version.name == name)
        token = page.token
        if not token:
            return


def _registered_version(
    connection: MlflowConnection, version: ModelVersion, aliases: Mapping[str, Any]
) -> FleetVersion:
    number = str(version.version)
    own = [alias for alias, target in aliases.items() if str(target) == number]
    if tag.DECISION not in version.tags:
        return version_without_evidence(version.name, number, aliases=own, problem="It never went through quarantine.")
    try:
        found = registered_decision(connection, version)
        report = _decided_report(found.folder)
    except UNREADABLE as error:
        return version_without_evidence(version.name, number, aliases=own, problem=str(error), decided=True)
    except MALFORMED as error:
        problem = _malformed(error)
        return version_without_evidence(version.name, number, aliases=own, problem=problem, decided=True)
    return version_of_report(report, model=version.name, version=number, aliases=own, problems=found.problems)


def _unjudged(folder: Path, problem: str) -> _Placed:
    """The row of a folder that no report can be made of."""
    decided = (folder / DECISION).is_file()
    return _Placed(version_without_evidence(folder.name, "", aliases=(), problem=problem, decided=decided), "")


def _malformed(error: Exception) -> str:
    return f"Its evidence cannot be judged: {type(error).__name__}: {error}"[:500]
