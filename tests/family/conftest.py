"""Networks, clean sets and one planted backdoor for the laws that a whole family obeys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from defense_core.architectures import build
from defense_core.attacks import Probe
from defense_core.data import CleanSet, Splits, split_clean_set
from defense_core.evaluate import evaluate
from defense_core.progress import NullProgress
from defense_core.purify import purify
from defense_core.task import ImageClassification
from pipelines.demo import TASK, DemoInputs
from tests.float32 import in_float32

TINY_TASK = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,))


class NormFree(nn.Module):
    """Convolutions without normalisation, and dropout, which draws random numbers in training."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.linear = nn.Linear(8 * 4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        features = self.conv1(inputs).relu()
        features = self.conv3(self.conv2(features).relu()).relu()
        logits: torch.Tensor = self.linear(self.dropout(features).flatten(1))
        return logits


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "small_cnn": lambda: build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 4}),
    "preact_resnet18": lambda: build("preact_resnet18", {"width": 4, "in_channels": 1, "num_classes": 4}),
    "vit_tiny": lambda: build(
        "vit_tiny",
        {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2, "in_channels": 1, "num_classes": 4},
    ),
    "mlp": lambda: _seeded(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
        )
    ),
    "norm_free": lambda: _seeded(NormFree),
}


def tiny_images(per_class: int, *, seed: int = 0) -> CleanSet:
    """Images whose brightest quarter is their class, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(4 * per_class) % 4
    images = torch.randint(0, 100, (len(labels), 1, 8, 8), generator=generator)
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[row, :, top : top + 4, left : left + 4] += 140
    return CleanSet(images.to(torch.uint8), labels, 4)


class Untouchable:
    """Stands in for the *report* split: no method may so much as look at it."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"a method touched the report split ({name})")

    def __len__(self) -> int:
        raise AssertionError("a method touched the report split (len)")


def tiny_splits(per_class: int = 8, *, seed: int = 0) -> Splits:
    """Fit and select parts; the report part must not be touched."""
    parts = split_clean_set(tiny_images(per_class, seed=seed), seed=seed, report=0.0)
    return Splits(parts.fit, parts.select, Untouchable())  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Planted:
    """A backdoored digits classifier, what a buyer has for cleaning it, and what figures are quoted on."""

    model: nn.Module
    splits: Splits
    test: CleanSet
    probe: Probe

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """(ACC, ASR) on the test images."""
        with in_float32():
            figures = evaluate(model, self.test, task=TASK, probes=(self.probe,), device="cpu").to_results()
        return figures["acc"]["value"], figures["probes"][0]["asr"]["value"]

    def purified(self, name: str, config: Any) -> tuple[float, float]:
        """(ACC, ASR) after the method ``name``."""
        with in_float32():
            result = purify(
                self.model, self.splits, config, method=name, task=TASK, seed=0, device="cpu", progress=NullProgress()
            )
        return self.measure(result.model)


@pytest.fixture(scope="session")
def planted(digits_victim: DemoInputs) -> Planted:
    clean = split_clean_set(digits_victim.clean, seed=0, report=0.0)
    return Planted(digits_victim.model, clean, digits_victim.test, digits_victim.probe)
