"""Names to networks: an allow-list, because the name often comes from the artifact itself.

=========================  =================================================================
name                       network
=========================  =================================================================
``preact_resnet18`` …      one of this project's small-image networks (:mod:`defense_core.networks`)
``densenet121`` …          torchvision's classification model of that name, without weights
``torchvision:resnet18``   the same, explicitly; needed where a small-image network has the name
``timm:resnet18``          timm's, if timm is installed, without weights
``package.module:factory`` the operator's own code, if the operator named it in ``trusted_modules``
=========================  =================================================================

No architecture ever downloads weights.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from defense_core.errors import ArchitectureNotAllowed, ConfigError, QuarantineError
from defense_core.factories import call_factory, trusted_factory, without_global_rng
from defense_core.networks.preact_resnet import preact_resnet18
from defense_core.networks.resnet import resnet18, resnet20
from defense_core.networks.small_cnn import small_cnn
from defense_core.networks.vgg import vgg19_bn
from defense_core.networks.vit import vit_tiny
from defense_core.networks.wide_resnet import wrn16_1

_OWN = {
    builder.__name__: builder
    for builder in (preact_resnet18, resnet18, resnet20, small_cnn, vgg19_bn, vit_tiny, wrn16_1)
}
# Their truncated-normal initialisation through scipy takes minutes and warns; loaded weights replace it.
_TORCHVISION_DEFAULTS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
# Arguments that make a torchvision or timm builder read or download weights, or return something else.
_WEIGHT_ARGUMENTS = re.compile(
    r"(weights.*|pretrained.*|progress|checkpoint_path|cache_dir|features_only|exportable|scriptable|model_name)"
)
_NAME = re.compile(r"[A-Za-z0-9_.]+")


@functools.cache
def _torchvision_names() -> frozenset[str]:
    # Importing torchvision doubles the start of a process, and most networks do not come from it.
    import torchvision

    return frozenset(torchvision.models.list_models(module=torchvision.models))


def known() -> tuple[str, ...]:
    """Names that :func:`build` accepts without ``trusted_modules`` (timm's are left out: a thousand)."""
    prefixed = {f"torchvision:{name}" for name in _torchvision_names()}
    return tuple(sorted(set(_OWN) | _torchvision_names() | prefixed))


def build(name: str, arguments: Mapping[str, Any], *, trusted_modules: tuple[str, ...] = ()) -> nn.Module:
    """The network ``name(**arguments)`` with deterministic random weights.

    Args:
        name: see the table at the top of this module.
        arguments: keyword arguments of the builder; JSON types only.
        trusted_modules: ``package``, ``package.module`` or ``package.module:factory`` entries whose
            factories may be called. They come from the operator, never from the artifact.

    Returns:
        The module in evaluation mode, on the CPU, in float32 where its parameters are floating point;
        activations are out of place. The global random state is what it was before.

    Raises:
        ArchitectureNotAllowed: unknown name, untrusted module, or an argument that asks for weights.
        ConfigError: an argument that the builder does not have, or whose value it refuses.

    Example:
        >>> model = build("preact_resnet18", {"width": 16, "num_classes": 10})
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    factory, defaults = _resolve(name, trusted_modules)
    with without_global_rng():
        model = call_factory(factory, name, {**defaults, **arguments})
    for module in model.modules():
        # Hooks and double backward need the value that an in-place activation would overwrite.
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
        for part, child in module.named_children():
            if isinstance(child, nn.Hardsigmoid):
                setattr(module, part, _Hardsigmoid())
    return model.to(device="cpu", dtype=torch.float32).requires_grad_(True).eval()


class _Hardsigmoid(nn.Module):
    """``nn.Hardsigmoid`` of operations that have a second derivative, which curvature needs."""

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.relu6(inputs + 3) / 6


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every layer's weights again, in place, by the layers' own rules; for training from scratch.

    Parameters of modules that have no such rule (``reset_parameters``) stay: class tokens, position embeddings, the
    fused projections of ``nn.MultiheadAttention``. The global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed CUDA too, which the fork leaves out
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
    return model


def outline(name: str, arguments: Mapping[str, Any]) -> nn.Module | None:
    """The network on the meta device, without memory for its parameters; ``None`` for an operator's own factory.

    The arguments may come from an artifact that asks for a network larger than the machine.
    Own factories are skipped: they are trusted, and need not support the meta device.
    """
    if _is_own_factory(name):
        return None
    factory, defaults = _resolve(name, ())
    with torch.device("meta"), without_global_rng():
        return call_factory(factory, name, {**defaults, **arguments})


def count_parameters(network: nn.Module) -> int:
    """How many numbers its parameters hold, on the meta device too."""
    return sum(parameter.numel() for parameter in network.parameters())


def _is_own_factory(name: str) -> bool:
    return ":" in name and name.split(":", maxsplit=1)[0] not in ("torchvision", "timm")


def _resolve(name: str, trusted_modules: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    if not isinstance(name, str):
        raise ConfigError("architecture has the wrong type", expected="a name", got=repr(name))
    if _is_own_factory(name):
        return trusted_factory(name, trusted_modules), {}
    source, _, rest = name.rpartition(":")
    if not source and rest in _OWN:
        return _OWN[rest], {}
    if source in ("", "torchvision") and rest in _torchvision_names():
        import torchvision

        builder = torchvision.models.get_model_builder(rest)
        defaults = dict(_TORCHVISION_DEFAULTS.get(rest, {}))
        return _without_weights(name, builder, weights=None), defaults
    if source == "timm" and _NAME.fullmatch(rest):
        return _timm_builder(name, rest), {}
    raise _unknown(name)


def _without_weights(name: str, builder: Any, **fixed: Any) -> Any:
    def weightless(**arguments: Any) -> Any:
        return builder(**fixed, **arguments)

    weightless.refused = _WEIGHT_ARGUMENTS  # type: ignore[attr-defined]
    weightless.builder = builder  # type: ignore[attr-defined]
    weightless.__name__ = name
    return weightless


def _timm_builder(name: str, model_name: str) -> Any:
    if importlib.util.find_spec("timm") is None:
        raise ArchitectureNotAllowed(
            f"architecture {name!r} needs timm", expected="an installed timm", got="none", hint="pip install timm"
        )
    timm = importlib.import_module("timm")
    # create_model also takes hub and folder addresses; only names of its own registry may pass.
    if not timm.is_model(model_name):
        raise _unknown(name, [f"timm:{item}" for item in timm.list_models()])
    entrypoint = timm.model_entrypoint(model_name)
    return _without_weights(name, entrypoint, pretrained=False)


def _unknown(name: str, candidates: list[str] | None = None) -> QuarantineError:
    close = difflib.get_close_matches(name, candidates or known(), n=3)
    return ArchitectureNotAllowed(
        f"architecture {name!r} is not on the allow-list",
        expected="a built-in name, torchvision:<name>, timm:<name> or a trusted package.module:factory",
        got=repr(name),
        hint=f"Did you mean {' or '.join(close)}?" if close else "Built in are " + ", ".join(sorted(_OWN)),
    )
