"""Activeness and curvature as features of a model."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.errors import ConfigError, NonFiniteOutputs
from defense_core.progress import NullProgress
from defense_core.scan import features
from defense_core.scan.base import Deadline, Observation, OutOfTime, Subject, subject_of
from defense_core.scan.features import (
    ActivenessConfig,
    CurvatureConfig,
    activeness,
    concentration,
    curvature,
    scaled_hessian,
    scaled_trace,
)
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,))


def _images() -> CleanSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (12, 1, 8, 8), generator=generator).to(torch.uint8)
    return CleanSet(pixels, torch.arange(12) % 4, 4)


def _network() -> nn.Module:
    return build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 4})


def _subject(model: nn.Module, *, images: CleanSet | None = None, deadline: Deadline = Deadline()) -> Subject:
    given = _images() if images is None else images
    return subject_of(model, given, task=TASK, seed=0, device="cpu", progress=NullProgress(), deadline=deadline)


def test_concentration_is_the_log_ratio_of_means() -> None:
    assert concentration(torch.tensor([1.0, 1.0, 1.0, 5.0]), 0.25) == pytest.approx(math.log(5 / 2))
    assert concentration(torch.ones(10), 0.05) == 0.0
    assert concentration(torch.zeros(10), 0.05) == 0.0


def test_trace_and_hessian_do_not_see_the_scale_before_a_normalisation() -> None:
    model, scaled = _network(), _network()
    scaled.load_state_dict(model.state_dict())
    with torch.no_grad():
        scaled.conv2.weight.mul_(8)
        scaled.bn2.running_mean.mul_(8)
        scaled.bn2.running_var.mul_(64).add_(63 * scaled.bn2.eps)  # eps is part of the root
    plain, other = curvature(_subject(model)), curvature(_subject(scaled))
    assert other.statistic == pytest.approx(plain.statistic, rel=1e-3)
    assert other.facts["eigenvalue"] == pytest.approx(plain.facts["eigenvalue"], rel=1e-2)


def test_scaled_trace_and_hessian_are_their_formulas() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))
    subject, images = _subject(model), _images()
    copy = nn.Sequential(nn.Flatten(), nn.Linear(64, 4, bias=False))
    copy.load_state_dict(model.state_dict())
    weight = copy[1].weight
    size = float(weight.detach().square().mean().sqrt())
    losses = TASK.losses(copy(TASK.inputs(images.images)), images.labels)
    squares = [float(torch.autograd.grad(each, weight, retain_graph=True)[0].square().sum()) for each in losses]
    assert scaled_trace(subject, copy, images, ["1.weight"]) == pytest.approx(size**2 * sum(squares) / 12, rel=1e-4)
    product, count = scaled_hessian(subject, copy, images, ["1.weight"], advance=lambda: None)

    def loss(flat: torch.Tensor) -> torch.Tensor:
        return TASK.losses(TASK.inputs(images.images).flatten(1) @ flat.view(4, 64).T, images.labels).mean()

    full = torch.autograd.functional.hessian(loss, weight.detach().reshape(-1))
    vector = torch.randn(count, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(product(vector), size**2 * full @ vector, atol=1e-4)


def _run(name: str, subject: Subject) -> Observation:
    return activeness(subject) if name == "activeness" else curvature(subject)


@pytest.mark.parametrize("name", ["activeness", "curvature"])
def test_same_seed_same_observation_and_the_model_stays(name: str) -> None:
    model = _network()
    subject = _subject(model)
    networks = (model, subject.model)
    before = [{key: value.clone() for key, value in network.state_dict().items()} for network in networks]
    first, again = _run(name, subject), _run(name, subject)
    assert first.facts == again.facts
    assert first.facts["measured"]
    assert first.class_scores == first.targets == ()
    for network, kept in zip(networks, before, strict=True):
        assert all(torch.equal(value, kept[key]) for key, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in subject.model.parameters())


@pytest.mark.parametrize("name", ["activeness", "curvature"])
def test_both_need_images_and_end_in_time(name: str) -> None:
    subject = subject_of(_network(), None, task=TASK, seed=0, device="cpu", progress=NullProgress())
    with pytest.raises(ConfigError):
        _run(name, subject)
    with pytest.raises(OutOfTime):
        _run(name, _subject(_network(), deadline=Deadline(0.0)))


def test_normalisation_by_the_batch_is_said_to_be_unmeasured() -> None:
    model = _network()
    model.bn1 = nn.BatchNorm2d(4, track_running_stats=False)
    observation = curvature(_subject(model))
    assert (observation.statistic, observation.facts["measured"]) == (0.0, False)


@pytest.mark.parametrize("values", [{"steps": 0}, {"lr": 0.0}, {"batch_size": 0}, {"share": 1.0}])
def test_activeness_settings_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        ActivenessConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"images": 0}, {"hessian_images": 0}, {"products": 0}, {"tolerance": 0.0}])
def test_curvature_settings_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        CurvatureConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("detector", [activeness, curvature])
@pytest.mark.parametrize("factor", [1e26, 1e30])
def test_answers_that_are_huge_are_refused(detector: Callable[[Subject], Observation], factor: float) -> None:
    model = _network()
    with torch.no_grad():
        model.linear.weight.mul_(factor)
    with pytest.raises(NonFiniteOutputs, match="not finite"):
        detector(_subject(model))


def test_weights_that_move_beyond_all_numbers_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = [torch.full((4, 9), math.inf), torch.full((8, 9), math.nan)]
    monkeypatch.setattr("defense_core.scan.features.unlearning_changes", lambda *_, **__: moved)
    monkeypatch.setattr("defense_core.scan.features.neuron_weight_change", lambda *_: moved)
    assert not activeness(_subject(_network())).measured


def test_a_hessian_beyond_all_numbers_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(*_: object, **__: object) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
        return lambda vector: vector * math.nan, 9

    monkeypatch.setattr("defense_core.scan.features.scaled_hessian", overflowing)
    assert not curvature(_subject(_network())).measured


def test_vectors_that_memory_does_not_hold_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MOST_NUMBERS", 100)
    seen = curvature(_subject(_network()))
    assert not seen.measured
    assert "numbers are too many to keep" in seen.why
