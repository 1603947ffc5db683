"""Attack specifications, the catalogue, training of victims, and planting on a tiny network."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core import loop
from defense_core.architectures import build
from defense_core.attacks.catalogue import ATTACKS, attack_from_spec, default_settings
from defense_core.attacks.plant import TRIGGER_FILE, plant
from defense_core.attacks.probe import TRIGGERS, probe_from_spec
from defense_core.attacks.victim import VictimTraining, train_victim
from defense_core.config import digest, from_mapping, to_mapping
from defense_core.curvature import fisher_trace
from defense_core.data import CleanSet
from defense_core.errors import Cancelled, ConfigError
from defense_core.progress import NullProgress
from defense_core.task import ImageClassification

CLASSES = 4
TASK = ImageClassification((1, 8, 8), CLASSES, (0.5,), (0.5,), augment="none")
TINY: dict[str, dict[str, Any]] = {
    "badnets": {"size": 2},
    "label_consistent": {"size": 2, "steps": 2},
    "low_frequency": {"passes": 1},
    "trojan": {"size": 2, "steps": 2, "margin": 1},
    "input_aware": {"width": 4, "mask_epochs": 1, "schedule": {"epochs": 1}},
    "lira": {"width": 4, "schedule": {"epochs": 1}},
    "ssba": {"width": 4, "bits": 4, "schedule": {"epochs": 1}},
    "fba": {"width": 4, "schedule": {"epochs": 1}},
}


def samples(count: int = 80) -> CleanSet:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randint(0, 120, (count, 1, 8, 8), generator=generator)
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        pixels[row, :, top : top + 4, left : left + 4] += 120
    return CleanSet(pixels.to(torch.uint8), labels, CLASSES)


def network() -> nn.Module:
    return build("small_cnn", {"width": 4, "in_channels": 1, "num_classes": CLASSES})


def trained(seed: int = 0, **settings: Any) -> nn.Module:
    return train_victim(
        network(), samples(), training=VictimTraining(**{"epochs": 6, "batch_size": 16, **settings}), task=TASK,
        seed=seed, device="cpu", progress=NullProgress(), name="victim",
    )  # fmt: skip


# -- specifications --------------------------------------------------------------------


def test_every_attack_has_a_trigger_and_every_trigger_an_attack() -> None:
    assert set(ATTACKS) == set(TRIGGERS)
    for kind, row in ATTACKS.items():
        assert (row.training is None) == (row.learn is None), kind


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_default_settings_are_a_valid_specification(kind: str) -> None:
    settings = default_settings(kind)
    attack = attack_from_spec({"kind": kind, "target": 3, **settings}, num_classes=CLASSES)
    assert to_mapping(attack.settings) == settings
    assert attack.name == kind
    assert (attack.trigger is None) == (ATTACKS[kind].training is not None)


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_a_configuration_is_frozen_and_round_trips(kind: str) -> None:
    configuration = (ATTACKS[kind].training or TRIGGERS[kind])()
    assert dataclasses.is_dataclass(configuration)
    again = from_mapping(type(configuration), to_mapping(configuration))
    assert digest(again) == digest(configuration)
    with pytest.raises(dataclasses.FrozenInstanceError):
        configuration.kind = 1  # type: ignore[attr-defined]


def test_kinds_bring_their_own_poisoning() -> None:
    wanet = attack_from_spec({"kind": "wanet"}, num_classes=CLASSES).poisoning(0.1)
    assert (wanet.rate, wanet.cover_rate, wanet.clean_label) == (0.1, 0.2, False)
    sig = attack_from_spec({"kind": "sig"}, num_classes=CLASSES).poisoning(0.05)
    assert (sig.cover_rate, sig.clean_label) == (0.0, True)
    changed = attack_from_spec({"kind": "bpp", "cover_rate": 0.0, "clean_label": True}, num_classes=CLASSES)
    assert (changed.poisoning(0.1).cover_rate, changed.poisoning(0.1).clean_label) == (0.0, True)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "nothing"}, "kind is unknown"),
        ({}, "kind is unknown"),
        ({"kind": ["badnets"]}, "kind is unknown"),
        ("badnets", "kind is unknown"),
        ({"kind": "badnets", "target": 4}, "target is no class"),
        ({"kind": "badnets", "target": -1}, "target is no class"),
        ({"kind": "badnets", "target": "0"}, "target"),
        ({"kind": "badnets", "target": True}, "target"),
        ({"kind": "badnets", "sise": 3}, "sise"),
        ({"kind": "sig", "target": None}, "needs a target"),
        ({"kind": "badnets", "clean_label": True, "target": None}, "needs a target"),
        ({"kind": "badnets", "clean_label": "yes"}, "clean_label"),
        ({"kind": "lira", "path": "trigger.safetensors"}, "sha256"),
        ({"kind": "lira", "epsilon": "much"}, "epsilon"),
    ],
)
def test_malformed_specifications_are_refused(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attack_from_spec(spec, num_classes=CLASSES)


# -- victims ---------------------------------------------------------------------------


def test_a_victim_learns_and_the_given_network_stays() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = train_victim(
        model, samples(), training=VictimTraining(epochs=6, batch_size=16), task=TASK, seed=0, device="cpu",
        progress=NullProgress(), name="victim",
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    data = samples()
    assert float((found(TASK.inputs(data.images)).argmax(1) == data.labels).float().mean()) > 0.9
    assert not found.training


@pytest.mark.parametrize("adaptive", ["none", "sam", "fisher"])
def test_training_follows_its_seed(adaptive: str) -> None:
    first, again, other = (trained(seed, adaptive=adaptive).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())
    assert all(torch.isfinite(value).all() for value in first.values())


def test_the_adaptive_attackers_find_flatter_weights_than_the_ordinary_one() -> None:
    data = samples()
    traces: dict[str, float] = {}
    attackers: dict[str, dict[str, Any]] = {
        "none": {},
        "sam": {"radius": 0.2},
        "fisher": {"fisher_weight": 1.0, "fisher_every": 1},
    }
    for adaptive, settings in attackers.items():
        model = trained(adaptive=adaptive, epochs=60, **settings)
        traces[adaptive] = fisher_trace(model, TASK.inputs(data.images), data.labels, losses=TASK.losses)
    assert traces["fisher"] < 0.75 * traces["none"]
    assert traces["sam"] < 0.75 * traces["none"]


def test_the_penalty_on_the_fisher_trace_is_taken_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: set[tuple[bool, bool]] = set()

    class Watched(nn.Sequential):
        def forward(self, inputs: Tensor) -> Tensor:
            rounded.add((self.training, torch.is_autocast_enabled("cpu")))
            found: Tensor = super().forward(inputs)
            return found

    monkeypatch.setattr(loop, "autocast", lambda *_: lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    train_victim(
        Watched(nn.Flatten(), nn.Linear(64, TASK.num_classes)), samples(), task=TASK, seed=0, device="cpu",
        training=VictimTraining(epochs=1, adaptive="fisher", fisher_every=1), progress=NullProgress(), name="train",
    )  # fmt: skip
    assert rounded == {(True, True), (False, False)}


@pytest.mark.parametrize(
    ("setting", "value"),
    [("epochs", 0), ("lr", 0), ("adaptive", "magic"), ("radius", 0), ("fisher_weight", 0), ("fisher_every", 0)],
)
def test_training_settings_out_of_range_are_refused(setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=setting):
        from_mapping(VictimTraining, {setting: value})


# -- planting --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(ATTACKS))
def test_every_attack_can_be_planted(kind: str, tmp_path: Path) -> None:
    data = samples()
    kept = data.digest
    attack = attack_from_spec({"kind": kind, "target": 1, **TINY.get(kind, {})}, num_classes=CLASSES)
    planted = plant(
        attack, network(), data, rate=0.1, training=VictimTraining(epochs=1, batch_size=32), task=TASK, seed=0,
        device="cpu", progress=NullProgress(), folder=tmp_path,
    )  # fmt: skip
    assert CleanSet(data.images, data.labels, CLASSES).digest == kept
    assert planted.facts["poisoned"] == len(planted.poisoned.index) == 8
    assert planted.facts["cover"] == len(planted.poisoned.cover) == round(8 * ATTACKS[kind].cover_share)
    assert (planted.facts["label_mode"] == "clean_label") == ATTACKS[kind].clean_label
    assert (tmp_path / TRIGGER_FILE).exists() == (ATTACKS[kind].training is not None)
    if kind == "trojan":
        assert planted.probe.trigger.margin == 1  # type: ignore[attr-defined]
    again = probe_from_spec(planted.probe.to_spec(), num_classes=CLASSES)
    assert torch.equal(again.apply(data.images), planted.probe.apply(data.images))
    changed = (planted.poisoned.data.images != data.images).flatten(1).any(dim=1).nonzero().flatten()
    assert set(changed.tolist()) <= {*planted.poisoned.index.tolist(), *planted.poisoned.cover.tolist()}


class WithAuxiliaryHead(nn.Module):
    """Answers as Inception networks do: in training mode with a second head's logits beside the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.auxiliary = network(), nn.Linear(64, CLASSES)

    def forward(self, inputs: torch.Tensor) -> Any:
        logits = self.main(inputs)
        return (logits, self.auxiliary(inputs.flatten(1))) if self.training else logits


