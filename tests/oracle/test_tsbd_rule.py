"""How much TSBD zeroes and at which rate it repairs: the rule, with what each candidate is expected to lose given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

from defense_core.architectures import build
from defense_core.data import CleanSet, Splits
from defense_core.errors import ConfigError
from defense_core.progress import NullProgress
from defense_core.purify import stage_one, tsbd
from defense_core.purify.tsbd import TSBDConfig
from defense_core.task import ImageClassification

TASK = ImageClassification((1, 8, 8), 2, (0.5,), (0.5,))


@dataclass
class Rule:
    """TSBD with its unlearning left out. Candidates lose ``drops``, in the order in which they are made."""

    monkeypatch: pytest.MonkeyPatch
    rates: list[float] = field(default_factory=list)

    def facts(
        self, drops: list[float], *, select: int = 100, given: nn.Module | None = None, **settings: Any
    ) -> dict[str, Any]:
        remaining = iter(drops)
        self.monkeypatch.setattr(tsbd, "expected_drop", lambda *_, **__: next(remaining))
        self.monkeypatch.setattr(tsbd, "repair", lambda *_, lr, **__: self.rates.append(lr) or [])
        self.monkeypatch.setattr(stage_one, "correct", lambda *_, **__: torch.arange(100) % 2 == 0)
        self.monkeypatch.setattr(stage_one, "unlearn", lambda *_, **__: [])
        data = CleanSet(torch.zeros(200, 1, 8, 8, dtype=torch.uint8), torch.arange(200) % 2, 2)
        parts = (data.subset(torch.arange(*ends)) for ends in ((0, 100), (100, 100 + select), (0, 0)))
        few = {"n_grid": (0.1,), "n_factors": (1.0, 1.5, 2.0), "lr_grid": (0.02, 0.01, 0.05), "max_drop": 0.03}
        torch.manual_seed(0)
        given = given or build("small_cnn", {"width": 4, "num_classes": 2})
        made = tsbd.purify(
            given.eval(), Splits(*parts), TSBDConfig(**(few | settings)),
            task=TASK, seed=0, device="cpu", progress=NullProgress(),
        )  # fmt: skip
        assert next(remaining, None) is None, "every candidate was asked for"
        return made.facts


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Rule:
    return Rule(monkeypatch)


@pytest.mark.parametrize(
    ("drops", "factor"), [([0.02, 0.025], 2.0), ([0.02, 0.04], 1.5), ([0.04, 0.01], 1.0), ([0.10, 0.10], 1.0)]
)
def test_the_most_is_zeroed_at_which_accuracy_holds_after_the_repair_at_the_smallest_rate(
    drops: list[float], factor: float, rule: Rule
) -> None:
    facts = rule.facts(drops, lr_grid=(0.01,))
    assert facts["n"] == pytest.approx(0.1 * factor)
    assert [trial["accuracy"] for trial in facts["factor_trials"]] == [-drop for drop in drops]
    assert rule.rates == [0.01] * len(drops)
    assert sum(facts["zeroed"].values()) > 0


def test_the_rate_goes_up_from_the_repair_that_was_kept(rule: Rule) -> None:
    """0.01 stands already, at the factor of 1.5; 0.05 costs too much."""
    facts = rule.facts([0.01, 0.04, 0.02, 0.04])
    assert rule.rates == [0.01, 0.01, 0.02, 0.05]
    assert facts["lr"] == 0.02
    assert facts["lr_trials"] == [
        {"strength": 0.01, "accuracy": -0.01},
        {"strength": 0.02, "accuracy": -0.02},
        {"strength": 0.05, "accuracy": -0.04},
    ]


def test_what_is_given_is_taken(rule: Rule) -> None:
    facts = rule.facts([0.5], n=0.2, lr=0.3)
    assert (facts["n"], facts["lr"], rule.rates) == (0.2, 0.3, [0.3])


def test_without_steps_nothing_is_tried(rule: Rule) -> None:
    assert rule.facts([0.0], epochs=0)["n"] == 0.1
    assert rule.rates == [0.01]


def test_without_a_select_split_the_weakest_is_taken(rule: Rule) -> None:
    """Every candidate looks harmless on the images that it was repaired on."""
    facts = rule.facts([0.0], select=0)
    assert (facts["n"], facts["lr"], rule.rates) == (0.1, 0.01, [0.01])


def test_a_network_without_batch_norm_is_tried_with_less(rule: Rule) -> None:
    transformer = build("vit_tiny", {"image_size": 8, "dim": 8, "depth": 1, "heads": 1, "in_channels": 1})
    facts = rule.facts([0.04, 0.01, 0.02, 0.04], given=transformer, n_grid=(0.4,), n_factors=(1.0, 2.0))
    assert [trial["strength"] for trial in facts["factor_trials"]] == [1.0, 0.5]
    assert facts["n"] == pytest.approx(0.2)
    assert rule.rates == pytest.approx([0.002, 0.002, 0.004, 0.01])
    assert facts["lr"] == pytest.approx(0.004)


def test_what_is_given_is_taken_without_batch_norm_too(rule: Rule) -> None:
    transformer = build("vit_tiny", {"image_size": 8, "dim": 8, "depth": 1, "heads": 1, "in_channels": 1})
    facts = rule.facts([0.5], given=transformer, n=0.2, lr=0.3)
    assert (facts["n"], facts["lr"], rule.rates) == (0.2, 0.3, [0.3])


@pytest.mark.parametrize("factors", [(), (0.5, 1.0)])
def test_factors_below_one_are_refused(factors: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="n_factors"):
        TSBDConfig(n_factors=factors)
