"""How large the tensors are that a network makes of an image, found out without making them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from defense_core.inference import NETWORK_ERRORS

_ITEM_BYTES = 4
_MARGIN = 8  # of the quick estimate: padding, and layers that join others' outputs


def surely_small(network: nn.Module, input_size: tuple[int, int, int], max_bytes: int) -> bool:
    """Whether every layer is so narrow that no output of ``max_bytes`` can come of such images; quick."""
    places = input_size[1] * input_size[2] + 1
    widest = max((side for parameter in network.parameters() for side in parameter.shape), default=0)
    heads = max((_heads(layer) for layer in network.modules()), default=0)
    return _MARGIN * _ITEM_BYTES * places * max(widest, heads * places) < max_bytes


def largest_tensor_bytes(network: nn.Module, input_size: tuple[int, int, int]) -> int | None:
    """Bytes of the largest output of a layer in the forward pass of one image, or of what attention weighs it by.

    Args:
        network: on the meta device; left in evaluation mode.
        input_size: (C, H, W).

    Returns:
        ``None``: the network does not run on the meta device, so nobody can tell.
    """
    network.eval()
    seen = [0]

    def note(layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, (tuple, list)) else (output,)
        seen.extend(each.numel() * each.element_size() for each in outputs if isinstance(each, Tensor))
        seen.append(_weights_bytes(layer, given))

    handles = [layer.register_forward_hook(note) for layer in network.modules()]
    try:
        with torch.device("meta"), torch.no_grad():
            network(torch.zeros(1, *input_size))
    except NETWORK_ERRORS:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return max(seen)


def _weights_bytes(layer: nn.Module, given: tuple[Any, ...]) -> int:
    """Of attention over a sequence: a number for every head and every two of its tokens."""
    heads = _heads(layer)
    if not (heads and given and isinstance(given[0], Tensor) and given[0].ndim == 3):
        return 0
    sequence_first = isinstance(layer, nn.MultiheadAttention) and not layer.batch_first
    tokens = given[0].shape[0 if sequence_first else 1]
    return heads * tokens * tokens * _ITEM_BYTES


def _heads(layer: nn.Module) -> int:
    found = (getattr(layer, name, 0) for name in ("num_heads", "heads"))
    return next((count for count in found if isinstance(count, int) and count > 0), 0)
