"""All registered models and their versions, page by page, as far as a sweep needs them.

Versions are listed by key, not by offset: each page begins after the last number of the page before,
so a version that is deleted meanwhile makes no other one fall between two pages.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection, mlflow_errors
from defense_core.errors import ConfigError, SourceNotFound
from defense_core.policy_time import SKEW_S, parse_time

PAGE_MODELS = 200
PAGE_VERSIONS = 500
MAX_GROUP, MAX_GROUP_CHARS = 50, 2000
READY = "READY"
OWN_TAGS = (tag.DECISION, tag.IDENTITY, tag.SOURCE_DIGEST, tag.FILES_DIGEST)
"""Set by the request that registers a version; see :mod:`components._runtime.model_versions`."""


@dataclass(frozen=True)
class ListedModel:
    """A registered model.

    Attributes:
        updated_ms: last change of the model or creation or deletion of a version, unix milliseconds. Tags
            of versions do not change it.
        aliases: version number by alias.
    """

    name: str
    updated_ms: int
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """A version that a decision is about.

    Attributes:
        since_ms: when its decision was there, unix milliseconds: a later version of this name and number is another.
    """

    model: str
    version: int
    since_ms: int


@dataclass(frozen=True)
class ListedVersion:
    """A version, as the registry says; its tags are hints.

    Attributes:
        creation_timestamp: unix milliseconds.
        ready: whether it is registered; otherwise that is under way, or failed.
        decision: ``pending``, ``allow``, ``quarantined``; empty where the tags of a version that this project
            registered are not all there.
        reason: why it is quarantined, or empty.
        policy_digest: of the policy that decided; empty on versions of earlier releases.
        decided_at: ISO 8601, or empty.
        origins: the version that it was made from, if that is known, and others with the same bytes.
        artifact: digest of what was fetched, or empty.
        superseded_by: the version with the later decision, or empty.
    """

    model: str
    version: int
    source: str
    run_id: str
    creation_timestamp: int
    ready: bool
    decision: str
    reason: str
    policy_digest: str
    decided_at: str
    origins: tuple[Origin, ...]
    artifact: str
    superseded_by: str


def list_models(connection: MlflowConnection, names: Sequence[str] = ()) -> Iterator[ListedModel]:
    """Every registered model by name, or those called ``names``.

    Raises:
        SourceNotFound: there is no model of such a name.
        RegistryUnavailable, AccessDenied: MLflow does not answer.
    """
    for name in dict.fromkeys(names):
        with mlflow_errors(f"look up the registered model {name}", connection.settings):
            found = connection.client.get_registered_model(name)
        yield _model(found)
    if names:
        return
    token: str | None = None
    while True:
        with mlflow_errors("list the registered models", connection.settings):
            page = connection.client.search_registered_models(
                max_results=PAGE_MODELS, order_by=["name ASC"], page_token=token
            )
        yield from (_model(found) for found in page)
        token = page.token
        if not token:
            return


def list_versions(connection: MlflowConnection, names: Sequence[str]) -> Iterator[tuple[str, Iterator[ListedVersion]]]:
    """The versions of each of ``names``, lowest number first. Raises as :func:`list_models`.

    Small models are asked for together: a request a model is what a listing takes its time for.
    """
    # In a list of names MLflow reads a backslash as Python does: 'a\tb' would be another model.
    plain = [name for name in names if not {"'", "\\"} & set(name) and len(name) <= MAX_GROUP_CHARS]
    alone = [name for name in names if name not in set(plain)]
    waiting, size = deque(plain), MAX_GROUP
    while waiting:
        group = _next_group(waiting, size)
        found = _together(connection, group) if len(group) > 1 else None
        if found is not None:
            yield from ((name, iter(found[name])) for name in group)
        elif len(group) > 1:
            size = len(group) // 2  # they did not fit into a page, and their neighbours will not either
            waiting.extendleft(reversed(group))
        else:
            yield group[0], _versions(connection, group[0])
            size = min(MAX_GROUP, size * 2)
    yield from ((name, _versions(connection, name)) for name in alone)


def _next_group(waiting: deque[str], size: int) -> list[str]:
    """Up to ``size`` names that fit into one address, taken from ``waiting``."""
    group = [waiting.popleft()]
    while waiting and len(group) < size and sum(map(len, group)) + len(waiting[0]) <= MAX_GROUP_CHARS:
        group.append(waiting.popleft())
    return group


def _together(connection: MlflowConnection, names: Sequence[str]) -> dict[str, list[ListedVersion]] | None:
    """All versions of ``names`` in one page; ``None``: they do not fit, or this MLflow cannot be asked so."""
    quoted = ", ".join(f"'{name}'" for name in names)
    try:
        with mlflow_errors(f"list the versions of {len(names)} models", connection.settings):
            page = connection.client.search_model_versions(
                f"name IN ({quoted})", max_results=PAGE_VERSIONS, order_by=["name ASC", "version_number ASC"]
            )
    except ConfigError:
        return None
    if page.token:
        return None
    found: dict[str, list[ListedVersion]] = {name: [] for name in names}
    for version in page:
        if version.name in found:
            found[version.name].append(listed(version))
    return found


def _versions(connection: MlflowConnection, name: str) -> Iterator[ListedVersion]:
    last = 0
    while True:
        with mlflow_errors(f"list the versions of {name}", connection.settings):
            page = connection.client.search_model_versions(
                f"{_called(name)} and version_number > {last}",
                max_results=PAGE_VERSIONS,
                order_by=["version_number ASC"],
            )
        # MLflow compares names as its database does, which may ignore case.
        yield from (listed(version) for version in page if version.name == name)
        if not page.token:
            return
        last = max(int(version.version) for version in page)


def _called(name: str) -> str:
    """The condition that a model is called ``name``. MLflow knows no escapes but those of a list."""
    quote = next((each for each in ("'", '"') if each not in name), None)
    if quote is not None:
        return f"name = {quote}{name}{quote}"
    return "name IN ('" + re.sub(r"[\\'\"]", lambda found: f"\\x{ord(found[0]):02x}", name) + "')"


def get_aliases(connection: MlflowConnection, name: str) -> Mapping[str, str]:
    """The model's aliases as they are now; none where the model is gone."""
    try:
        with mlflow_errors(f"look up the registered model {name}", connection.settings):
            return _model(connection.client.get_registered_model(name)).aliases
    except SourceNotFound:
        return {}


