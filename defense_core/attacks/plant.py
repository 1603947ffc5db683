"""Plant a backdoor: learn the trigger where it is a learned one, poison the training set, train the network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from defense_core.attacks.catalogue import Attack
from defense_core.attacks.label_consistent import LabelConsistent, adversarial
from defense_core.attacks.learned import store_tensors
from defense_core.attacks.poison import Poisoned, Prepare, poison_by, require_possible
from defense_core.attacks.probe import TRIGGERS, Probe, Trigger
from defense_core.attacks.trojan import TrojanTraining
from defense_core.attacks.victim import VictimTraining, train_victim
from defense_core.config import to_mapping
from defense_core.data import CleanSet
from defense_core.loop import same_each_time, working_copy
from defense_core.progress import Progress
from defense_core.task import ImageClassification

TRIGGER_FILE = "trigger.safetensors"


@dataclass(frozen=True, eq=False)
class PlantedBackdoor:
    """What an attacker has in the end.

    Attributes:
        model: the backdoored network: CPU, float32, eval mode.
        probe: the trigger with its label rule.
        poisoned: the training set that the network saw.
        facts: JSON-ready: label mode, rates and counts.
    """

    model: nn.Module
    probe: Probe
    poisoned: Poisoned
    facts: dict[str, Any]


def plant(
    attack: Attack,
    network: nn.Module,
    train: CleanSet,
    *,
    rate: float,
    training: VictimTraining,
    task: ImageClassification,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    folder: Path,
    surrogate: nn.Module | None = None,
) -> PlantedBackdoor:
    """Train ``network`` from random weights so that it obeys ``attack``.

    Args:
        network: the architecture; left as it is. What its layers draw by themselves is drawn anew, see
            :func:`~defense_core.architectures.initialise`.
        train: clean training samples; left alone.
        rate: poisoning rate, a share of the whole set.
        seed: draws weights, samples, order, and whatever the attack draws.
        folder: where the file of a learned trigger is written (``trigger.safetensors``).
        surrogate: a classifier of this architecture trained on clean data, for the attacks that want one; trained
            here by default.

    Raises:
        ConfigError: the rate is out of range or too high for a clean-label attack, or the trigger does not fit.
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    poisoning = attack.poisoning(rate)
    require_possible(train, attack.target, poisoning, trigger=TRIGGERS[attack.kind], kind=attack.kind)
    _require_fitting(attack, network, train)
    wants_surrogate = attack.row.surrogate and (attack.trigger is None or _moves_images(attack.trigger))
    if wants_surrogate and surrogate is None:
        surrogate = train_victim(
            network, train, training=training, task=task, seed=seed + 1, device=device, progress=progress,
            name="train a clean model",
        )  # fmt: skip
    helper = working_copy(surrogate if surrogate is not None else network, device).eval()
    trigger = attack.trigger
    shared: dict[str, Any] = {"task": task, "seed": seed, "device": device, "progress": progress}
    with same_each_time(device):
        if trigger is None:
            trigger = _learned(attack, helper, train, folder=folder, **shared)
        probe = attack.probe(trigger)
        poisoned = poison_by(train, probe, poisoning, seed=seed, prepare=_adversarially(trigger, helper, **shared))
    model = train_victim(
        network, poisoned.data, training=training, task=task, seed=seed, device=device, progress=progress,
        name="train the backdoored model",
    )  # fmt: skip
    facts = {
        "label_mode": poisoning.label_mode(probe),
        "rate": rate,
        "cover_rate": poisoning.cover_rate,
        "poisoned": len(poisoned.index),
        "cover": len(poisoned.cover),
        "training_images": len(train),
        "training": to_mapping(training),
    }
    return PlantedBackdoor(model, probe, poisoned, facts)


def _require_fitting(attack: Attack, network: nn.Module, train: CleanSet) -> None:
    """Refuse a trigger that the images have no place for, before anything is trained for it. Raises ConfigError."""
    if attack.trigger is not None:
        attack.trigger.apply(train.images[:1])
    elif isinstance(attack.settings, TrojanTraining):
        attack.settings.require_possible(network, train.images)


def _learned(
    attack: Attack,
    surrogate: nn.Module,
    train: CleanSet,
    *,
    task: ImageClassification,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    folder: Path,
) -> Trigger:
    def wanted(labels: Tensor) -> Tensor:
        return (labels + 1) % attack.num_classes if attack.target is None else torch.full_like(labels, attack.target)

    learn = attack.row.learn
    if learn is None:
        raise TypeError(f"{attack.kind} has nothing to learn")
    tensors = learn(attack.settings, surrogate, train, wanted, task=task, seed=seed, device=device, progress=progress)
    path = folder / TRIGGER_FILE
    kind = TRIGGERS[attack.kind]
    # What the trigger needs to know of its own training has the same name there.
    shared = {name: value for name, value in vars(attack.settings).items() if name in kind.__dataclass_fields__}
    trigger: Trigger = kind(path=str(path), sha256=store_tensors(tensors, path), **shared)
    return trigger


def _moves_images(trigger: Trigger) -> TypeGuard[LabelConsistent]:
    """Whether poisoned images are made adversarial before the trigger is applied."""
    return isinstance(trigger, LabelConsistent) and trigger.epsilon > 0


def _adversarially(
    trigger: Trigger,
    surrogate: nn.Module,
    *,
    task: ImageClassification,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Prepare | None:
    if not _moves_images(trigger):
        return None

    def prepare(images: Tensor, labels: Tensor) -> Tensor:
        return adversarial(
            surrogate, images, labels, config=trigger, task=task, seed=seed, device=device, progress=progress
        )

    return prepare
