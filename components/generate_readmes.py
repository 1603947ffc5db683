"""Write each component's README.md from its KFP signature and its metadata.yaml.

``python -m components.generate_readmes`` writes them; ``--check`` names those that are out of date.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import sys
from pathlib import Path
from typing import Any

import yaml

from defense_core.errors import EXIT_FAIL, EXIT_PASS
from defense_core.files import write_atomic

HERE = Path(__file__).resolve().parent

logger = logging.getLogger("quarantine")


def component_names() -> list[str]:
    """Folders with a ``component.py``, sorted."""
    return sorted(path.parent.name for path in HERE.glob("*/component.py"))


def readme_of(name: str) -> str:
    """The text of one README."""
    metadata = yaml.safe_load((HERE / name / "metadata.yaml").read_text("utf-8"))
    component = getattr(importlib.import_module(f"components.{name}.component"), name)
    spec = component.component_spec
    described = inspect.getdoc(component.python_func) or ""
    summary, _, rest = described.partition("\n\n")
    more = rest.partition("Args:")[0].strip()
    inputs = [
        _row(key, _kind(value), "no" if value.optional else "yes", described)
        for key, value in (spec.inputs or {}).items()
    ]
    outputs = [_row(key, _kind(value), "", described) for key, value in (spec.outputs or {}).items()]
    resources = metadata["resources"]
    parts = [
        f"# {name}",
        summary,
        *([more] if more else []),
        f"Step `{metadata['step']}` · stability: {metadata['stability']}",
        "## Inputs",
        "\n".join(["| name | type | required | what |", "|---|---|---|---|", *inputs]),
        "## Outputs",
        "\n".join(["| name | type | what |", "|---|---|---|", *(row.replace(" |  | ", " | ") for row in outputs)]),
        "## Needs",
        "\n".join(
            [
                f"- heavy imports: {', '.join(metadata['imports']) or 'none'}",
                f"- reaches: {', '.join(metadata['reaches'])}",
                f"- cpu: {resources['cpu_request']} requested",
                f"- memory: {resources['memory_request']} requested, {resources['memory_limit']} at most",
            ]
        ),
        f"The work itself is `components.{name}.step`, which runs without KFP too.",
        "<!-- Written by components/generate_readmes.py from component.py and metadata.yaml. -->",
    ]
    return "\n\n".join(parts) + "\n"


def outdated() -> list[str]:
    """Components whose README.md is not what :func:`readme_of` gives."""
    paths = {name: HERE / name / "README.md" for name in component_names()}
    return [name for name, path in paths.items() if not path.is_file() or path.read_text("utf-8") != readme_of(name)]


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 where ``--check`` finds one out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    stale = outdated()
    for name in stale:
        if not chosen.check:
            write_atomic(HERE / name / "README.md", readme_of(name).encode())
        logger.info("%s %s/README.md", "out of date:" if chosen.check else "wrote", name)
    return EXIT_FAIL if stale and chosen.check else EXIT_PASS


def _kind(value: Any) -> str:
    kind = str(value.type).removeprefix("system.").split("@")[0]
    return f"list of {kind}" if getattr(value, "is_artifact_list", False) else kind


def _row(name: str, kind: str, required: str, described: str) -> str:
    lines = [line.strip() for line in described.splitlines()]
    what = next((line.partition(": ")[2] for line in lines if line.startswith(f"{name}: ")), "")
    return f"| `{name}` | {kind} | {required} | {what.replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    sys.exit(main())
