"""YAML that people write: policies, probes and configurations."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from defense_core.errors import ConfigError

MAX_BYTES = 1 << 20


class _StrictLoader(yaml.SafeLoader):
    """Plain data only, and a repeated key is an error rather than a silent override."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        counted = Counter(key for key in keys if isinstance(key, Hashable))
        repeated = {str(key) for key, count in counted.items() if count > 1}
        if repeated:
            raise yaml.constructor.ConstructorError(
                None, None, f"repeated key {', '.join(sorted(repeated))}", node.start_mark
            )
        return super().construct_mapping(node, deep)


# PyYAML follows YAML 1.1, where 1e-3 is text; in YAML 1.2 and in JSON it is a number.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)

# A day stays text, as in YAML 1.2 and in JSON, so that a policy is the same in both.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _StrictLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> Any:
    """Data from YAML (JSON is YAML). Raises ConfigError naming ``where``, line and column."""
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        # PyYAML's own constructors raise the last two for tags that a value does not fit: `!!bool maybe`.
        raise ConfigError(f"{where} is malformed", expected="YAML or JSON", got=" ".join(str(error).split())) from error


def read_yaml(path: Path) -> Any:
    """Data from a YAML or JSON file.

    Raises:
        ConfigError: absent, larger than 1 MiB, not UTF-8, malformed, or a repeated key.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path} is too large", expected=f"at most {MAX_BYTES} bytes", got=path.stat().st_size)
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read", expected="a YAML file", got=str(error)) from error
    return parse_yaml(text, str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ConfigError."""
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ConfigError(f"{path} is malformed", expected="a mapping with text keys", got=type(content).__name__)
    return content
