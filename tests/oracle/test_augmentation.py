"""The label-preserving transform against slices of the zero-padded image."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from defense_core.task import ImageClassification


def task(channels: int, height: int, width: int, augment: Literal["none", "crop", "crop_flip"]) -> ImageClassification:
    return ImageClassification((channels, height, width), 2, (0.5,) * channels, (0.5,) * channels, augment=augment)


def images_of(count: int, channels: int, height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (count, channels, height, width), generator=generator).to(torch.uint8)


def crops(image: Tensor, pad: int) -> list[Tensor]:
    """Every slice of the padded image that has the image's size."""
    height, width = image.shape[1:]
    padded = F.pad(image, (pad,) * 4)
    return [
        padded[:, top : top + height, left : left + width] for top in range(2 * pad + 1) for left in range(2 * pad + 1)
    ]


@settings(deadline=None, max_examples=60)
@given(
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 18),
    width=st.integers(4, 18),
    seed=st.integers(0, 1000),
    augment=st.sampled_from(["crop", "crop_flip"]),
)
def test_every_result_is_a_slice_of_the_padded_image_or_its_mirror(
    channels: int, height: int, width: int, seed: int, augment: Literal["crop", "crop_flip"]
) -> None:
    images = images_of(5, channels, height, width, seed)
    kept = images.clone()
    got = task(channels, height, width, augment).augmented(images, torch.Generator().manual_seed(seed))
    assert torch.equal(images, kept)
    assert (got.shape, got.dtype) == (images.shape, images.dtype)
    for one, image in zip(got, images, strict=True):
        allowed = crops(image, max(1, min(height, width) // 8))
        if augment == "crop_flip":
            allowed += [crop.flip(2) for crop in allowed]
        assert any(torch.equal(one, crop) for crop in allowed)


@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_every_shift_occurs_about_equally_often(augment: Literal["crop", "crop_flip"]) -> None:
    count = 9000
    image = images_of(1, 1, 8, 8)[0]
    got = task(1, 8, 8, augment).augmented(image.expand(count, -1, -1, -1), torch.Generator().manual_seed(1))
    allowed = crops(image, 1)
    if augment == "crop_flip":
        allowed += [crop.flip(2) for crop in allowed]
    shares = [float((got == crop).flatten(1).all(1).float().mean()) for crop in allowed]
    assert sum(shares) == pytest.approx(1.0)
    assert shares == pytest.approx([1 / len(allowed)] * len(allowed), rel=0.25)


def test_crop_alone_never_mirrors() -> None:
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., :4] = 255
    got = task(1, 8, 8, "crop").augmented(image.expand(200, -1, -1, -1), torch.Generator().manual_seed(0))
    assert bool((got[..., 1].float().mean() > got[..., -2].float().mean()) & (got[..., -1] == 0).all())


def test_images_of_a_batch_are_shifted_each_by_its_own() -> None:
    got = task(1, 8, 8, "crop").augmented(images_of(1, 1, 8, 8).expand(50, -1, -1, -1), torch.Generator())
    assert len({one.numpy().tobytes() for one in got}) > 4


def test_the_generator_alone_decides() -> None:
    images = images_of(20, 3, 16, 16)
    transform = task(3, 16, 16, "crop_flip")
    one, again, other = (transform.augmented(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_none_leaves_images_and_generator_alone() -> None:
    images, generator = images_of(4, 3, 8, 8), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert task(3, 8, 8, "none").augmented(images, generator) is images
    assert torch.equal(generator.get_state(), before)


def test_normalised_floats_can_be_shifted_too() -> None:
    images = torch.rand(3, 3, 8, 8)
    got = task(3, 8, 8, "crop").augmented(images, torch.Generator())
    assert any(torch.equal(got[0], crop) for crop in crops(images[0], 1))
