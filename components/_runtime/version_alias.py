"""The alias of a promoted version: moved once, and whose it was before stays known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from components._runtime import registry_tags as tag
from components._runtime.mlflow_connection import MlflowConnection
from components._runtime.model_versions import Order
from defense_core.verdict import Verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion


def move_alias(connection: MlflowConnection, version: ModelVersion, order: Order) -> bool:
    """Steps 6 and 7 of a promotion; whether the alias moved.

    A version that says whose the alias was is one whose move had begun: it goes on only where the alias is still
    there. Anywhere else, the move was made, and somebody gave the alias to another version since.
    """
    # As it is now: while the bytes were checked another attempt may have moved the alias.
    version = connection.client.get_model_version(version.name, version.version)
    if not wants_alias(version, order):
        return False
    current = alias_version(connection, order.name, order.alias)
    begun_from = version.tags.get(tag.BEFORE_PREFIX + order.alias)
    if begun_from is None:
        moves = current != str(version.version)
        if moves:
            # First: a run that is killed after the alias moved could not tell any more whose it was.
            connection.client.set_model_version_tag(
                version.name, version.version, tag.BEFORE_PREFIX + order.alias, current or tag.NO_VERSION
            )
    else:
        moves = begun_from == (current or tag.NO_VERSION)
    if moves:
        connection.client.set_registered_model_alias(version.name, order.alias, version.version)
    connection.client.set_model_version_tag(
        version.name, version.version, tag.ALIAS_PREFIX + order.alias, tag.ALIAS_SET
    )
    return moves


def wants_alias(version: ModelVersion, order: Order) -> bool:
    """Only on PASS, and only once for a version: old work never takes the alias back."""
    return order.verdict is Verdict.PASS and version.tags.get(tag.ALIAS_PREFIX + order.alias) != tag.ALIAS_SET


def alias_version(connection: MlflowConnection, name: str, alias: str) -> str | None:
    """The version that has the alias now; ``None`` if none has."""
    found = connection.client.get_registered_model(name).aliases.get(alias)
    return None if found is None else str(found)


def alias_before(connection: MlflowConnection, version: ModelVersion, alias: str) -> str | None:
    """The version that had the alias before ``version`` was given it, as its tag says; ``None`` if none had."""
    before = connection.client.get_model_version(version.name, version.version).tags.get(tag.BEFORE_PREFIX + alias)
    return None if before == tag.NO_VERSION else before
