"""How large a network's tensors are, told without running it; and that too large ones are refused before it runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core import bundle
from defense_core.activations import largest_tensor_bytes, surely_small
from defense_core.architectures import outline
from defense_core.bundle import LoadLimits, untrained_bundle
from defense_core.errors import ArtifactTooLarge

SPEC: dict[str, Any] = {"mean": [0.5], "std": [0.5], "input_size": [1, 32, 32]}


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("preact_resnet18", {"width": 8, "in_channels": 1}, 8 * 32 * 32 * 4),
        ("vit_tiny", {"patch_size": 1, "depth": 1, "in_channels": 1}, 3 * 1025 * 1025 * 4),
    ],
)
def test_the_largest_output_and_the_weights_of_attention_count(
    name: str, arguments: dict[str, Any], expected: int
) -> None:
    network = outline(name, arguments)
    assert network is not None
    assert largest_tensor_bytes(network, (1, 32, 32)) == expected
    assert surely_small(network, (1, 32, 32), 1 << 30)
    assert not surely_small(network, (1, 32, 32), expected)


def test_a_network_that_makes_too_large_tensors_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {**SPEC, "architecture": "vit_tiny"}
    spec["architecture_args"] = {"patch_size": 1, "depth": 1, "in_channels": 1}
    untrained_bundle(spec)
    limits = LoadLimits(max_activation_bytes=1 << 20)
    monkeypatch.setattr(bundle, "build", None)
    with pytest.raises(ArtifactTooLarge, match="too large tensors"):
        untrained_bundle(spec, limits=limits)
    assert dataclasses.replace(limits, max_activation_bytes=4 << 30) == LoadLimits()


def test_a_network_that_does_not_run_without_values_goes_on_as_before() -> None:
    class Peeking(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images if images.sum().item() > 0 else -images

    with torch.device("meta"):
        assert largest_tensor_bytes(Peeking(), (1, 8, 8)) is None
