"""Networks that are put together in other ways than those of the library: their layers are still what they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense_core.calls import once_per_sample, used_head
from defense_core.curvature import fisher_diagonal
from defense_core.data import CleanSet, Splits
from defense_core.errors import MethodNotApplicable
from defense_core.inference import accuracy
from defense_core.loop import Tuning, tune
from defense_core.progress import NullProgress
from defense_core.purify import METHODS, Purified, purify
from defense_core.purify.clp import _cut
from defense_core.purify.masks import following_norms
from defense_core.purify.statistics import renew_statistics
from defense_core.singular import parametrise, ruled_layers, shift_layers
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 8, 8), 3, mean=(0.5,), std=(0.25,), augment="none")


def easy(count: int = 240) -> CleanSet:
    """Noisy images of three prototypes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 3
    prototypes = torch.randint(0, 256, (3, 1, 8, 8), generator=generator).float()
    noise = torch.randint(0, 256, (count, 1, 8, 8), generator=generator).float()
    return CleanSet((0.6 * prototypes[labels] + 0.4 * noise).round().to(torch.uint8), labels, 3)


class Plain(nn.Module):
    """Two convolutions with BatchNorm and a classifier."""

    def __init__(self, *, bias: bool = True, affine: bool = True) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8, affine=affine)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.after = nn.BatchNorm2d(8, affine=affine)
        self.head = nn.Linear(8, 3, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.after(self.second(F.relu(self.norm(self.first(images))))))
        return self.head(x.mean((2, 3)))


class Frozen(Plain):
    """BatchNorm stays in eval mode, whatever the network is put in."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.training = False
        return self


class ByName(Plain):
    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.after(input=self.second(input=F.relu(self.norm(input=self.first(input=images))))))
        return self.head(input=x.mean((2, 3)))


class TokensFirst(nn.Module):
    """As PyTorch's transformers are by default: (tokens, samples, channels)."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 6, 8, stride=8)
        self.hidden = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).permute(2, 0, 1)
        return self.head(F.relu(self.hidden(tokens)).mean(0))


class Unused(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 3)


class OnTokens(Plain):
    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images).flatten(2).transpose(1, 2)
        return self.head(x).mean(1)


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.hidden = nn.Linear(64, 6)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(images.flatten(1))))


def trained(model: nn.Module, data: CleanSet, *, epochs: int) -> nn.Module:
    settings = Tuning(epochs, 32, 0.05)
    tune(model, data, task=TASK, tuning=settings, seed=0, device="cpu", progress=NullProgress(), name="train")
    return model.eval()


def purified(model: nn.Module, data: CleanSet, method: str, **settings: object) -> Purified:
    config, splits = METHODS[method].config(**settings), Splits(data, data, data)
    return purify(model, splits, config, method=method, task=TASK, seed=0, device="cpu", progress=NullProgress())


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def test_ngf_does_not_diverge_where_the_loss_vanishes() -> None:
    data = easy()
    model = trained(Plain(), data, epochs=10)
    done = purified(model, data, "ngf", ratio=0.05)
    natural = [row["loss"] for row in done.history if row["phase"].startswith("natural")]
    assert natural[-1] < 0.1 * natural[0]
    assert accuracy(done.model, data, task=TASK, device="cpu") > 0.95


@pytest.mark.parametrize("bias", [True, False])
def test_ngf_hands_over_the_classifier_that_it_tuned(bias: bool) -> None:
    data = easy()
    model = trained(Plain(bias=bias), data, epochs=4)
    done = purified(model, data, "ngf", part="fresh_head", epochs=6, views=1)
    with torch.no_grad():
        loss = TASK.losses(done.model(TASK.inputs(data.images)), data.labels).mean()
    # The last pass is made at a rate that falls to 0.
    assert float(loss) == pytest.approx(done.history[-1]["loss"], rel=0.05)


def test_statistics_are_measured_where_the_network_keeps_them() -> None:
    data, means = easy(), []
    for kind in (Plain, Frozen):
        torch.manual_seed(0)
        model = kind()
        renew_statistics(model, data, task=TASK, batch_size=32, seed=0, device="cpu", progress=NullProgress())
        assert not any(module.training for module in model.modules())
        means.append(model.after.running_mean)
    assert torch.equal(*means)
    assert means[0].abs().sum() > 0


@pytest.mark.parametrize("count", [8, 24])
def test_tokens_are_not_taken_for_samples(count: int) -> None:
    model = TokensFirst().eval()
    images, labels = torch.randn(count, 1, 8, 64), torch.arange(count) % 3
    by_rule = fisher_diagonal(model, images, labels, losses=TASK.losses)
    exact = fisher_diagonal(model, images, labels, losses=TASK.losses, by_layer=False)
    for name, values in exact.items():
        torch.testing.assert_close(by_rule[name], values)
    assert list(once_per_sample(model, dict(model.named_children()), images[:8])) == ["patches", "head"]
    layers = shift_layers(model)
    parametrise(model, layers)
    ruled = ruled_layers(model, layers, images[:8], labels[:8], losses=TASK.losses)
    assert [layer.path for layer in ruled] == ["patches", "head"]


def test_layers_that_are_called_by_name() -> None:
    data = easy(24)
    model = ByName().eval()
    norms = following_norms(model, TASK.inputs(data.images[:2]))
    assert norms == {"first.weight": "norm", "second.weight": "after"}
    done = purified(model, data, "ngf", epochs=1, min_steps=1, ratio=0.1)
    assert done.facts["layers"] == ["second", "head"]


@pytest.mark.parametrize("method", ["ngf", "fine_pruning"])
@pytest.mark.parametrize(
    ("network", "why"), [(Unused, "called on nothing"), (OnTokens, r"\(2, 64, 8\)"), (HeadFirst, r"logits \(2, 3\)")]
)
def test_a_classifier_of_another_kind_is_refused(network: Callable[[], nn.Module], why: str, method: str) -> None:
    with pytest.raises(MethodNotApplicable, match=why):
        purified(network(), easy(24), method)


def test_the_classifier_is_what_makes_the_logits() -> None:
    model = Plain()
    assert used_head(model, torch.zeros(2, 1, 8, 8), method="ngf") is model.head


@torch.no_grad()
def test_clp_silences_a_unit_whose_norm_has_no_scale() -> None:
    model = Plain(affine=False).eval()
    model.norm.running_mean.fill_(0.3)
    _cut(model, "first.weight", "norm", torch.arange(8) == 2)
    made = model.norm(model.first(torch.randn(4, 1, 8, 8)))
    assert not made[:, 2].any()
    assert made[:, 3].any()


@torch.no_grad()
def test_clp_takes_a_norm_over_whole_images_for_none() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.LayerNorm([6, 8, 8]), nn.Flatten(), nn.Linear(384, 3))
    done = purified(model, easy(24), "clp", u=1.0)
    cut = done.facts["pruned"]["0.weight"]
    assert cut == int((done.model[0].weight.flatten(1).abs().sum(1) == 0).sum()) > 0
