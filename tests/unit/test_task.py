"""Image classification: normalisation, loss, prediction and what its settings refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from defense_core.errors import ConfigError
from defense_core.task import ImageClassification

TASK = ImageClassification((3, 4, 4), 5, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))


def test_inputs_are_normalised_channel_by_channel() -> None:
    images = torch.randint(0, 256, (6, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    got = TASK.inputs(images)
    assert (got.dtype, got.shape) == (torch.float32, images.shape)
    for channel in range(3):
        for row in range(6):
            pixel = int(images[row, channel, 1, 2]) / 255
            expected = (pixel - TASK.mean[channel]) / TASK.std[channel]
            assert float(got[row, channel, 1, 2]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_floats_are_taken_as_pixels_in_0_to_1(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4)).to(torch.uint8)
    floats = (images.double() / 255).to(dtype)
    got = TASK.inputs(floats)
    assert got.dtype == torch.float32
    assert torch.allclose(got, TASK.inputs(images), atol=5e-3 if dtype == torch.float16 else 1e-6)


def test_inputs_leave_the_images_alone() -> None:
    images = torch.full((1, 3, 4, 4), 7, dtype=torch.uint8)
    TASK.inputs(images)
    assert bool((images == 7).all())


def test_inputs_carry_gradients_of_float_images() -> None:
    images = torch.rand(1, 3, 4, 4, requires_grad=True)
    TASK.inputs(images).sum().backward()
    assert images.grad is not None
    assert images.grad[0, :, 0, 0].tolist() == pytest.approx([1 / std for std in TASK.std])


def test_losses_are_the_cross_entropy_of_each_sample() -> None:
    outputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    losses = TASK.losses(outputs, targets)
    assert (losses.shape, losses.dtype) == ((7,), torch.float32)
    for row in range(7):
        logits = outputs[row].tolist()
        by_hand = math.log(sum(math.exp(x) for x in logits)) - logits[int(targets[row])]
        assert float(losses[row]) == pytest.approx(by_hand, rel=1e-5)


def test_losses_of_half_precision_logits_are_taken_in_float32() -> None:
    outputs = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    assert float(TASK.losses(outputs, torch.tensor([1]))) == pytest.approx(120_000, rel=1e-2)


def test_predict_takes_the_largest_logit() -> None:
    outputs = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 1.0]])
    assert TASK.predict(outputs).tolist() == [1, 0]
    assert TASK.predict(outputs).dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"input_size": (3, 0, 4)}, "three positive numbers"),
        ({"num_classes": 1}, "at least 2 classes"),
        ({"mean": (0.5,)}, "3 values, one a channel"),
        ({"std": (0.5, 0.5)}, "3 values, one a channel"),
        ({"std": (0.5, 0.0, 0.5)}, "positive values"),
        ({"class_names": ("a", "b")}, "5 names"),
    ],
)
def test_settings_out_of_range(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ImageClassification(**{**vars(TASK), **change})
