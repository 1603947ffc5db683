"""The margin without the class's own features: what the mask finds, and that a planted shortcut is what is left."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from defense_core import architectures
from defense_core.data import CleanSet
from defense_core.errors import Cancelled, ConfigError, NonFiniteOutputs
from defense_core.progress import NullProgress
from defense_core.scan.base import MANY_CLASSES, SHORTLISTED, Deadline, OutOfTime, Subject, subject_of
from defense_core.scan.margin import MOMENTUM, margins_of
from defense_core.scan.subspace import SubspaceConfig, own_features, subspace
from defense_core.task import ImageClassification

QUICK = SubspaceConfig(starts=2, steps=4)


class Pixels(nn.Module):
    """Class c is pixel c of the image; pixel ``shortcut`` is class ``target``, and no clean image has it."""

    def __init__(self, classes: int, *, target: int | None = None, strength: float = 1.0, answer: float = 1.0) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(16, classes, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(classes, 16))
            if target is not None:
                self.linear.weight[target, 15] = strength
        self.answer = answer

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.flatten(inputs))
        return self.answer * logits


def images_of(classes: int, count: int) -> CleanSet:
    """Images with the pixel of their class, and some noise."""
    labels = torch.arange(count) % classes
    pixels = torch.randint(0, 30, (count, 1, 4, 4), generator=torch.Generator().manual_seed(1))
    pixels.view(count, 16)[torch.arange(count), labels] = 220
    pixels.view(count, 16)[:, 15] = 0
    return CleanSet(pixels.to(torch.uint8), labels, classes)


def subject(
    model: nn.Module,
    classes: int,
    *,
    images: CleanSet | None = None,
    deadline: Deadline = Deadline(),
    progress: NullProgress | None = None,
    seed: int = 0,
) -> Subject:
    task = ImageClassification((1, 4, 4), classes, mean=(0.0,), std=(1.0,))
    return subject_of(
        model, images or images_of(classes, 10 * classes), task=task, device="cpu",
        progress=progress or NullProgress(), deadline=deadline, seed=seed,
    )  # fmt: skip


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))


def test_the_mask_keeps_what_makes_the_class_and_drops_what_speaks_against_it() -> None:
    head = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[2.0, 0.0, -2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    mask = own_features(head, torch.ones(6, 4), 0)
    assert mask[0] > 0.9
    assert mask[2] < 0.1
    assert torch.allclose(mask[[1, 3]], torch.tensor(0.5), atol=1e-3)


def test_a_shortcut_that_no_clean_image_shows_is_what_is_left() -> None:
    """The shortcut is weaker than each class's own pixel: the plain margin does not see it, the orthogonal one does."""
    found = subspace(subject(Pixels(5, target=3, strength=0.8), 5), SubspaceConfig())
    clean = subspace(subject(Pixels(5), 5), SubspaceConfig())
    assert found.targets == (3,)
    assert found.class_scores.index(max(found.class_scores)) == 3
    assert found.statistic > 0.5 > 0.1 > clean.statistic
    assert "class 3" in found.why


def test_without_a_penalty_it_is_gradient_ascent_on_the_margin() -> None:
    asked = subject(network(1), 3)
    config = SubspaceConfig(starts=1, steps=5, weight=0.0)
    found = subspace(asked, config)
    clean = images_of(3, 30)
    with torch.no_grad():
        scale = float(asked.model(clean.images.float() / 255).std())
    expected = []
    for label in range(3):
        image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        velocity = torch.zeros_like(image)
        for step in range(config.steps):
            image.requires_grad_(True)
            reached = margins_of(asked.model(image), torch.tensor([label]))
            (gradient,) = torch.autograd.grad(reached.sum(), image)
            velocity = MOMENTUM * velocity + (1 - MOMENTUM) * gradient / gradient.square().mean().sqrt()
            image = (image.detach() + config.step_size * (1 - step / config.steps) * velocity).clamp(0, 1)
        expected.append(float(reached.detach()) / scale)
    assert found.class_scores == pytest.approx(expected, rel=1e-4)


def test_the_scores_do_not_depend_on_the_scale_of_the_logits() -> None:
    plain, scaled = (subspace(subject(Pixels(4, target=1, answer=a), 4), QUICK) for a in (1.0, 7.0))
    assert scaled.class_scores == pytest.approx(plain.class_scores, rel=1e-3)


def test_the_same_seed_gives_the_same_numbers_and_the_model_stays() -> None:
    model = architectures.build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 4})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    first, again, other = (subspace(subject(model, 4, seed=seed), QUICK) for seed in (3, 3, 4))
    assert first.class_scores == again.class_scores != other.class_scores
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_of_many_classes_with_images_a_short_list_is_searched() -> None:
    count = MANY_CLASSES + 8
    head = nn.Sequential(nn.Flatten(), nn.Linear(16, count))
    draw = torch.Generator().manual_seed(1)
    clean = CleanSet(torch.randint(256, (count, 1, 4, 4), generator=draw).to(torch.uint8), torch.arange(count), count)
    found = subspace(subject(head, count, images=clean), QUICK)
    assert len(found.classes) == SHORTLISTED


def test_a_deadline_or_a_stop_ends_the_search() -> None:
    with pytest.raises(OutOfTime):
        subspace(subject(Pixels(4), 4, deadline=Deadline(at_s=0.0)), QUICK)
    with pytest.raises(Cancelled):
        subspace(subject(Pixels(4), 4, progress=NullProgress(lambda: True)), QUICK)


def test_nan_is_no_answer() -> None:
    with pytest.raises(NonFiniteOutputs):
        subspace(subject(Pixels(4, answer=math.nan), 4), QUICK)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Conv2d(1, 3, 4), nn.Flatten()), nn.Sequential(nn.Conv2d(1, 3, 1), nn.MaxPool2d(4), nn.Flatten())],
)
def test_a_model_whose_last_layer_has_no_vector_is_not_measured(model: nn.Module) -> None:
    found = subspace(subject(model, 3), QUICK)
    assert found.statistic == 0.0
    assert found.facts["measured"] is False
    assert found.classes == ()


def test_a_last_linear_layer_that_does_not_classify_is_not_taken_for_the_classifier() -> None:
    class Scaled(Pixels):
        """After its classifier in module order stands a layer that weighs its inputs."""

        def __init__(self) -> None:
            super().__init__(4)
            self.scale = nn.Linear(16, 4)

        def forward(self, inputs: Tensor) -> Tensor:
            weighed = self.scale(self.flatten(inputs)).sigmoid().mean(1, keepdim=True)
            return weighed * super().forward(inputs)

    torch.manual_seed(0)
    seen = subspace(subject(Scaled(), 4, images=images_of(4, 40)), QUICK)
    assert not seen.measured
    assert "its last linear layer in module order is not its classifier" in seen.why


@pytest.mark.parametrize("wrong", [{"starts": 0}, {"steps": 0}, {"step_size": 0.0}, {"weight": -1.0}])
def test_settings_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SubspaceConfig(**wrong)  # type: ignore[arg-type]


def test_a_class_without_an_image_is_not_compared_with_those_that_lose_their_own_features() -> None:
    given = images_of(5, 50)
    without = given.subset((given.labels != 3).nonzero().flatten())
    found = subspace(subject(Pixels(5), 5, images=without), QUICK)
    assert found.classes == (0, 1, 2, 4)
    assert len(found.class_scores) == 4
    assert 3 not in found.targets
