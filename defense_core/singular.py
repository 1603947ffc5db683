"""Weights as functions of shifts of their singular values, and the Fisher matrix of the shifts.

``W(delta) = U diag(relu(s + delta)) V^T`` with ``Wbar = U diag(s) V^T`` fixed: a layer of O x I
weights is left with ``min(O, I)`` numbers to train. A convolution's weight is the O x (I kh kw)
matrix of its filters. The gradient of a shift needs no gradient of the weight:
``d loss / d delta_k = sum_l (U^T g_l)_k (V^T a_l)_k`` over the positions l of the input patches
``a_l`` and output gradients ``g_l``, and so the shifts' per-sample gradients cost about one more
forward pass, exact and differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from defense_core.calls import once_per_sample, recorded
from defense_core.layer_gradients import plain_convolution
from defense_core.layers import CONVOLUTIONS, own_parameters
from defense_core.per_sample import Losses, samples_apart


class ShiftedSpectrum(nn.Module):
    """A weight as a function of the shift (R,) of its singular values, zero at first.

    Computed as ``Wbar + U diag(relu(s + delta) - s) V^T``, the same in exact arithmetic, so that
    a zero shift gives ``Wbar`` itself and not its rounded decomposition.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # In float32 some processors' LAPACK turns the singular vectors by 1e-5.
        factors = torch.linalg.svd(weight.detach().flatten(1).double(), full_matrices=False)
        left, values, right = (factor.to(weight.dtype) for factor in factors)
        self.register_buffer("weight", weight.detach().clone())
        self.register_buffer("left", left)
        self.register_buffer("values", values)
        self.register_buffer("right", right)
        self.weight: Tensor
        self.left: Tensor
        self.values: Tensor
        self.right: Tensor

    def forward(self, shift: Tensor) -> Tensor:
        """The weight, shaped and typed like the original."""
        change = torch.relu(self.values + shift) - self.values
        return self.weight + ((self.left * change) @ self.right).view_as(self.weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The shift that stands for the original weight."""
        return torch.zeros_like(self.values)


@dataclass(frozen=True, eq=False)
class ShiftLayer:
    """One weight that is trained through its shift.

    Attributes:
        path: the module's name.
        part: the weight's name in it.
    """

    path: str
    part: str

    @property
    def weight_name(self) -> str:
        """Name of the weight in the ordinary model."""
        return f"{self.path}.{self.part}" if self.path else self.part

    @property
    def shift_name(self) -> str:
        """Name of the shift in the parametrised model."""
        stem = f"parametrizations.{self.part}.original"
        return f"{self.path}.{stem}" if self.path else stem

    def spectrum(self, model: nn.Module) -> ShiftedSpectrum:
        """The layer's decomposition in a parametrised model."""
        found = model.get_submodule(f"{self.path}.parametrizations.{self.part}.0".lstrip("."))
        assert isinstance(found, ShiftedSpectrum)
        return found


def shift_layers(model: nn.Module) -> list[ShiftLayer]:
    """Weights of every convolution and linear layer, head, shortcuts and attention projections
    included, in module order. Weights that two modules share are left out."""
    own = own_parameters(model)
    layers = []
    for path, module in model.named_modules():
        part = "in_proj_weight" if isinstance(module, nn.MultiheadAttention) else "weight"
        weight = getattr(module, part, None)
        fits = isinstance(module, (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention))
        if fits and id(weight) in own:
            layers.append(ShiftLayer(path, part))
    return layers


def parametrise(model: nn.Module, layers: Sequence[ShiftLayer]) -> None:
    """Put the shifts in place of the weights, in place: every shift zero, U, s, V in buffers."""
    for layer in layers:
        module = model.get_submodule(layer.path)
        parametrize.register_parametrization(module, layer.part, ShiftedSpectrum(getattr(module, layer.part)))


@torch.no_grad()
def fold(tuned: nn.Module, layers: Sequence[ShiftLayer], into: nn.Module) -> None:
    """Write a parametrised model into an ordinary one: weights, biases, norms and statistics.

    A weight whose shift is zero is not written at all, and keeps its bytes.
    """
    state = into.state_dict()
    for name, value in tuned.state_dict().items():
        if name in state:
            state[name].copy_(value)
    shifts = dict(tuned.named_parameters())
    for layer in layers:
        if shifts[layer.shift_name].any():
            state[layer.weight_name].copy_(getattr(tuned.get_submodule(layer.path), layer.part))


def shift_gradients(
    model: nn.Module,
    layers: Sequence[ShiftLayer],
    inputs: Tensor,
    targets: Tensor,
    *,
    losses: Losses,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """Gradient of each sample's loss in the shifts, exact, in eval mode.

    Args:
        model: parametrised.
        layers: those of :func:`ruled_layers`.
        inputs: (N, ...), as the model wants them.
        targets: (N,).
        losses: per-sample loss.
        create_graph: keep the graph, for a loss that contains the result.

    Returns:
        Shift name to (N, R).
    """
    if not layers:
        return {}
    modules = {layer.path: model.get_submodule(layer.path) for layer in layers}
    shifts = dict(model.named_parameters())
    with samples_apart(model), recorded(modules) as seen, torch.enable_grad():
        loss = losses(model(inputs), targets).sum()
        outputs = [seen.outputs[layer.path][0] for layer in layers]
        behind = torch.autograd.grad(loss, outputs, create_graph=create_graph)
        rows = {}
        for layer, gradient in zip(layers, behind, strict=True):
            spectrum = layer.spectrum(model)
            alive = spectrum.values + shifts[layer.shift_name] > 0
            products = _products(modules[layer.path], spectrum, seen.inputs[layer.path][0], gradient)
            rows[layer.shift_name] = products * alive
    return rows if create_graph else {name: value.detach() for name, value in rows.items()}


def _products(module: nn.Module, spectrum: ShiftedSpectrum, inputs: Tensor, gradient: Tensor) -> Tensor:
    """``sum_l (U^T g_l)_k (V^T a_l)_k``, (N, R)."""
    if isinstance(module, nn.Conv2d):
        filters = spectrum.right.view(-1, *spectrum.weight.shape[1:])
        projected = F.conv2d(inputs, filters, stride=module.stride, padding=module.padding, dilation=module.dilation)
        turned = torch.einsum("or,no...->nr...", spectrum.left, gradient)
        return (turned * projected).flatten(2).sum(2)
    products = (gradient @ spectrum.left) * (inputs @ spectrum.right.T)
    return products.reshape(len(products), -1, products.shape[-1]).sum(1)


def ruled_layers(
    model: nn.Module, layers: Sequence[ShiftLayer], inputs: Tensor, targets: Tensor, *, losses: Losses
) -> list[ShiftLayer]:
    """The layers whose shifts have the exact rule.

    These are linear layers and ungrouped, zero-padded 2-d convolutions that a forward pass calls
    once, and whose per-sample gradients on the samples given add up to autograd's.
    """
    candidates = {
        layer.path: layer for layer in layers if layer.part == "weight" and _has_rule(model.get_submodule(layer.path))
    }
    modules = {path: model.get_submodule(path) for path in candidates}
    with samples_apart(model):
        once = [candidates[path] for path in once_per_sample(model, modules, inputs)]
    if not once:
        return []
    rows = shift_gradients(model, once, inputs, targets, losses=losses)
    named = dict(model.named_parameters())
    with samples_apart(model), torch.enable_grad():
        loss = losses(model(inputs), targets).sum()
        whole = torch.autograd.grad(loss, [named[layer.shift_name] for layer in once], allow_unused=True)
    return [
        layer
        for layer, gradient in zip(once, whole, strict=True)
        if gradient is not None and _agree(rows[layer.shift_name].sum(0), gradient)
    ]


def _agree(total: Tensor, gradient: Tensor) -> bool:
    """Whether two gradients are equal up to rounding; never where one is NaN."""
    return bool((total - gradient).abs().max() <= 1e-3 * gradient.abs().max())


def _has_rule(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return plain_convolution(module) and module.groups == 1
    return isinstance(module, nn.Linear)
