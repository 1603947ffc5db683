"""The mean of what several purifiers make of one model: a model soup (Wortsman et al., ICML 2022, arXiv 2203.05482).

Every member starts from the given weights and stays near them, so that their mean is a network too, and one that knows
more of the clean task than each: errors that the members do not share cancel out. What a member left of a backdoor is
such an error. That backdoored and fine-tuned weights may be averaged is known (Arora et al., Findings of ACL 2024,
arXiv 2402.19334, of models from several sources); here no other model is needed, since the members are purifiers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from defense_core.config import from_mapping, require
from defense_core.data import Splits
from defense_core.errors import ConfigError, MethodDiverged, MethodNotApplicable
from defense_core.loop import finished, seeded, working_copy
from defense_core.progress import Progress
from defense_core.purify import distil, fast_fip, fip, nft, ngf, tsbd
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import calibrating_temperature, chooser, expected_drop
from defense_core.selection import MAX_EXPECTED_DROP
from defense_core.task import Task

MEMBERS = {row.METHOD.name: row.METHOD for row in (tsbd, distil, fip, fast_fip, nft, ngf)}


@dataclass(frozen=True)
class SoupConfig:
    """Settings of the soup.

    Attributes:
        members: names of the purifiers whose models are averaged, in order of preference.
        configs: configuration by member; a missing one has its defaults.
        max_drop: a member that is expected to lose more accuracy on the *select* split is left out, and so is the mean
            that does while a member does not.
    """

    members: tuple[str, ...] = ("nft", "fip", "tsbd", "ngf")
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_drop: float = MAX_EXPECTED_DROP

    def __post_init__(self) -> None:
        require(set(self.members) <= set(MEMBERS), "members", "some of " + ", ".join(MEMBERS), self.members)
        require(len(set(self.members)) == len(self.members), "members", "each name once", self.members)
        require(set(self.configs) <= set(self.members), "configs", "members of the soup", ", ".join(self.configs))
        require(0 <= self.max_drop <= 1, "max_drop", "a share in [0, 1]", self.max_drop)
        for name in self.members:
            _config_of(self, name)


def purify(
    model: nn.Module,
    clean: Splits,
    config: SoupConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Run every member by itself, as if it were asked for alone, and average those that keep the accuracy.

    Returns:
        The mean of the members that are expected to lose at most ``max_drop``; where none is, the member that is
        expected to lose least. Where the mean itself loses more than that and more than every member, their weights
        have a barrier between them, and the first of these members goes out. ``facts`` says who was averaged and what
        each is expected to lose.

    Raises:
        MethodDiverged: every member diverged, or some did and the others found nothing to work on.
        MethodNotApplicable: no member finds something to work on.
        Cancelled: a stop was requested.
    """
    shared: dict[str, Any] = {"task": task, "seed": seed, "device": device, "progress": progress}
    made: dict[str, Purified] = {}
    failed: dict[str, MethodDiverged | MethodNotApplicable] = {}
    for name in config.members:
        try:
            with seeded(seed, device):
                made[name] = MEMBERS[name].function(model, clean, _config_of(config, name), **shared)
        except (MethodDiverged, MethodNotApplicable) as error:
            failed[name] = error
    if failed and not made:
        raise next((error for error in failed.values() if isinstance(error, MethodDiverged)), [*failed.values()][-1])
    mean = mixed(model, made, clean, max_drop=config.max_drop, **shared)
    return replace(mean, facts={**mean.facts, "failed": {name: str(error) for name, error in failed.items()}})


def mixed(
    model: nn.Module,
    made: Mapping[str, Purified],
    clean: Splits,
    *,
    max_drop: float,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """The soup of what each member made of ``model``; see :func:`purify`. Of no member, an equal model."""
    if not made:
        return Purified(finished(working_copy(model, device), "soup"), (), {"averaged": []})
    asked, given = chooser(clean), working_copy(model, device).eval()
    shared: dict[str, Any] = {"task": task, "seed": seed, "device": device, "progress": progress}
    temperature = calibrating_temperature(given, asked, task=task, device=device)

    def lost(candidate: nn.Module) -> float:
        there = working_copy(candidate, device).eval()
        return expected_drop(given, there, asked, temperature=temperature, **shared)

    drops = {name: lost(each.model) for name, each in made.items()}
    averaged = [name for name in made if drops[name] <= max_drop] or [min(drops, key=lambda name: drops[name])]
    mean = average([made[name].model for name in averaged])
    drop = together = lost(mean)
    if together > max(max_drop, *(drops[name] for name in averaged)):
        averaged = averaged[:1]
        mean, drop = made[averaged[0]].model, drops[averaged[0]]
    facts = {
        "averaged": averaged,
        "expected_drop": drop,
        "expected_drop_of_mean": together,
        "temperature": temperature,
        "members": {name: {"expected_drop": drops[name], **each.facts} for name, each in made.items()},
    }
    history = tuple({**row, "phase": f"{name}: {row['phase']}"} for name, each in made.items() for row in each.history)
    return Purified(finished(mean, "soup"), history, facts)


def side_by_side(methods: Sequence[str]) -> list[str]:
    """Those of a run's methods that start at once: all but the soup, which averages what the others leave."""
    return [name for name in methods if name != METHOD.name] or list(methods)


def joined(config: SoupConfig, ran: Mapping[str, Mapping[str, Any]]) -> SoupConfig:
    """``config`` for members that ran by themselves: those of its members, each with the configuration that it had.

    Args:
        ran: configuration by name of the purifiers that ran; a missing key of one has its default.

    Raises:
        ConfigError: ``config`` has other settings for one of them.
    """
    members = tuple(name for name in config.members if name in ran)
    for name in members:
        had = from_mapping(MEMBERS[name].config, ran[name], where=name)
        if name in config.configs and _config_of(config, name) != had:
            raise ConfigError(
                f"soup.configs.{name} is not what {name} runs with",
                expected="the settings of the method itself, which runs in any case",
                got=config.configs[name],
                hint=f"Set {name}.<setting> instead of soup.configs.{name}",
            )
    return replace(config, members=members, configs={name: ran[name] for name in members})


@torch.no_grad()
def average(models: Sequence[nn.Module]) -> nn.Module:
    """A network each of whose floating-point weights and statistics is the mean of those of ``models``.

    Args:
        models: networks of the same architecture, at least one; left as they are.

    Returns:
        A copy of the first with the means, taken in float64; what is not floating-point is the first's.
    """
    mean = working_copy(models[0], "cpu")
    states = [model.state_dict() for model in models]
    for name, value in mean.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.stack([state[name].double() for state in states]).mean(0))
    return mean


def _config_of(config: SoupConfig, member: str) -> Any:
    return from_mapping(MEMBERS[member].config, config.configs.get(member, {}), where=f"soup.configs.{member}")


METHOD = Method(
    name="soup",
    config=SoupConfig,
    function=purify,
    summary="average the weights of what several purifiers make of the model (model soup)",
    zero_steps={"members": ()},
)