@pytest.mark.parametrize("kind", ["lira", "fba", "input_aware"])
def test_a_trigger_is_learnt_with_a_network_that_has_an_auxiliary_head(kind: str, tmp_path: Path) -> None:
    attack = attack_from_spec({"kind": kind, "target": 1, **TINY[kind]}, num_classes=CLASSES)
    planted = plant(
        attack, WithAuxiliaryHead(), samples(), rate=0.1, training=VictimTraining(epochs=1, batch_size=32), task=TASK,
        seed=0, device="cpu", progress=NullProgress(), folder=tmp_path,
    )  # fmt: skip
    assert planted.model(torch.zeros(2, 1, 8, 8)).shape == (2, CLASSES)


@pytest.mark.parametrize(
    ("spec", "rate", "words"),
    [
        ({"kind": "label_consistent", "target": 1, "size": 2}, 0.5, "target class is too small"),
        ({"kind": "lira", "target": 1, "width": 4, "clean_label": True}, 0.5, "target class is too small"),
        ({"kind": "low_frequency", "target": 1, "cover_rate": 0.1}, 0.1, "no cover samples"),
        ({"kind": "label_consistent", "target": 1, "size": 9}, 0.1, "does not fit the images"),
        ({"kind": "trojan", "target": 1, "size": 10_000_000}, 0.1, "does not fit the images"),
        ({"kind": "adaptive_blend", "target": 1, "pieces": 1_000_000}, 0.1, "do not fit the images"),
    ],
)
def test_what_cannot_be_planted_is_refused_before_anything_is_learnt(
    spec: dict[str, Any], rate: float, words: str, tmp_path: Path
) -> None:
    class Unused(NullProgress):
        def phase(self, name: str, total: int | None = None) -> Any:
            raise AssertionError(f"{name} was begun")

    with pytest.raises(ConfigError, match=words):
        plant(
            attack_from_spec(spec, num_classes=CLASSES), network(), samples(), rate=rate,
            training=VictimTraining(epochs=1, batch_size=32), task=TASK, seed=0, device="cpu", progress=Unused(),
            folder=tmp_path,
        )  # fmt: skip


