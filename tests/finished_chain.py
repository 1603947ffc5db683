"""A finished run, as folders and evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components._runtime.plan import Plan


@dataclass(frozen=True)
class Chain:
    """Folders by what they hold, and evidence by name."""

    plan: Plan
    root: Path
    evidence: dict[str, dict[str, Any]]

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    @property
    def images(self) -> dict[str, Any]:
        return {"clean": self["data"] / "clean.npz", "test": self["data"] / "test.npz", "device": "cpu"}
