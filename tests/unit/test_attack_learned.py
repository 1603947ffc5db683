"""Learned triggers: what training makes of them, what their files must be, and the laws of a trigger."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from defense_core.architectures import build
from defense_core.attacks.catalogue import ATTACKS, Attack, attack_from_spec
from defense_core.attacks.generators import ColourMap, UNet
from defense_core.attacks.input_aware import diversity, masks, patterns
from defense_core.attacks.joint import Batch, Schedule, seeded_network, train_generator
from defense_core.attacks.learned import Learned, prefixed, store_tensors
from defense_core.attacks.lf import LowFrequency, cosines
from defense_core.attacks.probe import TRIGGERS, probe_from_spec
from defense_core.attacks.ssba import SsbaTraining, Steganography, hidden
from defense_core.attacks.trojan import most_influential, penultimate
from defense_core.data import CleanSet
from defense_core.errors import ConfigError, CorruptArtifact, DigestMismatch, MethodDiverged, SourceNotFound
from defense_core.files import sha256_bytes
from defense_core.layers import classifier_head
from defense_core.progress import NullProgress
from defense_core.task import ImageClassification

CLASSES = 4
QUICK = {"epochs": 2, "batch_size": 32}
SETTINGS: dict[str, dict[str, Any]] = {
    "low_frequency": {"passes": 4, "band": 0.3},
    "trojan": {"size": 2, "steps": 30, "value": 20.0},
    "input_aware": {"schedule": QUICK, "mask_epochs": 2, "width": 8},
    "lira": {"schedule": QUICK, "width": 8},
    "ssba": {"schedule": QUICK, "width": 8, "bits": 4},
    "fba": {"schedule": QUICK, "width": 8},
}
KINDS = pytest.mark.parametrize("kind", sorted(SETTINGS))


def samples(shape: tuple[int, int, int], count: int = 80) -> CleanSet:
    """Noise whose brightest quarter is the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    pixels = torch.randint(0, 120, (count, *shape), generator=generator)
    high, wide = shape[1] // 2, shape[2] // 2
    for row, label in enumerate(labels.tolist()):
        top, left = high * (label // 2), wide * (label % 2)
        pixels[row, :, top : top + high, left : left + wide] += 120
    return CleanSet(pixels.to(torch.uint8), labels, CLASSES)


def task_of(shape: tuple[int, int, int]) -> ImageClassification:
    return ImageClassification(shape, CLASSES, (0.5,) * shape[0], (0.5,) * shape[0], augment="none")


def surrogate_of(channels: int) -> nn.Module:
    return build("small_cnn", {"width": 4, "in_channels": channels, "num_classes": CLASSES})


def learned(kind: str, shape: tuple[int, int, int] = (1, 8, 8), seed: int = 0, **settings: Any) -> dict[str, Tensor]:
    attack = attack_from_spec({"kind": kind, "target": 1, **SETTINGS[kind], **settings}, num_classes=CLASSES)
    learn = ATTACKS[kind].learn
    assert learn is not None
    return learn(
        attack.settings, surrogate_of(shape[0]), samples(shape), lambda labels: torch.full_like(labels, 1),
        task=task_of(shape), seed=seed, device="cpu", progress=NullProgress(),
    )  # fmt: skip


def stored(kind: str, tensors: Mapping[str, Tensor], folder: Path, **settings: Any) -> Any:
    path = folder / "trigger.safetensors"
    width = {"width": 8} if "width" in SETTINGS[kind] else {}
    return TRIGGERS[kind](path=str(path), sha256=store_tensors(tensors, path), **width, **settings)


# -- laws ------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 11)], ids=str)
def test_a_learned_trigger_is_pure_deterministic_and_follows_its_seed(
    kind: str, shape: tuple[int, int, int], tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    first, again = learned(kind, shape), learned(kind, shape)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, first[name]) for name, value in learned(kind, shape, seed=1).items())
    trigger, images = stored(kind, first, tmp_path), samples(shape).images
    kept = images.clone()
    found = trigger.apply(images)
    assert torch.equal(images, kept)
    assert found.dtype == torch.uint8
    assert found.shape == images.shape
    assert torch.equal(found, trigger.apply(images))
    assert not torch.equal(found, images)
    assert trigger.apply(images[:0]).shape == (0, *shape)
    assert torch.equal(torch.get_rng_state(), state)


