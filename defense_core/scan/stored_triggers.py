"""Inverted triggers on disk: what a re-scan tries again on the purified model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from defense_core.config import canonical_json, from_mapping, require
from defense_core.errors import ConfigError, CorruptArtifact
from defense_core.files import write_atomic
from defense_core.scan.base import InvertedTrigger, Observation, TriggerKind
from defense_core.scan.bounded import PARTS

TENSORS, INDEX = "triggers.safetensors", "triggers.json"
MAX_TRIGGERS = 24


@dataclass(frozen=True)
class Entry:
    """One trigger's line in the index.

    Attributes:
        detector: that found it.
        target, kind, sources: as of :class:`defense_core.scan.base.InvertedTrigger`.
    """

    detector: str
    target: int
    kind: TriggerKind
    sources: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        require(self.target >= 0, "target", "a class number", self.target)


def kept_triggers(observations: Sequence[Observation], suspects: Sequence[int]) -> list[tuple[str, InvertedTrigger]]:
    """(detector, trigger) for every suspected class, then for the class that each detector names first."""
    found = []
    for observation in observations:
        wanted = {*suspects, *observation.targets[:1]}
        found += [(observation.detector, each) for each in observation.triggers if each.target in wanted]
    found.sort(key=lambda each: each[1].target not in suspects)
    return found[:MAX_TRIGGERS]


def save_triggers(folder: Path, triggers: Sequence[tuple[str, InvertedTrigger]]) -> None:
    """Write ``triggers.safetensors`` and ``triggers.json`` into ``folder``."""
    entries = [Entry(detector, trigger.target, trigger.kind, trigger.sources) for detector, trigger in triggers]
    write_atomic(folder / TENSORS, safetensors.torch.save(tensors_of([trigger for _, trigger in triggers])))
    write_atomic(folder / INDEX, canonical_json(entries) + b"\n")


def tensors_of(triggers: Sequence[InvertedTrigger]) -> dict[str, Tensor]:
    """All tensors of ``triggers``, float32, named by the trigger's number: what :func:`trigger_from` reads."""
    tensors: dict[str, Tensor] = {}
    for number, trigger in enumerate(triggers):
        tensors[f"{number}.pattern"] = trigger.pattern.float().contiguous()
        if trigger.mask is not None:
            tensors[f"{number}.mask"] = trigger.mask.float().contiguous()
        tensors |= {f"{number}.parts.{name}": part.float().contiguous() for name, part in trigger.parts.items()}
    return tensors


def trigger_from(
    tensors: Mapping[str, Tensor], number: int, *, target: int, kind: TriggerKind, sources: tuple[int, ...]
) -> InvertedTrigger:
    """The trigger of that number.

    Raises:
        KeyError: a tensor is missing.
    """
    return InvertedTrigger(
        target,
        kind,
        tensors[f"{number}.pattern"],
        tensors[f"{number}.mask"] if kind == "patch" else None,
        sources,
        {name: tensors[f"{number}.parts.{name}"] for name in PARTS} if kind == "generated" else {},
    )


def load_triggers(folder: Path) -> list[tuple[str, InvertedTrigger]]:
    """What :func:`save_triggers` wrote.

    Raises:
        CorruptArtifact: a file is missing or damaged.
    """
    try:
        listed: Any = json.loads((folder / INDEX).read_text("utf-8"))
        require(isinstance(listed, list), INDEX, "a list", type(listed).__name__)
        tensors = safetensors.torch.load_file(folder / TENSORS)
        entries = [from_mapping(Entry, each, where=f"triggers[{number}]") for number, each in enumerate(listed)]
        return [
            (
                entry.detector,
                trigger_from(tensors, number, target=entry.target, kind=entry.kind, sources=entry.sources),
            )
            for number, entry in enumerate(entries)
        ]
    except (OSError, ValueError, KeyError, SafetensorError, ConfigError) as error:
        raise CorruptArtifact(
            f"{folder} holds no inverted triggers", expected=f"{INDEX} and {TENSORS} of a scan", got=str(error),
            hint="Scan again",
        ) from error  # fmt: skip
