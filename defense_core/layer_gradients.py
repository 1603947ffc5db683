"""The gradient of one layer's parameters for each sample, from its input and its output's gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.errors import ConfigError


def has_rule(module: nn.Module) -> bool:
    """Whether :func:`layer_gradients` knows the layer."""
    if isinstance(module, nn.Conv2d):
        return plain_convolution(module) and padding_of(module) is not None
    return type(module) in (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.BatchNorm2d)


def plain_convolution(module: nn.Conv2d) -> bool:
    """Whether it is PyTorch's own convolution of a zero-padded image: a kind with a ``forward`` of its own may pad or
    scale otherwise."""
    return type(module).forward is nn.Conv2d.forward and module.padding_mode == "zeros"


def padding_of(module: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros on each side of rows and columns, or ``None`` where ``"same"`` puts more on one side than on the other."""
    if not isinstance(module.padding, str):
        return module.padding[0], module.padding[1]
    if module.padding == "valid":
        return 0, 0
    whole = [size * (kernel - 1) for size, kernel in zip(module.dilation, module.kernel_size, strict=True)]
    return None if any(each % 2 for each in whole) else (whole[0] // 2, whole[1] // 2)


def layer_gradients(module: nn.Module, part: str, inputs: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of ``module.<part>`` per sample, (N, *shape of the parameter).

    Args:
        part: ``"weight"`` or ``"bias"``.
        inputs: what the module was given, samples first.
        gradient: loss gradient at the module's output.
    """
    if isinstance(module, nn.Conv2d):
        if part == "bias":
            return gradient.flatten(2).sum(2)
        return _convolution_weight(module, inputs, gradient)
    if isinstance(module, nn.Linear):
        flat = gradient.reshape(len(gradient), -1, gradient.shape[-1])
        if part == "bias":
            return flat.sum(1)
        return torch.bmm(flat.transpose(1, 2), inputs.reshape(len(inputs), -1, inputs.shape[-1]))
    if isinstance(module, nn.LayerNorm):
        shape = tuple(module.normalized_shape)
        if part == "weight":
            gradient = gradient * F.layer_norm(inputs, shape, eps=module.eps)
        return gradient.reshape(len(gradient), -1, *shape).sum(1)
    if isinstance(module, _BatchNorm):
        if part == "weight":
            mean, variance = module.running_mean, module.running_var
            gradient = gradient * F.batch_norm(inputs, mean, variance, training=False, eps=module.eps)
        return gradient.reshape(*gradient.shape[:2], -1).sum(2)
    raise ConfigError("layer has no rule", expected="Conv2d, Linear, LayerNorm or BatchNorm", got=type(module).__name__)


def patch_sums(module: nn.Conv2d, inputs: Tensor, height: int, width: int) -> Tensor:
    """The sum of the patches that ``module`` meets in each sample, (N, kernel height * kernel width * channels).

    Where the gradient at the output, (N, C, height, width), is the same at every place, the gradient of the weight is
    the outer product of the two.
    """
    return _windows(module, inputs, height, width).sum((1, 2)).flatten(1)


def _windows(module: nn.Conv2d, inputs: Tensor, height: int, width: int) -> Tensor:
    """Every patch of every sample, (N, height, width, kernel height, kernel width, channels): a view of a channels-last
    copy of the padded images."""
    padding = padding_of(module)
    assert padding is not None  # such layers have no rule
    down, across = padding
    image = F.pad(inputs.permute(0, 2, 3, 1), (0, 0, across, across, down, down)).contiguous()
    sample, row, column, channel = image.stride()
    return image.as_strided(
        (len(inputs), height, width, *module.kernel_size, inputs.shape[1]),
        (
            sample,
            row * module.stride[0],
            column * module.stride[1],
            row * module.dilation[0],
            column * module.dilation[1],
            channel,
        ),
    )


def _convolution_weight(module: nn.Conv2d, inputs: Tensor, gradient: Tensor) -> Tensor:
    """``g_n A_n^T`` with ``A_n`` the patches of sample n, group by group.

    Patches are copied out of a channels-last image, in runs of channels: several times faster
    than ``unfold``, which copies single numbers.
    """
    count, groups = len(inputs), module.groups
    height, width = gradient.shape[2:]
    windows = _windows(module, inputs, height, width)
    flat = gradient.reshape(count * groups, module.out_channels // groups, height * width)
    if groups == 1:
        patches = windows.reshape(count, height * width, -1)
    else:
        split = windows.unflatten(5, (groups, -1)).permute(0, 5, 1, 2, 3, 4, 6)
        patches = split.reshape(count * groups, height * width, -1)
    each = torch.bmm(flat, patches).view(count, module.out_channels, *module.kernel_size, -1)
    return each.permute(0, 1, 4, 2, 3)
