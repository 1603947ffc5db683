"""Which weights are units, which layer is the head, and modes that come back whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from defense_core.architectures import build
from defense_core.layers import classifier_head, evaluating, frozen_statistics, is_finite, unit_layers


class Stopped(Exception):
    """An error that no one knows."""


def names(model: nn.Module, scope: Any = "auto") -> list[str]:
    return [layer.name for layer in unit_layers(model, scope=scope)]


# -- units -------------------------------------------------------------------------------


def test_small_cnn_units_are_its_filters() -> None:
    model = build("small_cnn", {"width": 4, "num_classes": 3})
    layers = unit_layers(model)
    assert [(layer.name, layer.kind, layer.units) for layer in layers] == [
        ("conv1.weight", "conv", 4),
        ("conv2.weight", "conv", 8),
        ("conv3.weight", "conv", 16),
    ]
    assert layers[1].weight is model.conv2.weight
    assert layers[1].rows(layers[1].weight).shape == (8, 4 * 9)


@pytest.mark.parametrize("name", ["preact_resnet18", "resnet18", "resnet20", "wrn16_1", "torchvision:resnet18"])
def test_shortcuts_have_no_units(name: str) -> None:
    model = build(name, {"num_classes": 4})
    found = names(model, "all")
    projections = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)]
    shortcuts = [n for n in projections if "shortcut" in n.lower() or "downsample" in n]
    assert found
    assert not [n for n in found if "shortcut" in n.lower() or "downsample" in n]
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert found == [f"{n}.weight" for n in convolutions if n not in shortcuts]
    if name != "resnet20":
        assert shortcuts, "the network has projections to leave out"


def test_vit_units_are_its_linear_layers_without_the_head() -> None:
    model = build("vit_tiny", {"image_size": 8, "dim": 12, "depth": 2, "num_classes": 4})
    found = unit_layers(model)
    assert [layer.name for layer in found] == ["patch_embed.proj.weight"] + [
        f"blocks.{block}.{part}.weight"
        for block in range(2)
        for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert {layer.name: layer.units for layer in found}["blocks.0.attn.qkv.weight"] == 36
    assert names(model, "conv") == ["patch_embed.proj.weight"]


def test_fused_attention_projections_are_units() -> None:
    model = VisionTransformer(32, 16, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)
    found = {layer.name: layer for layer in unit_layers(model)}
    fused = found["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"]
    assert fused.units == 3 * 8
    assert fused.kind == "linear"
    assert "encoder.layers.encoder_layer_0.self_attention.out_proj.weight" in found
    assert not [name for name in found if name.startswith("heads")]


def test_an_mlp_has_linear_units_and_a_convolutional_network_only_filters() -> None:
    mlp = nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    assert names(mlp) == ["1.weight", "3.weight"]
    assert names(mlp, "conv") == []
    convolutional = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    assert names(convolutional) == ["0.weight", "1.weight"]
    assert names(convolutional, "all") == ["0.weight", "1.weight", "3.weight"]


def test_weights_of_two_modules_and_computed_weights_have_no_units() -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(4)), nn.Flatten(), nn.Linear(4, 2))
    model[2].weight = model[1].weight  # type: ignore[union-attr]
    nn.utils.parametrizations.weight_norm(model[3])  # type: ignore[arg-type]
    assert names(model) == ["0.weight"]


def test_every_unit_layer_is_a_parameter_of_the_model() -> None:
    model = build("preact_resnet18", {"width": 4, "num_classes": 3})
    parameters = dict(model.named_parameters())
    for layer in unit_layers(model, scope="all"):
        assert parameters[layer.name] is layer.weight
        assert layer.rows(layer.weight).shape == (layer.units, layer.weight[0].numel())


# -- head --------------------------------------------------------------------------------


def test_head_is_the_last_linear_layer() -> None:
    model = build("small_cnn", {"width": 2, "num_classes": 3})
    assert classifier_head(model) is model.linear


def test_head_of_a_fully_convolutional_network_is_its_last_pointwise_convolution() -> None:
    model = build("torchvision:squeezenet1_1", {"num_classes": 3})
    head = classifier_head(model)
    assert isinstance(head, nn.Conv2d)
    assert head.out_channels == 3
    assert "classifier.1.weight" not in names(model, "all")


def test_a_network_without_either_has_no_head() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert classifier_head(model) is None
    assert names(model) == ["0.weight"]


# -- modes and statistics ------------------------------------------------------------------


def mixed() -> nn.Module:
    """BatchNorm in both modes, one of them without statistics."""
    model = nn.Sequential(
        nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()), nn.BatchNorm1d(4, track_running_stats=False)
    )
    model.train()
    model[1].eval()
    return model


def modes(model: nn.Module) -> list[tuple[bool, Any]]:
    return [(module.training, getattr(module, "track_running_stats", None)) for module in model.modules()]


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


def test_evaluating_sets_and_restores_every_mode() -> None:
    model = mixed()
    before = modes(model)
    with evaluating(model) as same:
        assert same is model
        assert not any(module.training for module in model.modules())
    assert modes(model) == before


def test_frozen_statistics_normalise_by_the_batch_and_stay() -> None:
    model, batch = nn.BatchNorm1d(4).train(), torch.randn(8, 4) * 3 + 5
    before = statistics(model)
    with frozen_statistics(model):
        frozen = model(batch)
    assert all(torch.equal(one, other) for one, other in zip(statistics(model), before, strict=True))
    assert torch.equal(frozen, model(batch))
    assert int(model.num_batches_tracked) == 1


def test_frozen_statistics_are_still_used_in_eval_mode() -> None:
    model, batch = nn.BatchNorm1d(4).eval(), torch.randn(8, 4) * 3 + 5
    expected = model(batch)
    with frozen_statistics(model):
        assert torch.equal(model(batch), expected)


@pytest.mark.parametrize("context", [evaluating, frozen_statistics])
def test_everything_is_restored_after_an_exception(context: Any) -> None:
    model = mixed()
    before = modes(model)
    with pytest.raises(Stopped), context(model):
        raise Stopped
    assert modes(model) == before


def test_layers_without_statistics_are_left_without() -> None:
    model = mixed()
    with frozen_statistics(model):
        assert not any(module.track_running_stats for module in model.modules() if isinstance(module, nn.BatchNorm1d))
    assert [module.track_running_stats for module in model.modules() if isinstance(module, nn.BatchNorm1d)] == [
        True,
        True,
        False,
    ]


# -- finiteness --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_is_finite_sees_parameters_and_statistics(value: float) -> None:
    model = build("small_cnn", {"width": 2, "num_classes": 2})
    assert is_finite(model)
    for tensor in (model.conv2.weight, model.linear.bias, model.bn3.running_var):
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[-1] = value
            assert not is_finite(model)
            tensor.copy_(kept)
    assert is_finite(model)
