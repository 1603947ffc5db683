"""Print what an image installs, one requirement a line: ``python3 requirements.py jobs|hooks``.

Reads ``pyproject.toml`` in the working directory; the standard library alone: nothing is installed yet.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

STEPS_ONLY = {
    "torch",
    "torchvision",
    "scipy",
    "pyarrow",
    "pillow",
    "safetensors",
    "fickling",
    "matplotlib",
    "onnx",
    "onnxscript",
    "onnxruntime",
}
"""What only steps import. The hook, its worker and the sweep compute nothing; the sweep does check signatures."""
CLIENTS = {"mlflow": "mlflow-skinny"}
"""The same package without its server and its data libraries."""


def requirements(project: dict[str, object], parts: str) -> list[str]:
    """Requirements of ``jobs`` (every step) or of ``hooks`` (hook, worker, sweep).

    Args:
        project: the table of that name in ``pyproject.toml``.

    Raises:
        ValueError: ``parts`` is neither.
    """
    dependencies = list(project["dependencies"])  # type: ignore[call-overload]
    if parts == "jobs":
        return dependencies
    if parts != "hooks":
        raise ValueError(f"expected jobs or hooks, got {parts!r}")
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    kept = [each for each in dependencies if _name(each) not in STEPS_ONLY]
    return [*(CLIENTS.get(_name(each), _name(each)) + each[len(_name(each)) :] for each in kept), *extras["hooks"]]


def _name(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0]


if __name__ == "__main__":
    asked = sys.argv[1] if len(sys.argv) > 1 else ""
    wanted = requirements(tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"], asked)
    sys.stdout.write("\n".join(wanted) + "\n")