def listed(version: Any) -> ListedVersion:
    """What a sweep needs of MLflow's ``ModelVersion``."""
    tags, created_ms = dict(version.tags), int(version.creation_timestamp or 0)
    return ListedVersion(
        model=version.name,
        version=int(version.version),
        source=version.source or "",
        run_id=version.run_id or "",
        creation_timestamp=created_ms,
        ready=str(version.status or READY) == READY,
        decision=tags.get(tag.DECISION, "") if all(tags.get(name) for name in OWN_TAGS) else "",
        reason=tags.get(tag.REASON, ""),
        policy_digest=tags.get(tag.POLICY_DIGEST, ""),
        decided_at=tags.get(tag.DECIDED_AT, ""),
        origins=tuple(_origins(tags, created_ms)),
        artifact=tags.get(tag.SOURCE_DIGEST, ""),
        superseded_by=tags.get(tag.SUPERSEDED_BY, ""),
    )


def parse_origin(uri: str) -> tuple[str, int]:
    """Name and number in ``models:/name/version``; ``("", 0)`` for anything else."""
    match = re.fullmatch(r"models:/([^/@:]{1,250})/([0-9]{1,9})", uri)
    return (match[1], int(match[2])) if match else ("", 0)


def _origins(tags: Mapping[str, str], created_ms: int) -> Iterator[Origin]:
    name, number = parse_origin(tags.get(tag.ORIGIN, ""))
    if name:
        yield Origin(name, number, created_ms)
    for key, value in tags.items():
        if key.startswith(tag.ORIGIN_PREFIX):
            address, _, at = value.rpartition(" ")
            name, number = parse_origin(address)
            since = _milliseconds(at)
            if name and since is not None:
                yield Origin(name, number, since)


def _milliseconds(at: str) -> int | None:
    """A time as unix milliseconds, the farthest that clocks may differ later; a tag that is no time says nothing."""
    try:
        return int((parse_time(at, "time").timestamp() + SKEW_S) * 1000)
    except ConfigError:
        return None


def _model(found: Any) -> ListedModel:
    aliases = {str(alias): str(number) for alias, number in dict(found.aliases or {}).items()}
    return ListedModel(found.name, int(found.last_updated_timestamp or 0), aliases)
