"""Names that the registry takes: of a model, of an alias, of tags."""

from __future__ import annotations

import re
from collections.abc import Mapping

from defense_core.errors import ConfigError


def require_usable(name: str, alias: str, tags: Mapping[str, str]) -> None:
    """Refuse names that the registry cannot take. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", name):
        raise ConfigError(
            "name of the registered model is not usable",
            expected="1 to 128 letters, digits and . _ -",
            got=repr(name),
            hint="Choose another name",
        )
    reserved = alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias)
    if reserved or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,63}", alias):
        raise ConfigError(
            f"alias {alias!r} is {'reserved by MLflow' if reserved else 'not usable'}",
            expected="letters, digits, _ and -, not 'latest' and not 'v' with a number",
            got=repr(alias),
            hint="Use a name such as champion",
        )
    own = sorted(key for key in tags if key.startswith("quarantine."))
    if own:
        raise ConfigError("tag is reserved", expected="no name under quarantine.", got=", ".join(own), hint="Rename it")
