"""Poisoning: how many samples, which ones, and what they are labelled."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from defense_core.attacks import BadNets, Poisoning, Probe, poison, poison_by
from defense_core.data import CleanSet
from defense_core.errors import ConfigError

CLASSES = 4


@dataclass(frozen=True)
class Marker:
    """Writes 255 for a triggered image, 200 for a planted one and 100 for cover."""

    def apply(self, images: Tensor) -> Tensor:
        return torch.full_like(images, 255)

    def cover(self, images: Tensor, seed: int) -> Tensor:
        return torch.full_like(images, 100)


@dataclass(frozen=True)
class TrainingMarker(Marker):
    def planted(self, images: Tensor, seed: int) -> Tensor:
        return torch.full_like(images, 200)


def samples(count: int = 1000) -> CleanSet:
    pixels = (torch.arange(count) % 97).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 6, 6).clone()
    return CleanSet(pixels, torch.arange(count) % CLASSES, CLASSES)


def probe(trigger: object, target: int | None = 2) -> Probe:
    return Probe("marker", "marker", trigger, CLASSES, target)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rate", "count"), [(0.1, 100), (0.01, 10), (0.001, 1), (0.0126, 13), (0.5, 500)])
def test_rates_down_to_a_thousandth_poison_as_many_samples_as_they_say(rate: float, count: int) -> None:
    data = samples()
    found = poison(data, probe(Marker()), rate=rate, seed=0)
    marked = (found.data.images == 255).flatten(1).all(dim=1).nonzero().flatten()
    assert len(found.index) == count
    assert torch.equal(marked, found.index)
    untouched = torch.ones(len(data), dtype=torch.bool)
    untouched[found.index] = False
    assert torch.equal(found.data.images[untouched], data.images[untouched])
    assert torch.equal(found.data.labels[untouched], data.labels[untouched])
    assert torch.equal(data.images, samples().images)
    assert len(found.cover) == 0


def test_all_to_one_draws_from_every_class_and_labels_with_the_target() -> None:
    data = samples()
    found = poison_by(data, probe(Marker(), target=2), Poisoning(rate=0.2), seed=0)
    assert set(data.labels[found.index].tolist()) == {0, 1, 2, 3}
    assert found.data.labels[found.index].unique().tolist() == [2]
    assert Poisoning().label_mode(probe(Marker(), target=2)) == "all_to_one"


def test_all_to_all_labels_with_the_next_class() -> None:
    data = samples()
    found = poison_by(data, probe(Marker(), target=None), Poisoning(rate=0.2), seed=0)
    assert torch.equal(found.data.labels[found.index], (data.labels[found.index] + 1) % CLASSES)
    assert Poisoning().label_mode(probe(Marker(), target=None)) == "all_to_all"


def test_clean_label_takes_the_target_class_only_and_leaves_every_label() -> None:
    data = samples()
    poisoning = Poisoning(rate=0.2, clean_label=True)
    found = poison_by(data, probe(Marker(), target=2), poisoning, seed=0)
    assert len(found.index) == 200
    assert data.labels[found.index].unique().tolist() == [2]
    assert torch.equal(found.data.labels, data.labels)
    assert poisoning.label_mode(probe(Marker())) == "clean_label"


def test_cover_samples_are_others_than_the_poisoned_ones_and_keep_their_labels() -> None:
    data = samples()
    found = poison_by(data, probe(Marker()), Poisoning(rate=0.1, cover_rate=0.2), seed=0)
    assert len(found.cover) == 200
    assert not set(found.cover.tolist()) & set(found.index.tolist())
    assert (found.data.images[found.cover] == 100).all()
    assert torch.equal(found.data.labels[found.cover], data.labels[found.cover])


def test_a_trigger_with_a_training_form_is_planted_in_that_form() -> None:
    found = poison_by(samples(), probe(TrainingMarker()), Poisoning(rate=0.1), seed=0)
    assert (found.data.images[found.index] == 200).all()


def test_samples_are_prepared_before_the_trigger() -> None:
    seen: list[Tensor] = []

    def prepare(images: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels)
        return torch.full_like(images, 9)

    data = samples()
    patch = Probe("patch", "badnets", BadNets(size=2), CLASSES, 1)
    found = poison_by(data, patch, Poisoning(rate=0.1, clean_label=True), seed=0, prepare=prepare)
    assert torch.equal(seen[0], data.labels[found.index])
    assert (found.data.images[found.index][:, :, 0, 0] == 9).all()
    assert (found.data.images[found.index][:, :, 5, 5] == 255).all()


def test_the_draw_follows_the_seed_alone() -> None:
    draws = [poison_by(samples(), probe(Marker()), Poisoning(), seed=seed).index for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    with_cover = poison_by(samples(), probe(Marker()), Poisoning(cover_rate=0.3), seed=0)
    assert torch.equal(with_cover.index, draws[0])


@pytest.mark.parametrize(
    ("poisoning", "target", "message"),
    [
        (Poisoning(rate=0.0001), 2, "no sample"),
        (Poisoning(rate=0.3, clean_label=True), 2, "too small"),
        (Poisoning(rate=0.1, clean_label=True), None, "needs a target"),
    ],
)
def test_what_cannot_be_poisoned_is_refused(poisoning: Poisoning, target: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        poison_by(samples(), probe(Marker(), target=target), poisoning, seed=0)


def test_a_trigger_without_cover_samples_refuses_a_cover_rate() -> None:
    patch = Probe("patch", "badnets", BadNets(size=2), CLASSES, 1)
    with pytest.raises(ConfigError, match="no cover"):
        poison_by(samples(), patch, Poisoning(rate=0.1, cover_rate=0.1), seed=0)


@pytest.mark.parametrize(
    "rates", [{"rate": 0.0}, {"rate": 1.0}, {"rate": -0.1}, {"cover_rate": -0.1}, {"rate": 0.6, "cover_rate": 0.6}]
)
def test_rates_out_of_range_are_refused(rates: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="rate"):
        Poisoning(**rates)
