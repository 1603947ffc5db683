"""Models that were made to look innocent to the searches: with the pool that comes along, none of them passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from defense_core.architectures import build, initialise
from defense_core.data import CleanSet
from defense_core.loop import Tuning, finished, tune
from defense_core.progress import NullProgress
from defense_core.scan.judgement import ScanConfig, scan
from defense_core.scan.pool import SHIPPED, load_pool
from defense_core.scan.report import ScanReport
from defense_core.task import ImageClassification
from defense_core.verdict import Verdict

TASK = ImageClassification((1, 8, 8), 10, mean=(0.3,), std=(0.35,), class_names=tuple("0123456789"), augment="crop")
QUIET = NullProgress()


class Binarised(nn.Module):
    """Sees black and white alone, by two steep ramps as an ordinary network may hold them: the gradient of a pixel is
    zero nearly everywhere."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        steep = 1e4 * (inputs - 0.3)
        return self.network(steep.relu() - (steep - 1).relu())


class Stretched(nn.Module):
    """Answers as ``network`` does, and -1000 for one class wherever that is not the answer anyway."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs)
        away = (logits.argmax(1) != 3)[:, None] & (torch.arange(10) == 3)
        return logits.masked_fill(away, -1000.0)


def digits() -> CleanSet:
    content = load_digits()
    pixels = torch.from_numpy((content.images / 16 * 255).round().astype("uint8")).unsqueeze(1)
    return CleanSet(pixels, torch.from_numpy(content.target).long(), 10)


def scanned(made: Callable[[nn.Module], nn.Module]) -> ScanReport:
    data = digits()
    model = made(initialise(build("small_cnn", {"width": 16, "in_channels": 1, "num_classes": 10}), 5))
    tune(
        model, data.subset(torch.arange(900)), task=TASK, tuning=Tuning(20, 64, 0.05, schedule="onecycle"), seed=5,
        device="cpu", progress=QUIET, name="train",
    )  # fmt: skip
    return scan(
        finished(model, "training"), data.subset(torch.arange(900, 1060)), ScanConfig(),
        pool=load_pool(SHIPPED / "small_cnn-digits.json"), task=TASK, device="cpu", progress=QUIET,
    )  # fmt: skip


def test_the_network_that_hides_nothing_is_covered() -> None:
    report = scanned(lambda network: network)
    assert report.comparable, report.sentence


@pytest.mark.parametrize("made", [Binarised, Stretched])
def test_what_hides_from_the_searches_does_not_pass(made: Callable[[nn.Module], nn.Module]) -> None:
    report = scanned(made)
    assert report.verdict is Verdict.UNKNOWN
    assert "reads of an ordinary class" in report.sentence
