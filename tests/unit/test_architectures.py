"""Names to networks: shapes, parameter names, determinism, and everything that is refused."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from defense_core.architectures import build, count_parameters, initialise, known, outline
from defense_core.errors import ArchitectureNotAllowed, ConfigError

NETWORKS = [
    ("preact_resnet18", {"width": 8}, (3, 32, 32)),
    ("preact_resnet18", {"width": 8, "in_channels": 1}, (1, 28, 28)),
    ("preact_resnet18", {"width": 8, "in_channels": 1}, (1, 8, 8)),
    ("resnet18", {"width": 8}, (3, 32, 32)),
    ("resnet18", {"width": 8, "in_channels": 1}, (1, 28, 28)),
    ("resnet20", {}, (3, 32, 32)),
    ("wrn16_1", {}, (3, 32, 32)),
    ("vgg19_bn", {"width": 8}, (3, 32, 32)),
    ("vgg19_bn", {"width": 8, "in_channels": 1}, (1, 28, 28)),
    ("vit_tiny", {"dim": 24, "depth": 2, "heads": 3}, (3, 32, 32)),
    ("vit_tiny", {"dim": 24, "depth": 1, "image_size": 28, "patch_size": 7, "in_channels": 1}, (1, 28, 28)),
    ("small_cnn", {"width": 4}, (1, 8, 8)),
    ("torchvision:resnet18", {}, (3, 64, 64)),
    ("squeezenet1_1", {}, (3, 64, 64)),
    ("mobilenet_v3_small", {}, (3, 64, 64)),
]
SOURCE = """
    from os import system
    from torch import nn

    def make(num_classes: int = 5, hidden: int = 4) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, num_classes))

    def not_a_network() -> int:
        return 3

    def broken() -> nn.Module:
        raise OSError("no such file")
