"""BadNets and Blended against their equations; label rules; poisoned training sets; probe files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from defense_core.attacks import BadNets, Blended, Probe, Trigger, poison, probe_from_spec
from defense_core.config import digest
from defense_core.data import CleanSet
from defense_core.errors import EXIT_USAGE, ConfigError


def images_of(count: int = 5, channels: int = 3, height: int = 9, width: int = 7, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), generator=generator).to(torch.uint8)


# -- BadNets -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("corner", "rows", "columns"),
    [
        ("bottom_right", range(5, 8), range(3, 6)),
        ("bottom_left", range(5, 8), range(1, 4)),
        ("top_right", range(1, 4), range(3, 6)),
        ("top_left", range(1, 4), range(1, 4)),
        ("centre", range(3, 6), range(2, 5)),
    ],
)
@pytest.mark.parametrize("opacity", [1.0, 0.3])
def test_badnets_mixes_the_patch_into_its_window_and_nothing_else(
    corner: Any, rows: range, columns: range, opacity: float
) -> None:
    images = images_of()
    colour = (200, 0, 50)
    got = BadNets(size=3, corner=corner, margin=1, colour=colour, opacity=opacity).apply(images)
    for row in range(9):
        for column in range(7):
            for channel in range(3):
                before = images[:, channel, row, column].double()
                inside = row in rows and column in columns
                expected = (1 - opacity) * before + opacity * colour[channel] if inside else before
                assert torch.allclose(got[:, channel, row, column].double(), expected, atol=0.51 if inside else 0)


def test_badnets_checker_has_its_colour_in_the_corners() -> None:
    got = BadNets(size=3, corner="top_left", pattern="checker").apply(torch.full((1, 1, 4, 4), 7, dtype=torch.uint8))
    assert got[0, 0, :3, :3].tolist() == [[255, 0, 255], [0, 255, 0], [255, 0, 255]]
    assert bool((got[0, 0, 3] == 7).all())


def test_badnets_one_colour_serves_all_channels() -> None:
    one = BadNets(colour=(90,)).apply(images_of())
    three = BadNets(colour=(90, 90, 90)).apply(images_of())
    assert torch.equal(one, three)


@pytest.mark.parametrize(
    "settings", [{"size": 8}, {"size": 5, "margin": 3}, {"colour": (1, 2)}, {"colour": (1, 2, 3, 4)}]
)
def test_badnets_that_does_not_fit(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        BadNets(**settings).apply(images_of())


@pytest.mark.parametrize(
    "settings",
    [{"size": 0}, {"margin": -1}, {"opacity": 0.0}, {"opacity": 1.1}, {"colour": ()}, {"colour": (256,)}],
)
def test_badnets_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        BadNets(**settings)


# -- Blended -----------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0])
def test_blended_is_the_convex_mixture(alpha: float) -> None:
    trigger, images = Blended(alpha=alpha, cells=4, seed=3), images_of()
    picture = trigger.picture(3, 9, 7)
    assert picture.shape == (3, 9, 7)
    assert float(picture.min()) >= 0
    assert float(picture.max()) <= 255
    got = trigger.apply(images)
    for row in range(len(images)):
        expected = ((1 - alpha) * images[row].double() + alpha * picture.double()).floor()
        assert int((got[row].double() - expected).abs().max()) <= 1  # rounding at whole numbers
        assert float((got[row].double() == expected).double().mean()) > 0.95


def test_blended_picture_is_drawn_by_its_seed_alone() -> None:
    torch.manual_seed(1)
    one = Blended(seed=5).picture(3, 8, 8)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert torch.equal(one, Blended(seed=5).picture(3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, Blended(seed=6).picture(3, 8, 8))


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.5}, {"cells": 0}])
def test_blended_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Blended(**settings)


# -- every trigger -------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", [BadNets(), BadNets(pattern="checker", opacity=0.5), Blended()], ids=repr)
@pytest.mark.parametrize("channels", [1, 3])
def test_triggers_are_pure(trigger: Trigger, channels: int) -> None:
    images = images_of(channels=channels)
    kept = images.clone()
    got = trigger.apply(images)
    assert torch.equal(images, kept)
    assert (got.shape, got.dtype) == (images.shape, torch.uint8)
    assert torch.equal(got, trigger.apply(images))
    assert torch.equal(got[3:4], trigger.apply(images[3:4])), "an image's trigger depends on that image alone"
    assert trigger.apply(images[:0]).shape == images[:0].shape
    assert not torch.equal(got, images)


# -- label rules -------------------------------------------------------------------------


def test_all_to_one() -> None:
    probe = probe_from_spec({"kind": "badnets", "target": 2}, num_classes=4)
    labels = torch.tensor([0, 1, 2, 3, 2])
    assert probe.expected(labels).tolist() == [2] * 5
    assert probe.eligible(labels).tolist() == [True, True, False, True, False]


def test_all_to_all_goes_to_the_next_class() -> None:
    probe = probe_from_spec({"kind": "badnets", "target": None}, num_classes=4)
    labels = torch.tensor([0, 1, 2, 3])
    assert probe.expected(labels).tolist() == [1, 2, 3, 0]
    assert bool(probe.eligible(labels).all())


# -- poisoning ---------------------------------------------------------------------------


def training_set(count: int = 60) -> CleanSet:
    return CleanSet(images_of(count), torch.arange(count) % 4, 4)


@pytest.mark.parametrize("target", [1, None])
@pytest.mark.parametrize(("rate", "count"), [(0.1, 6), (0.05, 3), (0.99, 59)])
def test_poison_changes_exactly_the_samples_it_names(target: int | None, rate: float, count: int) -> None:
    data = training_set()
    probe = probe_from_spec({"kind": "badnets", "target": target, "size": 2}, num_classes=4)
    before = data.digest
    poisoned = poison(data, probe, rate=rate, seed=0)
    assert CleanSet(data.images, data.labels, 4).digest == before
    assert len(poisoned.index) == len(set(poisoned.index.tolist())) == count
    touched = set(poisoned.index.tolist())
    for row in range(60):
        changed = row in touched
        expected = probe.apply(data.images[row : row + 1])[0] if changed else data.images[row]
        label = probe.expected(data.labels[row : row + 1])[0] if changed else data.labels[row]
        assert torch.equal(poisoned.data.images[row], expected)
        assert int(poisoned.data.labels[row]) == int(label)


def test_the_seed_draws_the_poisoned_samples() -> None:
    probe = probe_from_spec({"kind": "badnets", "size": 2}, num_classes=4)
    one, again, other = (poison(training_set(), probe, rate=0.2, seed=seed).index for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 2.0])
def test_rates_out_of_range(rate: float) -> None:
    with pytest.raises(ConfigError, match="rate"):
        poison(training_set(), probe_from_spec({"kind": "badnets"}, num_classes=4), rate=rate, seed=0)


# -- probe specifications ------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "badnets"},
        {"kind": "badnets", "name": "corner", "target": 3, "size": 2, "colour": [10, 20, 30], "pattern": "checker"},
        {"kind": "blended", "target": None, "alpha": 0.5, "seed": 9},
    ],
)
def test_specifications_round_trip(spec: dict[str, Any]) -> None:
    probe = probe_from_spec(spec, num_classes=4)
    again = probe_from_spec(probe.to_spec(), num_classes=4)
    assert again == probe
    assert digest(again.to_spec()) == digest(probe.to_spec())
    assert all(probe.to_spec()[key] == (tuple(v) if isinstance(v, list) else v) for key, v in spec.items())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, "a mapping with a key kind"),
        ([], "a mapping with a key kind"),
        ("badnets", "a mapping with a key kind"),
        ({"kind": "badnet"}, "one of .*badnets.*blended.*, got 'badnet'"),
        ({"kind": ["badnets"]}, "kind is unknown"),
        ({"kind": "badnets", "target": 4}, r"target is no class: expected 0\.\.3, got 4"),
        ({"kind": "badnets", "target": -1}, "target is no class"),
        ({"kind": "badnets", "target": "0"}, "a class number or null"),
        ({"kind": "badnets", "target": 1.0}, "a class number or null"),
        ({"kind": "badnets", "target": True}, "a class number or null"),
        ({"kind": "badnets", "sise": 3}, r"unknown key 'probe badnets\.sise'.*Did you mean 'size'\?"),
        ({"kind": "badnets", "alpha": 0.2}, "unknown key"),
        ({"kind": "badnets", "size": "3"}, r"probe badnets\.size has the wrong type"),
        ({"kind": "badnets", "size": 0}, "size is out of range"),
        ({"kind": "badnets", "corner": "left"}, "bottom_right"),
        ({"kind": "blended", "alpha": 2}, "alpha is out of range"),
    ],
)
def test_malformed_specifications(spec: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        probe_from_spec(spec, num_classes=4)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_probe_checks_its_target() -> None:
    with pytest.raises(ConfigError, match="target is no class"):
        Probe(name="p", kind="badnets", trigger=BadNets(), num_classes=3, target=3)
