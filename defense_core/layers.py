"""The units that methods rank, mask or zero, and the BatchNorm policy.

A *unit* is one output filter of a convolution, or one output row of a linear layer. Every
method walks a network through :func:`unit_layers`, so that all of them mean the same thing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.errors import MethodNotApplicable

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHORTCUT_WORDS = ("shortcut", "downsample")
Scope = Literal["auto", "conv", "all"]


@dataclass(frozen=True, eq=False)
class UnitLayer:
    """One weight tensor whose first dimension counts units.

    Attributes:
        name: the parameter's full name (``"layer1.0.conv1.weight"``).
        weight: the parameter, (units, ...).
        kind: ``"conv"`` or ``"linear"``.
    """

    name: str
    weight: Tensor
    kind: Literal["conv", "linear"]

    @property
    def units(self) -> int:
        """Number of units."""
        return self.weight.shape[0]

    def rows(self, values: Tensor) -> Tensor:
        """``values``, shaped like the weight, as (units, fan_in)."""
        return values.reshape(self.units, -1)


def unit_layers(model: nn.Module, *, scope: Scope = "auto") -> list[UnitLayer]:
    """Weights whose units a method may rank, in module order.

    The classifier head is never among them, nor are shortcut projections (they carry no
    unit of their own: their outputs are added to those of the main branch), weights that two modules
    share, or weights that are computed from others (a parametrisation): no one unit is theirs.

    Args:
        scope: ``"conv"``: convolutions only. ``"all"``: convolutions and linear layers,
            attention projections included. ``"auto"``: convolutions in a network where they
            outnumber the hidden linear layers (CNNs), else all (transformers, MLPs, mixers).
    """
    head = classifier_head(model)
    own = own_parameters(model)
    layers: list[UnitLayer] = []
    for name, module in model.named_modules():
        if any(word in name.lower() for word in SHORTCUT_WORDS) or module is head:
            continue
        if isinstance(module, CONVOLUTIONS):
            layers.append(UnitLayer(f"{name}.weight", module.weight, "conv"))
        elif isinstance(module, nn.Linear):
            layers.append(UnitLayer(f"{name}.weight", module.weight, "linear"))
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            layers.append(UnitLayer(f"{name}.in_proj_weight", module.in_proj_weight, "linear"))
    layers = [layer for layer in layers if id(layer.weight) in own]
    convolutions = [layer for layer in layers if layer.kind == "conv"]
    if scope == "conv" or (scope == "auto" and 2 * len(convolutions) > len(layers)):
        return convolutions
    return layers


def own_parameters(model: nn.Module) -> set[int]:
    """``id`` of every parameter that one module alone has: none that is shared, nothing that is computed."""
    uses = Counter(id(value) for module in model.modules() for value in module.parameters(recurse=False))
    return {parameter for parameter, count in uses.items() if count == 1}


def linear_head(model: nn.Module, *, method: str) -> nn.Linear:
    """The classifier, for a method that works on linear ones alone.

    Raises:
        MethodNotApplicable: it is another.
    """
    head = classifier_head(model)
    if not isinstance(head, nn.Linear):
        raise MethodNotApplicable(
            f"{method} needs a linear classifier",
            expected="a network that ends in nn.Linear",
            got=type(head).__name__,
            hint="Use another method",
        )
    return head


def classifier_head(model: nn.Module) -> nn.Module | None:
    """The last linear layer in module order, or the last 1x1 convolution where there is none."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if linears:
        return linears[-1]
    convolutions = [m for m in model.modules() if isinstance(m, CONVOLUTIONS) and set(m.kernel_size) == {1}]
    return convolutions[-1] if convolutions else None


def first_argument(arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a module was called on, as a hook sees its call, also where it was given by name."""
    return arguments[0] if arguments else next(iter(named.values()))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any layer normalises by the batch or by statistics of former ones."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm layers leave their running statistics alone; their modes stay as they are.

    In training mode they go on to normalise by the batch. Restored on every exit path.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in layers:
            layer.track_running_stats = True


@contextmanager
def running_statistics(model: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """BatchNorm layers normalise by their running statistics and leave them alone.

    Args:
        frozen: false changes nothing.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)] if frozen else []
    modes = [layer.training for layer in layers]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer, training in zip(layers, modes, strict=True):
            layer.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, each module's own mode restored on every exit path."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def is_finite(model: nn.Module) -> bool:
    """Whether every floating-point parameter and buffer is finite."""
    tensors = [*model.parameters(), *model.buffers()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())