"""


def counted(name: str, arguments: dict[str, Any]) -> int:
    """Parameters of the network, without memory for them."""
    network = outline(name, arguments)
    assert network is not None
    return count_parameters(network)


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "ownnets_x").mkdir()
    (tmp_path / "ownnets_x" / "__init__.py").write_text("")
    (tmp_path / "ownnets_x" / "models.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "ownnets_x.models"
    for name in [name for name in sys.modules if name.startswith("ownnets_x")]:
        del sys.modules[name]


@pytest.mark.parametrize(("name", "arguments", "size"), NETWORKS)
def test_network_gives_logits_and_second_derivatives(
    name: str, arguments: dict[str, int], size: tuple[int, ...]
) -> None:
    model = build(name, {"num_classes": 7, **arguments})
    assert not model.training
    assert all(p.dtype is torch.float32 and p.device.type == "cpu" and p.requires_grad for p in model.parameters())
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    assert sum(p.numel() for p in model.parameters()) == counted(name, {"num_classes": 7, **arguments})
    images = torch.randn(2, *size)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert torch.allclose(logits, model(images.to(memory_format=torch.channels_last)), atol=1e-4)
    parameters = list(model.parameters())
    first = torch.autograd.grad(logits.logsumexp(1).sum(), parameters, create_graph=True, allow_unused=True)
    norm = torch.stack([gradient.pow(2).sum() for gradient in first if gradient is not None]).sum()
    second = torch.autograd.grad(norm, parameters, allow_unused=True)
    assert any(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in second)


def test_preact_resnet18_has_the_names_of_public_checkpoints() -> None:
    state = build("preact_resnet18", {}).state_dict()
    assert {"conv1.weight", "layer1.0.bn1.weight", "layer1.0.conv1.weight", "layer1.0.bn2.running_var"} <= set(state)
    assert state["layer2.0.shortcut.0.weight"].shape == (128, 64, 1, 1)
    assert state["linear.weight"].shape == (10, 512)
    assert not any(name.startswith(("bn", "layer1.0.shortcut")) for name in state)
    assert sum(v.numel() for n, v in state.items() if "running" not in n and "num_batches" not in n) == 11_171_146


def test_cifar_networks_have_the_sizes_of_their_papers() -> None:
    assert counted("resnet18", {}) == 11_173_962
    assert counted("resnet20", {}) == 269_722  # 0.27 M, He et al. table 6
    assert counted("wrn16_1", {}) == 175_066
    assert "block2.layer.0.convShortcut.weight" in build("wrn16_1", {}).state_dict()
    assert "layer2.0.shortcut.1.running_mean" in build("resnet18", {"width": 4}).state_dict()


def test_bare_name_is_the_small_network_and_the_prefix_is_torchvision() -> None:
    small = build("vgg19_bn", {"width": 4})
    assert small.get_submodule("classifier").__class__ is nn.Linear
    large = counted("torchvision:vgg19_bn", {})
    assert large is not None
    assert large > 100_000_000


def test_build_is_deterministic_and_leaves_the_random_state() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = build("small_cnn", {"width": 4})
    assert torch.equal(torch.rand(3), expected)
    two = build("small_cnn", {"width": 4})
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def test_small_cnn_learns_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16 - 0.5
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fit, held = order[:1300], order[1300:]
    model = build("small_cnn", {}).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        for batch in fit[torch.randperm(len(fit), generator=generator)].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[held]).argmax(1) == labels[held]).float().mean().item()
    assert accuracy > 0.97


def test_whole_floats_are_ints_as_pipeline_parameters_need() -> None:
    model = build("small_cnn", {"width": 4.0, "num_classes": 3.0})
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 3)
    assert build("squeezenet1_1", {"num_classes": 4.0})(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_known_lists_the_allow_list() -> None:
    names = known()
    assert {"preact_resnet18", "small_cnn", "densenet121", "torchvision:resnet18"} <= set(names)
    assert list(names) == sorted(names)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("preact_resnet19", {}, "Did you mean preact_resnet18"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "Weights come from the model file alone"),
        ("densenet121", {"pretrained": True}, "Weights come from the model file alone"),
        ("googlenet", {"weights_backbone": "DEFAULT"}, "Weights come from the model file alone"),
        ("timm:hf-hub:someone/something", {}, "allow-list"),
        ("timm:local-dir:/tmp/x", {}, "allow-list"),
        ("os:system", {"command": "true"}, "trusted module"),
        ("builtins:eval", {}, "trusted module"),
        ("ownnets:make:extra", {}, "malformed"),
        ("../evil:make", {}, "malformed"),
        ("", {}, "allow-list"),
    ],
)
def test_what_is_not_allowed(name: str, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ArchitectureNotAllowed, match=words):
        build(name, arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("preact_resnet18", {"widht": 8}, "Did you mean 'width'"),
        ("preact_resnet18", {"width": "8"}, "whole number"),
        ("preact_resnet18", {"width": 8.5}, "whole number"),
        ("preact_resnet18", {"width": True}, "whole number"),
        ("preact_resnet18", {"width": 10**9}, "width is out of range"),
        ("preact_resnet18", {"num_classes": 0}, "num_classes is out of range"),
        ("preact_resnet18", {"in_channels": 10**9}, "in_channels is out of range"),
        ("preact_resnet18", {"width": torch.ones(1)}, "JSON type"),
        ("vit_tiny", {"heads": 5}, "divisor of dim"),
        ("vit_tiny", {"patch_size": 5}, "divisor of image_size"),
        ("densenet121", {"foo": 1}, "cannot be built"),
        ("mobilenet_v2", {"inverted_residual_setting": [[1, 16, 10**9, 1]]}, "too large"),
        ("densenet121", {"growth_rate": 10**400}, "too large"),
        ("densenet121", {"growth_rate": 10**400, "drop_rate": 0.5}, "too large"),
    ],
)
def test_wrong_arguments_name_the_valid_ones(name: str, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(name, arguments)


def test_timm_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ArchitectureNotAllowed, match="pip install timm"):
        build("timm:resnet18", {})


@pytest.mark.parametrize("trusted", ["ownnets_x", "ownnets_x.models", "ownnets_x.models:make"])
def test_own_factory_in_a_trusted_module(own_package: str, trusted: str) -> None:
    model = build(f"{own_package}:make", {"num_classes": 4, "hidden": 3.0}, trusted_modules=(trusted,))
    assert model(torch.zeros(2, 3, 2, 2)).shape == (2, 4)
    assert not any(getattr(module, "inplace", False) for module in model.modules())
    assert outline(f"{own_package}:make", {}) is None


@pytest.mark.parametrize("trusted", [(), ("ownnets",), ("ownnets_x.other",), ("ownnets_x.models:broken",)])
def test_own_factory_outside_the_allow_list_is_not_even_imported(own_package: str, trusted: tuple[str, ...]) -> None:
    with pytest.raises(ArchitectureNotAllowed, match="trusted module"):
        build(f"{own_package}:make", {}, trusted_modules=trusted)
    assert own_package not in sys.modules


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        ("system", ArchitectureNotAllowed, "no trusted factory"),
        ("nn", ArchitectureNotAllowed, "no trusted factory"),
        ("maek", ArchitectureNotAllowed, "Did you mean ownnets_x.models:make"),
        ("not_a_network", ArchitectureNotAllowed, "returned no network"),
        ("broken", ConfigError, "OSError: no such file"),
    ],
)
def test_trusted_module_with_an_unusable_factory(
    own_package: str, factory: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        build(f"{own_package}:{factory}", {}, trusted_modules=("ownnets_x",))


def test_own_factory_arguments_are_checked(own_package: str) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hidden'"):
        build(f"{own_package}:make", {"hiden": 3}, trusted_modules=("ownnets_x",))


@pytest.mark.parametrize("entry", ["os", "builtins:eval", "torch", "", "*", "own package", ".x", "a/b"])
def test_allow_list_refuses_whole_libraries_and_nonsense(entry: str) -> None:
    with pytest.raises(ConfigError, match="trusted_modules"):
        build("mynets:make", {}, trusted_modules=(entry,))


def test_missing_module_is_typed() -> None:
    with pytest.raises(ArchitectureNotAllowed, match="cannot be imported"):
        build("surely_not_installed_xyz:make", {}, trusted_modules=("surely_not_installed_xyz",))


def test_initialising_draws_by_its_seed_and_seeds_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    layers = [nn.Linear(3, 3) for _ in range(3)]
    before = torch.get_rng_state()
    for layer, seed in zip(layers, (1, 1, 2), strict=True):
        initialise(layer, seed)
    one, other, third = (layer.weight for layer in layers)
    assert torch.equal(one, other)
    assert not torch.equal(one, third)
    assert torch.equal(torch.get_rng_state(), before)
    assert seeded == []


def test_arguments_that_are_nested_too_deeply() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(ConfigError, match="too deeply"):
        build("torchvision:resnet18", {"norm_layer": deep})
