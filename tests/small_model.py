"""A tiny classifier of 8x8 digits with everything that a run needs, in files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import nn

from components._runtime.plan import Plan
from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.loop import Tuning, tune
from defense_core.progress import NullProgress
from defense_core.task import ImageClassification

POLICY: dict[str, Any] = {
    "schema": 1,
    "name": "lenient",
    "promote": True,
    "rules": [
        {
            "id": "acc",
            "evidence": "evaluate.selected",
            "value": "acc.value",
            "min": 0.0,
            "severity": "block",
            "why": "Always met.",
        }
    ],
}
DENYING: dict[str, Any] = {
    **POLICY,
    "name": "severe",
    "rules": [{**POLICY["rules"][0], "min": 1.1, "why": "No model is that good."}],
}
DEMANDING: dict[str, Any] = {**POLICY, "require": {"signatures": ["model", "attestations"]}}


@dataclass(frozen=True)
class PlanOptions:
    """How the small model is described."""

    classes: int = 4
    spec: dict[str, Any] = field(
        default_factory=lambda: {
            "architecture": "small_cnn",
            "architecture_args": {"width": 4, "in_channels": 1, "num_classes": 4},
            "input_size": [1, 8, 8],
            "mean": [0.5],
            "std": [0.5],
            "num_classes": 4,
        }
    )
    configs: dict[str, Any] = field(
        default_factory=lambda: {"tsbd": {"epochs": 1, "unlearn_epochs": 1}, "fine_tuning": {"epochs": 1}}
    )

    # A few steps: these tests ask what a scan's evidence does, not what the scan finds.
    scan: dict[str, Any] = field(
        default_factory=lambda: {
            "settings": {
                "margin": {"starts": 1, "steps": 3},
                "additive": {"steps": 2},
                "patch": {"steps": 3},
                "generator": {"steps": 2},
            }
        }
    )

    def network(self) -> nn.Module:
        """The network with fixed random weights."""
        return build(self.spec["architecture"], self.spec["architecture_args"])


PLAN_OPTIONS = PlanOptions()


def images(count: int, seed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Images whose brightest quarter is their class, with noise: (N, 1, 8, 8) uint8 and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % PLAN_OPTIONS.classes
    pixels = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        pixels[row, :, top : top + 4, left : left + 4] += 120
    return pixels.to(torch.uint8).numpy(), labels.numpy()


def save_images(path: Path, count: int, seed: int) -> None:
    """Write such images as npz."""
    pixels, labels = images(count, seed)
    numpy.savez(path, images=pixels, labels=labels)


def learnt(network: nn.Module, number: int = 0) -> nn.Module:
    """``network`` after a few epochs on such images; another one for each number."""
    pixels, labels = images(120, seed=9)
    data = CleanSet(torch.from_numpy(pixels), torch.from_numpy(labels), PLAN_OPTIONS.classes)
    task = ImageClassification((1, 8, 8), PLAN_OPTIONS.classes, mean=(0.5,), std=(0.5,), augment="none")
    tuning = Tuning(epochs=8, batch_size=16, lr=0.05)
    tune(network, data, task=task, tuning=tuning, seed=number, device="cpu", progress=NullProgress(), name="learn")
    return network.eval()


def make_inputs(folder: Path, **changes: Any) -> Plan:
    """Write model, clean set and test set into ``folder``; a plan that uses them."""
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(PLAN_OPTIONS.network().state_dict(), folder / "model.safetensors")
    save_images(folder / "clean.npz", 80, seed=1)
    save_images(folder / "test.npz", 60, seed=2)
    options: dict[str, Any] = {
        "model": str(folder / "model.safetensors"),
        "clean": str(folder / "clean.npz"),
        "test": str(folder / "test.npz"),
        "policy": POLICY,
        "spec": PLAN_OPTIONS.spec,
        "probes": ({"kind": "badnets", "target": 0, "size": 2},),
        "methods": ("tsbd", "fine_tuning"),
        "configs": PLAN_OPTIONS.configs,
        "scan": PLAN_OPTIONS.scan,
        "device": "cpu",
    }
    return Plan(**{**options, **changes})