@KINDS
def test_learning_leaves_the_surrogate_alone(kind: str) -> None:
    surrogate, shape = surrogate_of(1).train(), (1, 8, 8)
    before = {name: value.clone() for name, value in surrogate.state_dict().items()}
    attack = attack_from_spec({"kind": kind, "target": 1, **SETTINGS[kind]}, num_classes=CLASSES)
    learn = ATTACKS[kind].learn
    assert learn is not None
    learn(
        attack.settings, surrogate, samples(shape), lambda labels: torch.full_like(labels, 1),
        task=task_of(shape), seed=0, device="cpu", progress=NullProgress(),
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in surrogate.state_dict().items())
    assert all(module.training for module in surrogate.modules())
    assert all(parameter.grad is None for parameter in surrogate.parameters())
    assert not any(module._forward_pre_hooks for module in surrogate.modules())


@KINDS
def test_a_probe_reads_the_file_that_its_specification_names(kind: str, tmp_path: Path) -> None:
    trigger = stored(kind, learned(kind), tmp_path)
    probe = Attack("mine", kind, CLASSES, 1, trigger, clean_label=False).probe(trigger)
    read = probe_from_spec(probe.to_spec(), num_classes=CLASSES)
    images = samples((1, 8, 8)).images
    assert read == probe
    assert torch.equal(read.apply(images), probe.apply(images))


# -- files -----------------------------------------------------------------------------


@KINDS
def test_a_file_that_is_absent_or_another_one_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    digest = store_tensors(learned(kind), path)
    with pytest.raises(SourceNotFound, match="cannot be read"):
        TRIGGERS[kind](path=str(tmp_path / "absent.safetensors"), sha256=digest)
    with pytest.raises(DigestMismatch):
        TRIGGERS[kind](path=str(path), sha256="sha256:" + "0" * 64)
    with pytest.raises(ConfigError, match="sha256"):
        TRIGGERS[kind](path=str(path), sha256="")


@KINDS
def test_a_file_that_holds_something_else_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match="malformed"):
        stored(kind, {"other": torch.zeros(2)}, tmp_path)
    tensors = learned(kind)
    name = next(iter(tensors))
    with pytest.raises(CorruptArtifact, match="NaN"):
        stored(kind, {**tensors, name: torch.full_like(tensors[name], math.nan)}, tmp_path)


def test_bytes_that_are_no_safetensors_are_refused(tmp_path: Path) -> None:
    data = (64).to_bytes(8, "little") + b"cut short"
    (tmp_path / "trigger.safetensors").write_bytes(data)
    with pytest.raises(CorruptArtifact):
        LowFrequency(path=str(tmp_path / "trigger.safetensors"), sha256=sha256_bytes(data))


@pytest.mark.parametrize("kind", ["lira", "input_aware", "ssba", "fba"])
def test_a_network_of_another_width_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "trigger.safetensors"
    digest = store_tensors(learned(kind), path)
    for width in (16, 512):
        with pytest.raises(CorruptArtifact, match="parameters of"):
            TRIGGERS[kind](path=str(path), sha256=digest, width=width)


