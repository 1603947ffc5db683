"""Multiplicative masks on a network's units: where they stand, how they train, how they fold.

A masked tensor is ``W' = m * W``, where ``m`` has W's leading dimensions only and is broadcast
over the others; the bias is left alone. On a normalisation this scales gamma. On a convolution
or linear layer a mask of one dimension scales output units, one of two dimensions scales each
unit's kernels, one an input channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from defense_core.errors import MethodDiverged, MethodNotApplicable
from defense_core.layers import classifier_head, evaluating, first_argument, own_parameters, unit_layers

NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
Sites = Literal["norm", "auto", "all"]
Granularity = Literal["unit", "kernel"]
JUMP = 1e6
"""A mask that moves so far in one step was not trained but thrown."""


@dataclass(frozen=True)
class MaskSite:
    """One masked tensor.

    Attributes:
        name: the parameter's full name (``"layer1.0.bn1.weight"``).
        shape: of the mask: (units,), or (units, input channels).
        kind: ``"norm"``: a normalisation's scale; ``"unit"``: a weight's output units.
    """

    name: str
    shape: tuple[int, ...]
    kind: Literal["norm", "unit"]


class Mask(nn.Module):
    """The parametrisation ``W -> m * W``.

    Attributes:
        values: m, float32, of the site's shape, ones until set.
    """

    def __init__(self, shape: tuple[int, ...], *, device: torch.device) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(shape, device=device))

    def forward(self, weight: Tensor) -> Tensor:
        return weight * _broadcast(self.values, weight)


class Reach:
    """How far masks were moved before they were clamped: one that is thrown was not trained.

    Args:
        values: of the masks, looked at where they are.

    Attributes:
        farthest: largest absolute value so far, a scalar; for checkpoints.
    """

    def __init__(self, values: Sequence[Tensor], device: torch.device | str) -> None:
        self._values = values
        self.farthest = torch.zeros((), device=device)

    @torch.no_grad()
    def note(self) -> None:
        """Look at the masks as they are."""
        self.farthest.copy_(torch.stack([self.farthest, *(each.abs().max() for each in self._values)]).max())

    def require_trained(self, method: str) -> None:
        """Raises MethodDiverged for masks that jumped, or are NaN."""
        if not float(self.farthest) < JUMP:
            raise MethodDiverged(
                f"{method}'s masks diverged",
                expected=f"masks that move less than {JUMP:g} a step",
                got=f"{float(self.farthest):g}",
                hint="Lower its learning rate",
            )


def mask_sites(
    model: nn.Module, inputs: Tensor, *, sites: Sites = "auto", granularity: Granularity = "unit"
) -> list[MaskSite]:
    """Tensors that carry a mask, in module order: none that several modules share.

    Args:
        inputs: a batch of normalised inputs; one forward pass shows which layers a
            normalisation follows directly.
        sites: ``"norm"``: scales of normalisations only, as in the papers. ``"auto"``: these,
            and the output units of the convolutions (in transformers: of the attention and
            MLP layers) that no normalisation follows directly. ``"all"``: every normalisation
            and every unit.
        granularity: of units' masks: one value a ``"unit"``, or one a ``"kernel"``, that is
            for each pair of a unit and an input channel.

    Raises:
        MethodNotApplicable: there is nothing to mask.
    """
    own = own_parameters(model)
    norms = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, NORMS) and id(module.weight) in own and module.weight.dim() == 1
    }
    units: set[str] = set()
    if sites != "norm":
        followed = set(following_norms(model, inputs)) if sites == "auto" else set()
        units = {layer.name for layer in unit_layers(model)} - followed
    dimensions = 2 if granularity == "kernel" else 1
    found = [
        MaskSite(name, tuple(parameter.shape[:dimensions]), "norm" if name in norms else "unit")
        for name, parameter in model.named_parameters()
        if name in norms or name in units
    ]
    if not found:
        raise MethodNotApplicable(
            "there is nothing to mask",
            expected="normalisations with a scale" if sites == "norm" else "normalisations, or hidden layers",
            got=type(model).__name__,
            hint='Set sites to "all"' if sites != "all" else "Use another method",
        )
    return found


@torch.no_grad()
def following_norms(model: nn.Module, inputs: Tensor) -> dict[str, str]:
    """Name of each weight whose layer's output is, as it is, the input of a normalisation, and
    that normalisation's name."""
    head = classifier_head(model)
    made: list[tuple[str, Tensor]] = []
    followed: dict[str, str] = {}

    def remember(name: str) -> Any:
        return lambda module, arguments, output: made.append((f"{name}.weight", output))

    def compare(norm: str) -> Any:
        def of_input(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            given = first_argument(arguments, named)
            followed.update({name: norm for name, output in made if output is given and name not in followed})

        return of_input

    handles = []
    try:
        for name, module in model.named_modules():
            if isinstance(module, NORMS):
                handles.append(module.register_forward_pre_hook(compare(name), with_kwargs=True))
            elif getattr(module, "weight", None) is not None and module is not head:
                handles.append(module.register_forward_hook(remember(name)))
        with evaluating(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return followed


def attach_masks(model: nn.Module, sites: list[MaskSite], starts: list[Tensor] | None = None) -> list[Mask]:
    """Put masks on ``model`` in place, at ``starts`` or at 1; afterwards only they are trainable."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    masks = []
    for site in sites:
        owner, _, name = site.name.rpartition(".")
        module = model.get_submodule(owner)
        mask = Mask(site.shape, device=getattr(module, name).device)
        parametrize.register_parametrization(module, name, mask)
        masks.append(mask)
    with torch.no_grad():
        for mask, start in zip(masks, starts or [mask.values for mask in masks], strict=True):
            mask.values.copy_(start)
    return masks


@torch.no_grad()
def fold_masks(model: nn.Module, sites: list[MaskSite], values: list[Tensor]) -> None:
    """Multiply masks into the ordinary weights of ``model``, in place."""
    for site, value in zip(sites, values, strict=True):
        weight = model.get_parameter(site.name)
        weight.mul_(_broadcast(value.to(weight), weight))


def _broadcast(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(*values.shape, *[1] * (weight.dim() - values.dim()))
