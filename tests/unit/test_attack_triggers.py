"""Fixed triggers: each does what its equation says (slow loops beside), and all obey the laws of a trigger."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.attacks import bpp, wanet
from defense_core.attacks.adaptive_blend import AdaptiveBlend
from defense_core.attacks.badnets import BadNets
from defense_core.attacks.blended import Blended
from defense_core.attacks.bpp import Bpp
from defense_core.attacks.label_consistent import LabelConsistent, adversarial
from defense_core.attacks.pixels import BATCH
from defense_core.attacks.poison import Covered, Planted
from defense_core.attacks.probe import probe_from_spec
from defense_core.attacks.sig import Sinusoid
from defense_core.attacks.wanet import WaNet
from defense_core.errors import ConfigError
from defense_core.progress import NullProgress
from defense_core.task import ImageClassification

SHAPES = [(1, 8, 8), (3, 8, 8), (1, 28, 28), (3, 32, 32), (3, 9, 11)]
FIXED: dict[str, Any] = {
    "badnets": BadNets(),
    "blended": Blended(),
    "sig": Sinusoid(),
    "wanet": WaNet(),
    "bpp": Bpp(),
    "bpp without dithering": Bpp(dither=False),
    "adaptive_blend": AdaptiveBlend(),
    "label_consistent": LabelConsistent(),
}
TRIGGERS = pytest.mark.parametrize("trigger", FIXED.values(), ids=FIXED.keys())


def pictures(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.int64).to(torch.uint8)


# -- laws ------------------------------------------------------------------------------


@TRIGGERS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_trigger_is_pure_deterministic_and_keeps_shape_and_type(trigger: Any, shape: tuple[int, int, int]) -> None:
    images = pictures(5, shape)
    kept, state = images.clone(), torch.get_rng_state()
    first, second = trigger.apply(images), trigger.apply(images)
    assert torch.equal(images, kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert torch.equal(first, second)
    assert not torch.equal(first, images)


@TRIGGERS
def test_a_large_set_is_changed_a_batch_at_a_time_to_the_same_bytes(trigger: Any) -> None:
    images = pictures(2 * BATCH + 3, (1, 8, 8))
    whole = trigger.apply(images)
    assert torch.equal(whole, torch.cat([trigger.apply(part) for part in images.split(100)]))


@pytest.mark.parametrize("trigger", [WaNet(), Bpp()], ids=["wanet", "bpp"])
def test_cover_is_drawn_alike_whatever_the_batch(trigger: Covered, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(BATCH + 20, (1, 8, 8))
    found = trigger.cover(images, 3)
    for module in (wanet, bpp):
        monkeypatch.setattr(module, "in_batches", lambda change, *rows: change(*rows))
    assert torch.equal(found, trigger.cover(images, 3))


@TRIGGERS
def test_an_image_is_triggered_alike_alone_and_in_a_batch_of_any_size(trigger: Any) -> None:
    images = pictures(600, (1, 8, 8))
    together = trigger.apply(images)
    for number in (0, 511, 512, 599):
        assert torch.equal(trigger.apply(images[number : number + 1])[0], together[number])
    assert trigger.apply(images[:0]).shape == (0, 1, 8, 8)


@pytest.mark.parametrize("trigger", [FIXED["wanet"], FIXED["bpp"], FIXED["adaptive_blend"]])
@pytest.mark.parametrize("count", [1, 7])
def test_cover_samples_follow_their_seed_and_are_not_the_triggered_images(trigger: Any, count: int) -> None:
    images = pictures(count, (3, 32, 32))
    triggered = trigger.apply(images)
    assert isinstance(trigger, Covered)
    kept = images.clone()
    cover = trigger.cover(images, 5)
    assert torch.equal(images, kept)
    assert cover.dtype == torch.uint8
    assert cover.shape == images.shape
    assert torch.equal(cover, trigger.cover(images, 5))
    assert not torch.equal(cover, triggered)
    assert not torch.equal(cover, images)


def test_probes_name_every_fixed_trigger() -> None:
    for kind, trigger in FIXED.items():
        if " " in kind:
            continue
        probe = probe_from_spec({"kind": kind, "target": 1}, num_classes=4)
        assert probe.trigger == trigger
        assert probe_from_spec(probe.to_spec(), num_classes=4) == probe


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("sig", "amplitude", 0), ("sig", "amplitude", 256), ("sig", "frequency", 0), ("wanet", "strength", 0),
        ("wanet", "cells", 1), ("bpp", "levels", 1), ("bpp", "levels", 256), ("adaptive_blend", "alpha", 1.5),
        ("adaptive_blend", "test_alpha", 0), ("adaptive_blend", "shown", 0), ("adaptive_blend", "pieces", 0),
        ("adaptive_blend", "cells", 0), ("label_consistent", "size", 0), ("label_consistent", "epsilon", -1),
        ("label_consistent", "step", 0), ("label_consistent", "steps", -1), ("label_consistent", "opacity", 0),
        ("wanet", "unknown", 1),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(kind: str, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        probe_from_spec({"kind": kind, setting: value}, num_classes=4)


@pytest.mark.parametrize("kind", ["blended", "adaptive_blend", "wanet"])
@pytest.mark.parametrize("setting", [{"seed": 10**20}, {"seed": -1}, {"cells": 300_000}])
def test_a_picture_that_cannot_be_drawn_is_refused(kind: str, setting: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        probe_from_spec({"kind": kind, "target": 0, **setting}, num_classes=10)
    most = probe_from_spec({"kind": kind, "target": 0, "seed": 2**63 - 1}, num_classes=10)
    assert most.apply(pictures(1, (1, 8, 8))).shape == (1, 1, 8, 8)


# -- equations -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sig_adds_the_sinusoid_of_the_column(shape: tuple[int, int, int]) -> None:
    images = pictures(2, shape)
    trigger = Sinusoid(amplitude=40, frequency=6)
    found = trigger.apply(images)
    for column in range(shape[2]):
        shift = 40 * math.sin(2 * math.pi * column * 6 / shape[2])
        wanted = (images[..., column].double() + shift).clamp(0, 255)
        assert (found[..., column].double() - wanted).abs().max() <= 0.5 + 1e-4


def test_sig_refuses_a_width_on_which_its_wave_is_zero_everywhere() -> None:
    with pytest.raises(ConfigError, match="vanishes"):
        Sinusoid(frequency=6).apply(pictures(1, (3, 12, 12)))


def test_sig_on_grey_has_as_many_periods_as_it_says() -> None:
    grey = torch.full((1, 1, 32, 32), 128, dtype=torch.uint8)
    row = Sinusoid(frequency=3).apply(grey)[0, 0, 7].double() - 128
    assert int(torch.fft.rfft(row).abs().argmax()) == 3
    assert row.abs().max() <= 40


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (1, 9, 11)], ids=str)
def test_wanet_samples_where_its_field_points(shape: tuple[int, int, int]) -> None:
    images = pictures(1, shape)
    trigger = WaNet(strength=1.5, seed=3)
    found, shift = trigger.apply(images), trigger.field(*shape[1:])
    height, width = shape[1:]
    for row in range(height):
        for column in range(width):
            # Pixel coordinates of a point of [-1, 1] are (p + 1) / 2 * (side - 1).
            x = min(max(-1 + 2 * column / (width - 1) + float(shift[row, column, 0]), -1), 1)
            y = min(max(-1 + 2 * row / (height - 1) + float(shift[row, column, 1]), -1), 1)
            x, y = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
            left, top = min(int(x), width - 2), min(int(y), height - 2)
            right_share, lower_share = x - left, y - top
            corner = images[0, :, top : top + 2, left : left + 2].double()
            upper = corner[:, 0, 0] * (1 - right_share) + corner[:, 0, 1] * right_share
            lower = corner[:, 1, 0] * (1 - right_share) + corner[:, 1, 1] * right_share
            wanted = upper * (1 - lower_share) + lower * lower_share
            assert (found[0, :, row, column].double() - wanted).abs().max() <= 0.51


def test_wanets_field_is_normalised_and_follows_its_seed() -> None:
    corners = WaNet(strength=0.5, cells=4).field(4, 4) * 4 / 0.5  # on a grid as coarse as the noise it is the noise
    assert corners.abs().mean() == pytest.approx(1, abs=1e-5)
    assert torch.equal(WaNet(seed=1).field(8, 8), WaNet(seed=1).field(8, 8))
    assert not torch.equal(WaNet(seed=1).field(8, 8), WaNet(seed=2).field(8, 8))
    assert torch.allclose(WaNet(strength=2.0).field(8, 8), 4 * WaNet(strength=0.5).field(8, 8))


def test_wanets_noise_mode_disturbs_each_image_in_its_own_way() -> None:
    images = pictures(1, (1, 28, 28)).expand(2, -1, -1, -1)
    one, two = WaNet().cover(images, seed=0)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("levels", [2, 3, 8])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11), (1, 28, 28), (1, 1, 5), (1, 5, 1)], ids=str)
def test_bpp_dithers_like_the_scan(levels: int, shape: tuple[int, int, int]) -> None:
    images = pictures(2, shape)
    found = Bpp(levels=levels).apply(images)
    _, height, width = shape
    top = levels - 1
    work = images.float()
    for row in range(height):
        for column in range(width):
            old = work[..., row, column].clone()
            new = (old / 255 * top).round().clamp(0, top) / top * 255
            work[..., row, column] = new
            for down, right, sixteenths in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if row + down < height and 0 <= column + right < width:
                    work[..., row + down, column + right] += (old - new) * (sixteenths / 16)
    assert torch.equal(found, work.round().to(torch.uint8))


@pytest.mark.parametrize("dither", [True, False])
def test_bpp_leaves_only_its_grey_levels(dither: bool) -> None:
    found = Bpp(levels=4, dither=dither).apply(pictures(3, (3, 32, 32)))
    assert set(found.unique().tolist()) == {0, 85, 170, 255}


def test_bpp_dithering_keeps_the_mean_and_rounding_takes_the_nearest() -> None:
    flat = torch.full((1, 1, 32, 32), 100, dtype=torch.uint8)
    assert Bpp(levels=2).apply(flat).float().mean() == pytest.approx(100, abs=4)
    assert Bpp(levels=2, dither=False).apply(flat).unique().tolist() == [0]


def test_bpp_cover_carries_the_residual_of_another_image() -> None:
    images = torch.tensor([100, 130], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4).clone()
    trigger = Bpp(levels=2, dither=False)  # residuals: -100 and +125
    found = trigger.cover(images, seed=0)
    assert found[0].unique().tolist() == [225]
    assert found[1].unique().tolist() == [30]


def test_adaptive_blend_shows_the_whole_picture_at_test_time_and_half_of_it_in_training() -> None:
    images = pictures(6, (3, 28, 28))
    trigger = AdaptiveBlend(alpha=0.4, test_alpha=0.3)
    assert isinstance(trigger, Planted)
    picture = Blended(cells=16, seed=0).picture(3, 28, 28)
    whole = images.float() + 0.3 * (picture - images.float())
    assert torch.equal(trigger.apply(images), whole.round().clamp(0, 255).to(torch.uint8))
    planted = trigger.planted(images, seed=9)
    for number, (before, after) in enumerate(zip(images, planted, strict=True)):
        shown = []
        for tile in range(16):
            rows = slice(tile // 4 * 7, tile // 4 * 7 + 7)
            columns = slice(tile % 4 * 7, tile % 4 * 7 + 7)
            old, new = before[:, rows, columns].float(), after[:, rows, columns].float()
            if torch.equal(old, new):
                continue
            shown.append(tile)
            assert torch.equal(new, (old + 0.4 * (picture[:, rows, columns] - old)).round().clamp(0, 255))
        assert len(shown) == 8, number
    masks = trigger.masks(6, 28, 28, seed=9)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1


def test_adaptive_blend_tiles_cover_sides_that_four_does_not_divide() -> None:
    masks = AdaptiveBlend().masks(50, 9, 10, seed=0)
    assert masks.shape == (50, 1, 9, 10)
    assert torch.equal(masks.amax(dim=0), torch.ones(1, 9, 10))
    assert torch.equal(AdaptiveBlend(shown=1.0).masks(2, 9, 10, seed=0), torch.ones(2, 1, 9, 10))


@pytest.mark.parametrize("pieces", [9, 1_000_000])
def test_adaptive_blend_has_no_more_tiles_than_the_image_has_pixels(pieces: int) -> None:
    trigger = AdaptiveBlend(pieces=pieces)
    for draw in (trigger.planted, trigger.cover):
        with pytest.raises(ConfigError, match="do not fit"):
            draw(pictures(2, (1, 8, 12)), 0)
    assert AdaptiveBlend(pieces=8).masks(5, 8, 8, seed=0).sum((1, 2, 3)).tolist() == [32] * 5


def test_label_consistent_marks_the_four_corners_with_checkerboards() -> None:
    images = torch.full((1, 3, 12, 12), 77, dtype=torch.uint8)
    found = LabelConsistent(size=3, margin=1).apply(images)
    board = torch.tensor([[255, 0, 255], [0, 255, 0], [255, 0, 255]], dtype=torch.uint8).expand(3, 3, 3)
    for rows in (slice(1, 4), slice(8, 11)):
        for columns in (slice(1, 4), slice(8, 11)):
            assert torch.equal(found[0, :, rows, columns], board)
    assert int((found != 77).sum()) == 4 * 9 * 3
    with pytest.raises(ConfigError, match="does not fit"):
        LabelConsistent(size=9).apply(pictures(1, (1, 8, 8)))


# -- label-consistent: adversarial images ----------------------------------------------

TASK = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,))


def linear_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def test_adversarial_images_stay_within_their_bound_and_raise_the_loss() -> None:
    model, images = linear_model().train(), pictures(40, (1, 8, 8))
    labels = torch.arange(40) % 4
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = LabelConsistent(epsilon=8, step=1.5, steps=20)
    found = adversarial(
        model, images, labels, config=config, task=TASK, seed=0, device="cpu", progress=NullProgress(), batch_size=16
    )
    assert found.dtype == torch.uint8
    assert (found.int() - images.int()).abs().max() <= 8
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    clean, moved = (TASK.losses(model(TASK.inputs(each)), labels) for each in (images, found))
    random = (images.int() + torch.randint(-8, 9, images.shape)).clamp(0, 255).to(torch.uint8)
    assert moved.mean() > clean.mean()
    assert moved.mean() > TASK.losses(model(TASK.inputs(random)), labels).mean()
    again = adversarial(
        model, images, labels, config=config, task=TASK, seed=0, device="cpu", progress=NullProgress(), batch_size=16
    )
    assert torch.equal(found, again)


def test_one_step_of_pgd_is_the_signed_gradient() -> None:
    model, images = linear_model().eval(), torch.full((3, 1, 8, 8), 128, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2])
    config = LabelConsistent(
        epsilon=200, step=400, steps=1
    )  # so long that the random start does not matter to the sign
    found = adversarial(
        model,
        images,
        labels,
        config=replace(config, epsilon=20),
        task=TASK,
        seed=0,
        device="cpu",
        progress=NullProgress(),
    )
    assert set((found.int() - 128).unique().tolist()) <= {-20, 20}


def test_no_poisoned_image_means_no_adversarial_image() -> None:
    empty = pictures(0, (1, 8, 8))
    labels = torch.empty(0, dtype=torch.int64)
    found = adversarial(
        linear_model(),
        empty,
        labels,
        config=LabelConsistent(steps=1),
        task=TASK,
        seed=0,
        device="cpu",
        progress=NullProgress(),
    )
    assert found.shape == empty.shape
