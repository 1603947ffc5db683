"""What is read off a network's layers: for every image its own, and only where a rule for it is known."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.inference import channels_last
from defense_core.layer_gradients import has_rule
from defense_core.layers import classifier_head
from defense_core.loop import Tuning, tune
from defense_core.progress import NullProgress
from defense_core.purify.fine_pruning import mean_inputs
from defense_core.purify.ngf_head import cached_features
from defense_core.purify.ngf_run import NGFConfig, Run
from defense_core.task import ImageClassification

PLAIN = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,), augment="none")
SHIFTED = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,), augment="crop")
MORE_THAN_A_BATCH = 600


def data_of(count: int) -> CleanSet:
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    return CleanSet(images.to(torch.uint8), torch.arange(count) % 4, 4)


@pytest.fixture
def model() -> nn.Module:
    return build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": 4}).eval()


@torch.no_grad()
def features_one_by_one(model: nn.Module, data: CleanSet) -> Tensor:
    """Inputs of the classifier, by a hook on it, an image at a time."""
    found: list[Tensor] = []
    handle = classifier_head(model).register_forward_pre_hook(lambda _, given: found.append(given[0].flatten(1)))
    for image in data.images.split(1):
        model(channels_last(PLAIN.inputs(image)))
    handle.remove()
    return torch.cat(found).double()


def test_every_image_has_its_own_cached_features(model: nn.Module) -> None:
    data = data_of(MORE_THAN_A_BATCH)
    run = Run(data, NGFConfig(part="head", precision="fp32"), PLAIN, 0, "cpu", NullProgress())
    views = cached_features(model, run)
    assert len(views) == 2
    want = features_one_by_one(model, data)
    for view in views:
        assert torch.allclose(view, want, atol=1e-5)


def test_every_view_is_augmented_anew(model: nn.Module) -> None:
    run = Run(data_of(40), NGFConfig(part="head", precision="fp32"), SHIFTED, 0, "cpu", NullProgress())
    first, second = cached_features(model, run)
    assert not torch.allclose(first, second)


def test_mean_inputs_are_of_all_images(model: nn.Module) -> None:
    data = data_of(MORE_THAN_A_BATCH)
    found = mean_inputs(model, classifier_head(model), data, task=PLAIN, device="cpu")
    assert torch.allclose(found, features_one_by_one(model, data).mean(0), atol=1e-5)


class PadsByItself(nn.Conv2d):
    """Like timm's convolutions that pad as TensorFlow does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(input, (0, 1, 0, 1)))


@pytest.mark.parametrize(
    ("layer", "known"),
    [
        (nn.Conv2d(1, 2, 3), True),
        (nn.Conv2d(1, 2, 3, padding="same"), True),
        (nn.Conv2d(1, 2, (3, 2), padding="same"), False),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), False),
        (PadsByItself(1, 2, 3), False),
    ],
)
def test_a_convolution_of_another_kind_has_no_rule(layer: nn.Module, known: bool) -> None:
    assert has_rule(layer) is known


Answers = namedtuple("Answers", ["logits", "auxiliary"])


class WithAuxiliaryHead(nn.Module):
    """Answers in training mode as torchvision's Inception networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, images: Tensor) -> Tensor | Answers:
        logits: Tensor = self.linear(images.flatten(1))
        return Answers(logits, logits) if self.training else logits


def test_a_network_with_an_auxiliary_head_can_be_tuned() -> None:
    model = WithAuxiliaryHead()
    before = model.linear.weight.detach().clone()
    rows = tune(
        model, data_of(16), task=PLAIN, tuning=Tuning(1, 8, 0.1), seed=0, device="cpu", progress=NullProgress(),
        name="tune",
    )  # fmt: skip
    assert rows[0]["loss"] > 0
    assert not torch.equal(model.linear.weight, before)
