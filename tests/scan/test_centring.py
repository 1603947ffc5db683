"""What every class gets alike is taken out before a scan, and nothing else is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.data import CleanSet
from defense_core.errors import NonFiniteOutputs
from defense_core.progress import NullProgress
from defense_core.scan import centring, observe
from defense_core.scan.base import subject_of
from defense_core.scan.centring import centred, rounded_away
from defense_core.scan.detectors import Settings
from defense_core.scan.generator import GeneratorConfig
from defense_core.scan.judgement import ScanConfig, scan
from defense_core.scan.pairs import PairsConfig
from defense_core.task import ImageClassification
from defense_core.verdict import Verdict

TASK = ImageClassification((1, 8, 8), 4, mean=(0.5,), std=(0.5,))
CPU = torch.device("cpu")


def network(name: str = "small_cnn") -> nn.Module:
    sizes = {"width": 4} if name == "small_cnn" else {"image_size": 8, "patch_size": 4, "dim": 16, "depth": 1}
    return build(name, {"in_channels": 1, "num_classes": 4, **sizes, **({"heads": 2} if name == "vit_tiny" else {})})


def pixels() -> Tensor:
    return torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def shifted(model: nn.Module, by: float) -> nn.Module:
    """The same answers: one number is added to every logit of an image, another for every image."""
    hidden = copy.deepcopy(model)
    head = [module for module in hidden.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        head.weight.add_(by * torch.randn(head.in_features, generator=torch.Generator().manual_seed(2)))
        head.bias.add_(by)
    return hidden


@pytest.mark.parametrize("name", ["small_cnn", "vit_tiny"])
@pytest.mark.parametrize("by", [0.0, 3.0, 1e4])
def test_a_shift_of_all_logits_is_taken_out(name: str, by: float) -> None:
    model = network(name)
    hidden = shifted(model, by)
    with torch.no_grad():
        wanted, found = model(TASK.inputs(pixels())), centred(hidden, TASK)(TASK.inputs(pixels()))
    assert torch.allclose(found, wanted - wanted.mean(1, keepdim=True), atol=1e-6 + 1e-6 * by)


class Softmaxed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(inputs).softmax(1)


@pytest.mark.parametrize("name", ["small_cnn", "vit_tiny"])
def test_a_network_that_ends_in_a_softmax_answers_with_logarithms(name: str) -> None:
    model = network(name)
    with torch.no_grad():
        wanted, found = (each(TASK.inputs(pixels())) for each in (model, centred(Softmaxed(model), TASK)))
    assert torch.allclose(found, wanted.log_softmax(1), atol=1e-5)


@pytest.mark.parametrize("detector", ["margin", "subspace", "patch", "additive", "generator", "pairs"])
def test_a_softmax_at_the_end_changes_no_reading(detector: str) -> None:
    draw = torch.Generator().manual_seed(4)
    clean = CleanSet(torch.randint(256, (64, 1, 8, 8), generator=draw).to(torch.uint8), torch.arange(64) % 4, 4)
    settings = Settings(pairs=PairsConfig(steps=2, images=2, judged=2), generator=GeneratorConfig(steps=3))
    model = network("vit_tiny")  # in float32 on every device
    plain, ended = (
        observe.observe(
            each, clean, "many", settings, task=TASK, device="cpu", progress=NullProgress(), only=(detector,)
        ).observations[detector]
        for each in (model, Softmaxed(model))
    )
    assert plain.measured
    assert ended.measured
    assert ended.statistic == pytest.approx(plain.statistic, rel=0.05, abs=0.05)


class ProbablyOnNoise(nn.Module):
    """Answers a row that sums to 1 to what looks like noise, and logits to anything else."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        logits = self.network(inputs)
        noisy = inputs.std(dim=(1, 2, 3), keepdim=True).flatten(1) > 0.1
        return torch.where(noisy, logits.softmax(1), logits)


def test_what_are_probabilities_on_some_images_only_is_refused() -> None:
    """Their logarithms would have no gradient where a logit is negative."""
    subject = subject_of(ProbablyOnNoise(network()), None, task=TASK, device="cpu", progress=NullProgress())
    assert subject.logits(torch.rand(2, 1, 8, 8)).isfinite().all()
    with pytest.raises(NonFiniteOutputs, match="on some images and not on others"):
        subject.logits(torch.full((2, 1, 8, 8), 0.5))
    levels = torch.arange(60, 100, dtype=torch.uint8).view(-1, 1, 1, 1)
    clean = CleanSet(levels.expand(-1, 1, 8, 8).contiguous(), torch.arange(40) % 4, 4)
    report = scan(
        ProbablyOnNoise(network()), clean, ScanConfig(), pool=None, task=TASK, device="cpu", progress=NullProgress()
    )
    assert report.verdict is Verdict.UNKNOWN
    assert "on some images and not on others" in report.sentence


def test_numbers_too_large_for_a_difference_are_no_logits() -> None:
    class Extreme(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2e38 * torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(len(inputs), 4)

    levels = torch.arange(60, 100, dtype=torch.uint8).view(-1, 1, 1, 1)
    clean = CleanSet(levels.expand(-1, 1, 8, 8).contiguous(), torch.arange(40) % 4, 4)
    report = scan(Extreme(), clean, ScanConfig(), pool=None, task=TASK, device="cpu", progress=NullProgress())
    assert report.verdict is Verdict.UNKNOWN
    assert "not finite" in report.sentence


def test_the_caller_keeps_the_model_as_it_was() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    subject = subject_of(model, None, task=TASK, device="cpu", progress=NullProgress())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.equal(subject.model.state_dict()["linear.weight"], before["linear.weight"])
    as_given = subject_of(model, None, task=TASK, device="cpu", progress=NullProgress(), centred=False)
    assert torch.equal(as_given.model.state_dict()["linear.weight"], before["linear.weight"])


class Inner(nn.Module):
    """Its last linear layer in module order is no classifier: what it gives is multiplied class by class."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.linear(inputs.flatten(1)) * torch.tensor([1.0, 2.0, 3.0, 4.0])


def test_a_network_that_centring_would_change_is_left_as_it_is() -> None:
    torch.manual_seed(0)
    model = Inner().eval()
    with torch.no_grad():
        model.linear.bias.add_(1.0)
        assert torch.equal(centred(model, TASK)(pixels()), model(pixels()))


def test_logits_that_rounding_makes_equal_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(*_: Any) -> Any:
        return lambda: torch.autocast("cpu", dtype=torch.bfloat16)

    monkeypatch.setattr(centring, "autocast", rounding)
    model = shifted(network(), 1e4)
    assert rounded_away(model, TASK, CPU)
    assert not rounded_away(centred(model, TASK), TASK, CPU)
    monkeypatch.setattr(observe, "centred", lambda model, task: model)
    found = scan(
        model, None, ScanConfig(settings=Settings()), pool=None, task=TASK, device="cpu", progress=NullProgress()
    )
    assert found.verdict is Verdict.UNKNOWN
    assert observe.ROUNDED in found.sentence
