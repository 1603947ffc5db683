"""What every purifier takes and gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from defense_core.data import Splits
from defense_core.loop import HistoryRow
from defense_core.progress import Progress
from defense_core.task import Task


@dataclass(frozen=True, eq=False)
class Purified:
    """What a purifier hands over.

    Attributes:
        model: the purified network: CPU, float32, eval mode. The input model is untouched.
        history: one row per epoch, ``{"phase", "step", "loss", ...}``, for charts.
        facts: JSON-ready facts that evidence records (chosen hyper-parameters, counts).
    """

    model: nn.Module
    history: tuple[HistoryRow, ...]
    facts: dict[str, Any]


class PurifyFunction(Protocol):
    """Signature of every purifier."""

    def __call__(
        self,
        model: nn.Module,
        clean: Splits,
        config: Any,
        *,
        task: Task,
        seed: int,
        device: torch.device | str,
        progress: Progress,
    ) -> Purified: ...


@dataclass(frozen=True)
class Method:
    """A row of the registry.

    Attributes:
        name: what ``--method`` takes.
        config: frozen dataclass with a default for every field.
        function: the purifier.
        summary: one line for ``--help`` and the docs.
        zero_steps: configuration values with which the method must return an equal model.
        control: true for plain fine-tuning, which the others are compared with, never selected.
        baseline: true for methods of others that stand in the tables and can be asked for by
            name, but are not offered by default.
    """

    name: str
    config: type[Any]
    function: PurifyFunction
    summary: str
    zero_steps: dict[str, Any]
    control: bool = False
    baseline: bool = False