def test_label_consistent_images_are_adversarial_below_the_corners(tmp_path: Path) -> None:
    data = samples()
    attack = attack_from_spec({"kind": "label_consistent", "size": 2, "steps": 3, "epsilon": 20}, num_classes=CLASSES)
    planted = plant(
        attack, network(), data, rate=0.1, training=VictimTraining(epochs=2, batch_size=32), task=TASK, seed=0,
        device="cpu", progress=NullProgress(), folder=tmp_path,
    )  # fmt: skip
    index = planted.poisoned.index
    inner = (slice(None), slice(None), slice(2, 6), slice(2, 6))
    moved = planted.poisoned.data.images[index][inner].int() - data.images[index][inner].int()
    assert 0 < int(moved.abs().max()) <= 20


@pytest.mark.parametrize(("epsilon", "trained"), [(0, 1), (20, 2)])
def test_a_clean_model_is_trained_only_for_what_asks_it(
    epsilon: int, trained: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from defense_core.attacks import plant as module

    names: list[str] = []

    def counted(*arguments: Any, name: str, **options: Any) -> Any:
        names.append(name)
        return train_victim(*arguments, name=name, **options)

    monkeypatch.setattr(module, "train_victim", counted)
    attack = attack_from_spec(
        {"kind": "label_consistent", "size": 2, "steps": 1, "epsilon": epsilon}, num_classes=CLASSES
    )
    plant(
        attack, network(), samples(), rate=0.1, training=VictimTraining(epochs=1), task=TASK, seed=0,
        device="cpu", progress=NullProgress(), folder=tmp_path,
    )  # fmt: skip
    assert len(names) == trained


def test_a_learned_trigger_can_be_planted_again_from_its_file(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rate": 0.1, "training": VictimTraining(epochs=1), "task": TASK, "seed": 0, "device": "cpu",
        "progress": NullProgress(),
    }  # fmt: skip
    attack = attack_from_spec({"kind": "lira", "width": 4, "schedule": {"epochs": 1}}, num_classes=CLASSES)
    first = plant(attack, network(), samples(), folder=tmp_path, **options)
    again = attack_from_spec(first.probe.to_spec(), num_classes=CLASSES)
    second = plant(again, network(), samples(), folder=tmp_path / "unused", **options)
    assert torch.equal(first.poisoned.data.images, second.poisoned.data.images)
    states = first.model.state_dict(), second.model.state_dict()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not (tmp_path / "unused").exists()


def test_all_to_all_triggers_are_learned_for_the_next_class(tmp_path: Path) -> None:
    attack = attack_from_spec(
        {"kind": "fba", "target": None, "width": 4, "schedule": {"epochs": 1}}, num_classes=CLASSES
    )
    planted = plant(
        attack, network(), samples(), rate=0.2, training=VictimTraining(epochs=1), task=TASK, seed=0, device="cpu",
        progress=NullProgress(), folder=tmp_path,
    )  # fmt: skip
    index = planted.poisoned.index
    assert torch.equal(planted.poisoned.data.labels[index], (samples().labels[index] + 1) % CLASSES)
    assert planted.facts["label_mode"] == "all_to_all"


def test_a_stop_request_ends_the_training() -> None:
    with pytest.raises(Cancelled):
        train_victim(
            network(), samples(), training=VictimTraining(epochs=50), task=TASK, seed=0, device="cpu",
            progress=NullProgress(lambda: True), name="victim",
        )  # fmt: skip
