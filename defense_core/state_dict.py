"""Named tensors into a network: strict names, strict shapes, finite values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from defense_core.errors import NonFiniteWeights, StateDictMismatch

# What wrappers put before every name: DataParallel, torch.compile, and modules that hold the network.
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
_SHOWN = 3
_SHOWN_CHARACTERS = 200


def load_into(model: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy ``tensors`` into ``model`` in place, as float32.

    Prefixes of wrappers are removed where every name has them. ``num_batches_tracked`` counters may be
    missing, as in files by torch < 0.4.1; they start at zero.

    Raises:
        StateDictMismatch: missing, unexpected or misshaped names; the first few are listed.
        NonFiniteWeights: a tensor holds NaN or Inf, or a value beyond float32.
    """
    expected = model.state_dict()
    found = _without_prefixes(dict(tensors), set(expected))
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked") and name not in found:
            found[name] = torch.zeros_like(tensor)
    _check_names_and_shapes(expected, found, where)
    ready = {name: _converted(name, found[name], target, where) for name, target in expected.items()}
    model.load_state_dict(ready, strict=True)


def check_finite(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise :class:`NonFiniteWeights` naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteWeights(
                f"{name} in {where} is not finite",
                expected="finite float32 values",
                got=f"{bad} of {tensor.numel()} values NaN or Inf",
                hint="The training diverged or the file is damaged; use an earlier checkpoint",
            )


def _without_prefixes(tensors: dict[str, Tensor], expected: set[str]) -> dict[str, Tensor]:
    while tensors and not expected & set(tensors):
        prefix = next((item for item in _PREFIXES if all(name.startswith(item) for name in tensors)), None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _check_names_and_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshaped = [name for name in expected if name in found and expected[name].shape != found[name].shape]
    if not (missing or unexpected or misshaped):
        return
    if misshaped and not missing and not unexpected:
        classes = {_class_counts(expected[name].shape, found[name].shape) for name in misshaped}
        pair = classes.pop() if len(classes) == 1 and len(misshaped) <= 2 else None
        if pair is not None:
            raise StateDictMismatch(
                f"{where} has another number of classes",
                expected=f"{pair[0]} classes",
                got=f"{pair[1]} classes in {misshaped[-1]}",
                hint=f'If the model has {pair[1]} classes, pass "num_classes": {pair[1]} in the architecture arguments',
            )
    shapes = [f"{name} {_shape(found[name])} instead of {_shape(expected[name])}" for name in misshaped]
    parts = [_some("missing", missing), _some("unexpected", unexpected), _some("misshaped", shapes)]
    raise StateDictMismatch(
        f"{where} does not fit the architecture",
        expected=f"the {len(expected)} names and shapes of the network",
        got="; ".join(part for part in parts if part),
        hint="Check the architecture's name and arguments (width, channels, classes)",
    )


def _class_counts(expected: torch.Size, found: torch.Size) -> tuple[int, int] | None:
    """(expected, found) if the shapes differ only in the first dimension of a last layer."""
    fits = len(expected) == len(found) and len(expected) in (1, 2) and expected[1:] == found[1:]
    return (expected[0], found[0]) if fits else None


def _converted(name: str, tensor: Tensor, target: Tensor, where: str) -> Tensor:
    same_kind = tensor.is_floating_point() == target.is_floating_point() and not tensor.is_complex()
    if not same_kind and not (tensor.is_floating_point() and _counts(tensor)):
        raise StateDictMismatch(
            f"{name} in {where} has another kind of numbers", expected=str(target.dtype), got=str(tensor.dtype)
        )
    ready = tensor.to(dtype=target.dtype)
    check_finite({name: ready}, where=where)
    return ready


def _counts(tensor: Tensor) -> bool:
    """Whether floats are whole: scripts that halve a whole state dict turn the integer counters into floats too."""
    exact = tensor.double()  # nothing is rounded in floats of eight bits
    return bool((exact == exact.round()).all())


def _some(what: str, names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = (name[:_SHOWN_CHARACTERS] for name in names[:_SHOWN])
    return f"{what} {', '.join(shown)}{more}" if names else ""


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"
