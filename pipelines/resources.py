"""What each component says of itself in the ``metadata.yaml`` beside it: resources, and what it reaches."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

COMPONENTS = Path(__file__).resolve().parent.parent / "components"


@cache
def component_names() -> tuple[str, ...]:
    """Every component, by the name of its folder."""
    return tuple(sorted(path.parent.name for path in COMPONENTS.glob("*/metadata.yaml")))


def metadata_of(component: str) -> dict[str, Any]:
    """``metadata.yaml`` of a component: name, stability, description, resources."""
    metadata: dict[str, Any] = yaml.safe_load((COMPONENTS / component / "metadata.yaml").read_text("utf-8"))
    return metadata
