"""The generator: the bound on its change, its warp, and a planted blend."""

from __future__ import annotations

import pytest
import torch

from defense_core import architectures
from defense_core.attacks import poison, probe_from_spec
from defense_core.loop import Tuning, finished, tune, working_copy
from defense_core.progress import NullProgress
from defense_core.scan.base import InvertedTrigger, Subject, subject_of
from defense_core.scan.bounded import PARTS, bounded_change
from defense_core.scan.generator import BoundedGenerator, GeneratorConfig, generator
from pipelines.demo import ARCHITECTURE, ARGUMENTS, TASK, _digits

CONFIG = GeneratorConfig()


def _subject(model: torch.nn.Module, seed: int = 0) -> Subject:
    digits = _digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(1))
    clean = digits.subset(order[900:1000])
    return subject_of(model, clean, task=TASK, seed=seed, device="cpu", progress=NullProgress())


def test_no_image_changes_by_more_than_the_budget() -> None:
    subject = _subject(architectures.build(ARCHITECTURE, ARGUMENTS))
    network = BoundedGenerator(subject, 3, CONFIG, subject.generator())
    assert subject.images is not None
    pixels = (subject.images.images[:12].float() / 255).view(3, 4, 1, 8, 8)
    with torch.no_grad():
        changes = (network.on(torch.arange(3), pixels) - pixels).flatten(0, 1)
    sizes = 255 * changes.square().mean((1, 2, 3)).sqrt()
    assert float(sizes.max()) <= CONFIG.budget(TASK.input_size) * 1.001
    assert float(sizes.min()) > 0


def test_the_budget_shrinks_with_the_number_of_pixels() -> None:
    assert CONFIG.budget((3, 32, 32)) == CONFIG.change
    assert CONFIG.budget((3, 64, 64)) == pytest.approx(CONFIG.change / 2**0.5)
    assert GeneratorConfig(change=200.0).budget((1, 2, 2)) == 255.0


def test_without_displacement_the_warp_is_the_identity() -> None:
    parts = {
        "first": torch.zeros(2, 1, 3, 3),
        "second": torch.zeros(2, 2, 3, 3),
        "last": torch.zeros(1, 2, 3, 3),
        "budget": torch.tensor(0.1),
        "embedding": torch.zeros(2, 4, 2),
        "picture": torch.zeros(2, 1, 8, 8),
        "warp": torch.zeros(2, 2, 4, 4),
    }
    assert set(parts) == set(PARTS)
    pixels = torch.rand(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(bounded_change(pixels, parts), pixels, atol=1e-5)
    moved = bounded_change(pixels, {**parts, "warp": torch.ones(2, 2, 4, 4)})
    assert not torch.allclose(moved, pixels, atol=1e-2)


def test_the_trigger_that_is_handed_on_is_what_the_generator_does() -> None:
    subject = _subject(architectures.build(ARCHITECTURE, ARGUMENTS))
    assert subject.images is not None
    images = subject.images.images[:5]
    draws = subject.generator()
    network = BoundedGenerator(subject, 3, CONFIG, draws)
    with torch.no_grad():
        expected = network.on(torch.tensor([2]), images[None].float() / 255)[0]
    found = InvertedTrigger(7, "generated", torch.zeros(1, 8, 8), parts=network.trigger(2)).apply(images)
    assert torch.allclose(found, (255 * expected).clamp(0, 255), atol=1e-3)


def test_a_planted_blend_is_found_with_its_target() -> None:
    digits = _digits()
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(1))
    probe = probe_from_spec({"name": "blend", "kind": "blended", "target": 4, "alpha": 0.2}, num_classes=10)
    network = working_copy(architectures.initialise(architectures.build(ARCHITECTURE, ARGUMENTS), 1), "cpu")
    tune(
        network, poison(digits.subset(order[:900]), probe, rate=0.1, seed=1).data, task=TASK,
        tuning=Tuning(epochs=30, batch_size=64, lr=0.05, weight_decay=5e-4, schedule="onecycle"),
        seed=1, device="cpu", progress=NullProgress(), name="train",
    )  # fmt: skip
    found = generator(_subject(finished(network, "test")), CONFIG)
    assert found.targets == (4,)
    assert found.statistic > 2
