"""The soup: the exact mean of what its members make alone, and who is left out of it."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from defense_core.config import from_mapping
from defense_core.errors import ConfigError, MethodDiverged
from defense_core.progress import NullProgress
from defense_core.purify import METHODS, Purified, purify, soup
from defense_core.purify.soup import SoupConfig, average, mixed
from tests.family.conftest import NETWORKS, TINY_TASK, tiny_splits
from tests.family.methods import ABSURD, cheap, run, same, weights

SHARED: dict[str, Any] = {"task": TINY_TASK, "seed": 0, "device": "cpu", "progress": NullProgress()}


def test_the_mean_is_that_of_every_weight_and_statistic() -> None:
    models = [NETWORKS["small_cnn"]() for _ in range(3)]
    for number, model in enumerate(models):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.copy_(value + 2**number if value.is_floating_point() else value + number)
    before = [weights(model) for model in models]
    mean = weights(average(models))
    for name, value in mean.items():
        wanted = value
        if value.is_floating_point():
            wanted = (before[0][name].double() + before[1][name].double() + before[2][name].double()).div(3).float()
        else:
            wanted = before[0][name]
        assert torch.equal(value, wanted), name
    assert all(same(weights(model), held) for model, held in zip(models, before, strict=True))


def test_members_are_those_that_run_alone_whatever_stands_beside_them() -> None:
    config = cheap("soup")
    alone = [run(name, NETWORKS["preact_resnet18"]()).model for name in config.members]
    together = run("soup", NETWORKS["preact_resnet18"](), config=replace(config, max_drop=1.0))
    assert together.facts["averaged"] == list(config.members)
    assert same(weights(together.model), weights(average(alone)))


def confident() -> nn.Module:
    """A network that is sure of its answers, so that other ones count as a loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(TINY_TASK.input_size[0] * 64, 64), nn.ReLU(), nn.Linear(64, 4))
    with torch.no_grad():
        model[3].weight.mul_(40)
    return model.eval()


def bent(model: nn.Module, amount: float) -> Purified:
    """``model`` with its classifier pushed towards class 0."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        [*changed.parameters()][-1][0] += amount
    return Purified(changed.eval(), ({"phase": "bend", "step": 1, "loss": amount},), {"amount": amount})


def test_a_member_that_loses_too_much_is_left_out() -> None:
    model = confident()
    made = {"a": bent(model, 0.0), "b": bent(model, 1e-7), "c": bent(model, 1000.0)}
    found = mixed(model, made, tiny_splits(), max_drop=0.01, **SHARED)
    assert found.facts["averaged"] == ["a", "b"]
    assert same(weights(found.model), weights(average([made["a"].model, made["b"].model])))
    assert [row["phase"] for row in found.history] == ["a: bend", "b: bend", "c: bend"]
    assert found.facts["members"]["c"]["amount"] == 1000.0


def test_where_all_lose_too_much_the_one_that_loses_least_goes_out() -> None:
    model = confident()
    made = {"a": bent(model, 2000.0), "b": bent(model, 5.0)}
    found = mixed(model, made, tiny_splits(), max_drop=0.0, **SHARED)
    drops = {name: each["expected_drop"] for name, each in found.facts["members"].items()}
    assert drops["b"] < drops["a"]
    assert found.facts["averaged"] == ["b"]


def test_where_the_mean_is_no_network_the_first_that_is_one_goes_out() -> None:
    """Hidden units in another order: the same function, and a mean that is another."""
    model = confident()
    turned = copy.deepcopy(model)
    order = torch.arange(64).roll(1)
    with torch.no_grad():
        for part in (turned[1].weight, turned[1].bias):
            part.copy_(part[order])
        turned[3].weight.copy_(turned[3].weight[:, order])
    made = {"first": Purified(copy.deepcopy(model), (), {}), "second": Purified(turned, (), {})}
    found = mixed(model, made, tiny_splits(), max_drop=0.01, **SHARED)
    assert found.facts["expected_drop_of_mean"] > 0.01
    assert found.facts["averaged"] == ["first"]
    assert found.facts["expected_drop"] == pytest.approx(0)
    assert same(weights(found.model), weights(model))


def test_a_member_that_diverges_is_named_and_the_others_are_averaged() -> None:
    absurd = {"members": ("nft", "ngf"), "configs": {"ngf": {"lr": ABSURD["lr"], "epochs": 1}}}
    config = from_mapping(SoupConfig, absurd)
    found = run("soup", NETWORKS["mlp"](), config=config)
    assert found.facts["averaged"] == ["nft"]
    assert list(found.facts["failed"]) == ["ngf"]
    with pytest.raises(MethodDiverged):
        run("soup", NETWORKS["mlp"](), config=SoupConfig(("ngf",), absurd["configs"]))


@pytest.mark.parametrize(
    "wrong",
    [
        {"members": ["prayer"]},
        {"members": ["fine_tuning"]},
        {"members": ["soup"]},
        {"members": ["nft", "nft"]},
        {"members": ["nft"], "configs": {"fip": {}}},
        {"configs": {"nft": {"no_such": 1}}},
        {"configs": {"nft": {"epochs": -1}}},
        {"max_drop": 2.0},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        from_mapping(SoupConfig, wrong)


def test_members_are_our_own_methods() -> None:
    ours = {name for name, row in METHODS.items() if not row.control and not row.baseline}
    assert ours - {"soup"} <= set(soup.MEMBERS) <= set(METHODS)


def test_the_benchmark_mixes_what_its_members_made() -> None:
    config = cheap("soup")
    model, splits = NETWORKS["preact_resnet18"](), tiny_splits()
    made = {name: purify(model, splits, cheap(name), method=name, **SHARED) for name in config.members}
    once = mixed(model, made, splits, max_drop=config.max_drop, **SHARED)
    whole = run("soup", model, splits, config)
    assert same(weights(once.model), weights(whole.model))
    assert once.facts == {key: value for key, value in whole.facts.items() if key != "failed"}