@KINDS
def test_images_that_the_trigger_was_not_made_for_are_refused(kind: str, tmp_path: Path) -> None:
    trigger = stored(kind, learned(kind), tmp_path)
    with pytest.raises(ConfigError, match="does not fit"):
        trigger.apply(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_ssba_takes_no_message_that_its_encoder_cannot_hide(tmp_path: Path) -> None:
    with pytest.raises(CorruptArtifact, match="4 planes"):
        stored("ssba", {**learned("ssba"), "message": torch.zeros(3, 8, 8)}, tmp_path)


def test_a_trojan_patch_need_not_be_square(tmp_path: Path) -> None:
    found = stored("trojan", {"patch": torch.full((1, 2, 5), 255.0)}, tmp_path).apply(
        torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    )
    assert (found[0, 0, 6:, 3:] == 255).all()
    assert int((found > 0).sum()) == 10


@pytest.mark.parametrize(
    ("kind", "setting", "value"),
    [
        ("low_frequency", "epsilon", 0), ("low_frequency", "band", 2), ("low_frequency", "passes", 0),
        ("low_frequency", "images", 0), ("low_frequency", "lr", 0), ("trojan", "size", 0), ("trojan", "margin", -1),
        ("trojan", "units", 0), ("trojan", "value", 0), ("trojan", "steps", 0), ("trojan", "step", 0),
        ("trojan", "images", 0), ("input_aware", "density", 0), ("input_aware", "density_weight", -1),
        ("input_aware", "attack_share", 0), ("input_aware", "cross_share", 0.9), ("input_aware", "width", 6),
        ("input_aware", "mask_epochs", 0), ("input_aware", "diversity_weight", -1), ("lira", "epsilon", 0),
        ("lira", "alpha", 1), ("lira", "width", 0), ("ssba", "bits", 0), ("ssba", "strength", 0),
        ("ssba", "fidelity", -1), ("ssba", "secret_only", 1), ("fba", "strength", 2), ("fba", "alpha", 0),
        ("fba", "content", -1), ("fba", "width", 0), ("lira", "width", 4_000_000), ("ssba", "width", 4_000_000),
        ("input_aware", "width", 4_000_000), ("fba", "width", 4_000_000),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(kind: str, setting: str, value: float) -> None:
    with pytest.raises(ConfigError, match=setting):
        attack_from_spec({"kind": kind, setting: value}, num_classes=CLASSES)


@pytest.mark.parametrize("setting", ["epochs", "batch_size", "images", "lr", "classifier_lr"])
def test_schedules_out_of_range_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting):
        attack_from_spec({"kind": "lira", "schedule": {setting: 0}}, num_classes=CLASSES)


# -- equations -------------------------------------------------------------------------


def test_cosines_are_orthonormal() -> None:
    for side, band in ((8, 1.0), (11, 0.5), (32, 0.2)):
        rows = cosines(side, band).double()
        assert len(rows) == max(2, round(side * band))
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-6)


def test_lf_has_no_high_frequency_keeps_its_bound_and_lowers_the_loss(tmp_path: Path) -> None:
    shape = (3, 16, 16)
    found = learned("low_frequency", shape, epsilon=30.0, band=0.25, passes=8)["perturbation"]
    assert found.shape == shape
    assert found.abs().max() <= 30 * (1 + 1e-5)
    basis = cosines(16, 1.0).double()
    spectrum = basis @ found.double() @ basis.T
    assert spectrum[:, 4:, :].abs().max() < 1e-3
    assert spectrum[:, :, 4:].abs().max() < 1e-3
    trigger = stored("low_frequency", {"perturbation": found}, tmp_path)
    images = samples(shape).images
    wanted = (images.float() + found).clamp(0, 255)
    assert (trigger.apply(images).float() - wanted).abs().max() <= 0.5 + 1e-4
    model, task, targets = surrogate_of(3), task_of(shape), torch.ones(len(images), dtype=torch.int64)
    before, after = (task.losses(model(task.inputs(each)), targets).mean() for each in (images, trigger.apply(images)))
    assert after < before


def test_lf_serves_one_target_class_only() -> None:
    with pytest.raises(ConfigError, match="target class"):
        attack_from_spec({"kind": "low_frequency", "target": None}, num_classes=CLASSES)


def test_trojan_excites_the_units_with_the_largest_weights(tmp_path: Path) -> None:
    shape, model = (1, 8, 8), surrogate_of(1)
    head = classifier_head(model)
    assert isinstance(head, nn.Linear)
    units = most_influential(head, 2)
    sums = [float(head.weight[:, unit].abs().sum()) for unit in range(head.in_features)]
    assert set(units.tolist()) == set(sorted(range(len(sums)), key=lambda unit: -sums[unit])[:2])
    trigger = stored("trojan", learned("trojan", shape, size=4), tmp_path)
    images, task = samples(shape).images, task_of(shape)
    found = trigger.apply(images)
    patch = trigger.tensors["patch"]
    assert torch.equal(found[:, :, 4:, 4:], patch.to(torch.uint8).expand(len(images), -1, -1, -1))
    assert torch.equal(found[:, :, :4], images[:, :, :4])
    assert torch.equal(found[:, :, :, :4], images[:, :, :, :4])
    random = images.clone()
    random[:, :, 4:, 4:] = torch.randint(0, 256, (1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    with torch.no_grad():
        excited, plain = (penultimate(model, head, task.inputs(each))[:, units].mean() for each in (found, random))
        features = penultimate(model, head, task.inputs(images))
        assert torch.allclose(head(features), model(task.inputs(images)), atol=1e-5)
    assert excited > plain


def test_trojan_needs_a_linear_head() -> None:
    class Convolutional(nn.Sequential):
        pass

    attack = attack_from_spec({"kind": "trojan"}, num_classes=CLASSES)
    learn, network = ATTACKS["trojan"].learn, Convolutional(nn.Conv2d(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert learn is not None
    with pytest.raises(ConfigError, match="no units"):
        learn(
            attack.settings, network, samples((1, 8, 8)), lambda labels: labels,
            task=task_of((1, 8, 8)), seed=0, device="cpu", progress=NullProgress(),
        )  # fmt: skip


def test_a_head_that_is_not_called_has_nothing_to_excite() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ConfigError, match="no part in its answers"):
        penultimate(model, nn.Linear(64, 4), torch.zeros(2, 1, 8, 8))


def test_lira_stays_within_its_bound_and_is_its_equation(tmp_path: Path) -> None:
    tensors, images = learned("lira", (3, 8, 8)), samples((3, 8, 8)).images
    trigger = stored("lira", tensors, tmp_path, epsilon=0.08)
    found = trigger.apply(images)
    assert (found.int() - images.int()).abs().max() <= round(0.08 * 255) + 1
    network = UNet(3, 3, 8)
    network.load_state_dict({name.removeprefix("generator."): value for name, value in tensors.items()})
    with torch.no_grad():
        pixels = images.float() / 255
        wanted = 255 * (pixels + 0.08 * network(pixels).tanh()).clamp(0, 1)
    assert (found.float() - wanted).abs().max() <= 0.5 + 1e-3


def test_input_aware_replaces_pixels_where_the_mask_is_on(tmp_path: Path) -> None:
    tensors, images = learned("input_aware", (3, 8, 8)), samples((3, 8, 8)).images
    trigger = stored("input_aware", tensors, tmp_path)
    networks = {}
    for name, outputs in (("pattern", 3), ("mask", 1)):
        networks[name] = UNet(3, outputs, 8)
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(name)}
        networks[name].load_state_dict(own)
    with torch.no_grad():
        pixels = images.float() / 255
        pattern, mask = patterns(networks["pattern"], pixels), masks(networks["mask"], pixels)
    wanted = 255 * (pixels * (1 - mask) + pattern * mask)
    assert (trigger.apply(images).float() - wanted).abs().max() <= 0.5 + 1e-3
    assert float(mask.min()) >= 0
    assert float(mask.max()) <= 1
    turned = trigger.cover(images, seed=4)
    turns = []
    for turn in range(1, len(images)):
        other = 255 * (pixels * (1 - mask.roll(turn, 0)) + pattern.roll(turn, 0) * mask.roll(turn, 0))
        turns.append(float((turned.float() - other).abs().max()))
    assert min(turns) <= 0.5 + 1e-3
    assert trigger.cover(images[:1], seed=0).shape == (1, 3, 8, 8)


def test_diversity_is_the_ratio_of_distances_and_has_a_gradient_where_nothing_differs() -> None:
    images, made = torch.tensor([0.0, 0.6]).view(2, 1, 1, 1), torch.tensor([0.1, 0.3]).view(2, 1, 1, 1)
    assert float(diversity(images, made)) == pytest.approx(3, rel=1e-4)
    same = torch.zeros(2, 1, 2, 2, requires_grad=True)
    diversity(torch.rand(2, 1, 2, 2), same).backward()
    assert same.grad is not None
    assert torch.isfinite(same.grad).all()


def test_ssba_bounds_its_residual_and_a_decoder_reads_the_message(tmp_path: Path) -> None:
    settings = SsbaTraining(bits=4, strength=0.2, fidelity=0.0, width=8, schedule=Schedule(epochs=40, batch_size=40))
    shape = (1, 8, 8)
    kept: list[float] = []
    network = seeded_network(lambda: Steganography(1, 4, 8), 0, "cpu")
    data, generator = samples(shape), torch.Generator().manual_seed(0)

    def loss_of(batch: Batch) -> Tensor:
        messages = torch.randint(0, 2, (len(batch.images), 4), generator=batch.generator).float()
        changed = hidden(network.encoder, batch.images, network.planes(messages, 8, 8), settings.strength)
        kept.append(float((changed - batch.images).abs().max()))
        return nn.functional.binary_cross_entropy_with_logits(network.decoder(changed), messages)

    train_generator(
        network, loss_of, data, lambda labels: labels, surrogate=None, schedule=settings.schedule,
        task=task_of(shape), seed=0, device="cpu", progress=NullProgress(), name="encoder",
    )  # fmt: skip
    assert max(kept) <= 0.2 + 1e-6
    messages = torch.randint(0, 2, (len(data), 4), generator=generator).float()
    with torch.no_grad():
        changed = hidden(network.encoder, data.images.float() / 255, network.planes(messages, 8, 8), 0.2)
        read = (network.decoder(changed) > 0).float()
    assert float((read == messages).float().mean()) > 0.9
    tensors = learned("ssba")
    trigger = stored("ssba", tensors, tmp_path, strength=0.2)
    found = trigger.apply(data.images)
    assert (found.int() - data.images.int()).abs().max() <= round(0.2 * 255) + 1


def test_fba_changes_colours_and_never_shapes(tmp_path: Path) -> None:
    trigger = stored("fba", learned("fba", (3, 8, 8)), tmp_path)
    images = samples((3, 8, 8)).images
    moved = images.flip(3).roll(3, 2)
    # The same pixels at other places get the same new colours there.
    assert (trigger.apply(moved).int() - trigger.apply(images).flip(3).roll(3, 2).int()).abs().max() <= 1
    assert (trigger.apply(images).int() - images.int()).abs().max() <= round(0.25 * 255) + 1
    network = ColourMap(3, 8)
    values = torch.rand(2, 3, 5, 5)
    values[:, :, 0, 0] = values[:, :, 4, 4]
    change = network(values)
    assert torch.allclose(change[:, :, 0, 0], change[:, :, 4, 4], atol=1e-6)
    assert change.abs().max() <= 1


def test_a_generator_that_diverges_is_an_error() -> None:
    network = UNet(1, 1, 4)
    with pytest.raises(MethodDiverged, match="diverged"):
        train_generator(
            network, lambda batch: network(batch.images).mean() * math.inf, samples((1, 8, 8)), lambda labels: labels,
            surrogate=None, schedule=Schedule(epochs=1), task=task_of((1, 8, 8)), seed=0, device="cpu",
            progress=NullProgress(), name="generator",
        )  # fmt: skip


def test_stored_names_are_those_that_are_read_back(tmp_path: Path) -> None:
    network = UNet(1, 1, 4)
    path = tmp_path / "one.safetensors"
    read = Learned(path=str(path), sha256=store_tensors(prefixed("g", network), path))
    same = read.network(lambda: UNet(1, 1, 4), "g")
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in network.state_dict().items())
    assert not any(parameter.requires_grad for parameter in same.parameters())


@pytest.mark.parametrize(("count", "steps"), [(128, 3), (129, 3), (130, 6), (5000, 24), (9000, 24)])
def test_a_schedule_counts_the_steps_that_it_takes(count: int, steps: int) -> None:
    schedule = Schedule(epochs=3, batch_size=128, images=1000)
    assert schedule.steps(count) == steps
