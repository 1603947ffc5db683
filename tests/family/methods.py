"""How a test runs a purifier: at settings that take a moment, on a small network, and what to compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.config import to_mapping
from defense_core.data import Splits
from defense_core.progress import NullProgress, Progress
from defense_core.purify import METHODS, Purified, purify
from tests.family.conftest import NETWORKS, TINY_TASK, tiny_splits

# A method is run at these settings where it has fields of these names, so that each law takes a moment.
CHEAP: dict[str, Any] = {
    "epochs": 1,
    "min_steps": 0,
    "unlearn_epochs": 2,
    "batch_size": 8,
    "lr_grid": (0.01, 0.02),
    "n_grid": (0.05, 0.1),
    "max_drop": 0.4,  # so few images are to let a search go on from its weakest candidate
}
# And at these besides, method by method.
CHEAP_BY_METHOD: dict[str, dict[str, Any]] = {"anp": {"lr": 50.0, "threshold": 0.8}}
# A rate at which no float32 network survives a step.
ABSURD: dict[str, Any] = {"lr": 1e38, "taught_lr": 1e38}
"""Every rate: where a method may do without one of its trainings, one that diverges is merely not taken."""
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

every_method = pytest.mark.parametrize("name", METHODS)
every_network = pytest.mark.parametrize("network", NETWORKS)


def fields_of(name: str) -> set[str]:
    return {field.name for field in dataclasses.fields(METHODS[name].config)}


def cheap(name: str, **changes: Any) -> Any:
    """The method's config at cheap settings, with ``changes`` where it, or its members, have such fields."""
    wanted = {**CHEAP, **CHEAP_BY_METHOD.get(name, {}), **changes}
    if name == "soup" and wanted.get("members") != ():
        wanted["configs"] = {each: to_mapping(cheap(each, **changes)) for each in METHODS["soup"].config().members}
    return METHODS[name].config(**{key: value for key, value in wanted.items() if key in fields_of(name)})


def run(
    name: str,
    model: nn.Module,
    splits: Splits | None = None,
    config: Any = None,
    *,
    task: Any = TINY_TASK,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = NullProgress(),
) -> Purified:
    return purify(
        model,
        splits or tiny_splits(),
        config or cheap(name),
        method=name,
        task=task,
        seed=seed,
        device=device,
        progress=progress,
    )


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether names, shapes and every bit agree."""
    return one.keys() == other.keys() and all(
        value.dtype == other[name].dtype
        and value.shape == other[name].shape
        and value.cpu().contiguous().numpy().tobytes() == other[name].cpu().contiguous().numpy().tobytes()
        for name, value in one.items()
    )


def methods_with(field: str) -> list[str]:
    found = [name for name in METHODS if field in fields_of(name)]
    assert found, f"no method has {field}: what is asked of those that have it would pass unseen"
    return found
