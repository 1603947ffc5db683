"""Gradients per sample: exact, a rule per layer type, and the general method for the rest.

A convolution, linear, BatchNorm or LayerNorm layer's gradient for one sample follows from its
input and from the loss gradient at its output, which one backward pass over a whole chunk gives
for all samples at once. Every other parameter goes through ``torch.func``'s ``vmap(grad)``.

Everything here runs with the model in eval mode: in training mode BatchNorm makes the loss of
one sample depend on the others, and "the gradient of a sample" means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.calls import once_per_sample, recorded
from defense_core.errors import ConfigError, MethodNotApplicable
from defense_core.layer_gradients import has_rule, layer_gradients
from defense_core.layers import evaluating

Losses = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) to the loss of each sample, shape (N,): ``task.losses``."""
CHUNK_NUMBERS = 2**17
"""Input numbers of a chunk: 32 images of 3x32x32, whose layers' inputs a processor's caches still hold."""
TRIED = 8
"""Samples on which a layer's rule is compared with autograd before it is used."""


@contextmanager
def samples_apart(model: nn.Module) -> Iterator[nn.Module]:
    """Eval mode and full precision, in which no sample's loss depends on another's.

    Full precision on CUDA too, where convolutions of float32 would otherwise round to TF32's ten bits.

    Raises:
        MethodNotApplicable: a BatchNorm layer keeps no running statistics, and so normalises by the
            batch in eval mode too.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise MethodNotApplicable(
                f"curvature cannot be measured through {name}",
                expected="BatchNorm with running statistics",
                got="track_running_stats=False",
                hint="Use a method without curvature",
            )
    devices = {parameter.device.type for parameter in model.parameters()}
    kind = devices.pop() if devices else "cpu"
    # The fused attention kernels have no second derivative.
    with evaluating(model), torch.autocast(kind, enabled=False), sdpa_kernel(SDPBackend.MATH), without_tf32():
        yield model


@contextmanager
def without_tf32() -> Iterator[None]:
    """Convolutions of float32 on CUDA in full precision inside, whatever was set."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def per_sample_gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    losses: Losses,
    names: Sequence[str],
    weights: Tensor | None = None,
    chunk_size: int = 32,
) -> Tensor:
    """Gradient of each sample's loss by ``vmap(grad)``.

    Args:
        inputs: (N, ...), as the model wants them.
        targets: (N,).
        losses: per-sample loss.
        names: parameters, in the order of the result's columns.
        weights: (N,) factors on the losses, or ``None`` for 1.
        chunk_size: samples at once.

    Returns:
        (N, P): the parameters of ``names``, flattened and concatenated.

    Raises:
        ConfigError: a name is unknown.
        MethodNotApplicable: BatchNorm keeps no running statistics.
    """
    parameters, buffers = _state(model)
    _check_names(parameters, names)
    moving = {name: parameters[name] for name in names}
    fixed = {**buffers, **{name: value for name, value in parameters.items() if name not in moving}}
    factors = torch.ones(len(inputs), device=inputs.device) if weights is None else weights

    def loss(moved: dict[str, Tensor], sample: Tensor, target: Tensor, factor: Tensor) -> Tensor:
        outputs = functional_call(model, {**moved, **fixed}, (sample.unsqueeze(0),))
        return factor * losses(outputs, target.unsqueeze(0))[0]

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0), randomness="error")
    rows = []
    with samples_apart(model):
        for start in range(0, len(inputs), chunk_size):
            part = slice(start, start + chunk_size)
            gradients = each(moving, inputs[part], targets[part], factors[part])
            rows.append(torch.cat([gradients[name].flatten(1) for name in names], dim=1))
    return torch.cat(rows)


def samples_at_once(inputs: Tensor) -> int:
    """Samples of a chunk, a power of two between 8 and 128: as many as ``CHUNK_NUMBERS`` allow."""
    numbers = math.prod(inputs.shape[1:])
    return int(2 ** math.floor(math.log2(min(max(CHUNK_NUMBERS / max(numbers, 1), 8), 128))))


def squared_gradients(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    *,
    losses: Losses,
    names: Sequence[str],
    weights: Tensor | None = None,
    chunk_size: int | None = None,
    by_layer: bool = True,
    after_chunk: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """``sum_n (d loss_n / d theta_i)^2`` for each parameter, exact.

    Args:
        chunk_size: samples at once, or ``None`` for :func:`samples_at_once`.
        by_layer: use the layers' rules where there is one; ``vmap`` for everything otherwise.
            A rule is used only where the gradients that it gives for the first ``TRIED`` samples add up to
            autograd's: tied weights and layers called by another road fall back by themselves.
        after_chunk: called after each chunk; may raise to stop.

    Returns:
        Parameter name to a tensor shaped like the parameter.

    Raises:
        ConfigError: as :func:`per_sample_gradients`.
    """
    parameters, _ = _state(model)
    _check_names(parameters, names)
    chunk_size = chunk_size or samples_at_once(inputs)
    sums = {name: torch.zeros_like(parameters[name], memory_format=torch.contiguous_format) for name in names}
    factors = torch.ones(len(inputs), device=inputs.device) if weights is None else weights
    owners = _owners(model, names) if by_layer else {}
    with samples_apart(model):
        for start in range(0, len(inputs), chunk_size):
            part = slice(start, start + chunk_size)
            chunk = (inputs[part], targets[part], factors[part])
            if start == 0 and owners:
                few = (chunk[0][:TRIED], chunk[1][:TRIED], chunk[2][:TRIED])
                called = once_per_sample(model, {path: module for path, module, _ in owners.values()}, few[0])
                owners = {name: owner for name, owner in owners.items() if owner[0] in called}
                owners = _trustworthy(model, owners, few, losses)
            for name, (_, squares) in _by_rule(model, owners, chunk, losses, totals=False).items():
                sums[name] += squares
            others = [name for name in names if name not in owners]
            if others:
                rows = per_sample_gradients(model, chunk[0], chunk[1], losses=losses, names=others, weights=chunk[2])
                for name, block in zip(others, _columns(rows, [sums[name] for name in others]), strict=True):
                    sums[name] += block.square().sum(0)
            if after_chunk is not None:
                after_chunk()
    return sums


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return parameters, {name: value.detach() for name, value in model.named_buffers()}


def _check_names(parameters: dict[str, Tensor], names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in parameters]
    if unknown or not names:
        raise ConfigError("parameters are unknown", expected="names of the model's parameters", got=unknown or "none")


def _columns(rows: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """(N, P) as one (N, *shape) block per tensor of ``like``."""
    blocks = rows.split([tensor.numel() for tensor in like], dim=1)
    return [block.view(len(rows), *tensor.shape) for block, tensor in zip(blocks, like, strict=True)]


Chunk = tuple[Tensor, Tensor, Tensor]
Moments = tuple[Tensor | None, Tensor]
"""Sum over the samples of the gradient (where asked for), and of its square."""
Owners = dict[str, tuple[str, nn.Module, str]]
"""Parameter name to its module's name, the module, and ``weight`` or ``bias``."""


def _owners(model: nn.Module, names: Sequence[str]) -> Owners:
    """Parameters whose layer has a rule."""
    found: Owners = {}
    for path, module in model.named_modules():
        if not has_rule(module):
            continue
        for part, _ in module.named_parameters(recurse=False):
            full = f"{path}.{part}" if path else part
            if full in names:
                found[full] = (path, module, part)
    return found


def _trustworthy(model: nn.Module, owners: Owners, chunk: Chunk, losses: Losses) -> Owners:
    """The owners whose per-sample gradients add up to autograd's gradient of ``chunk``."""
    inputs, targets, factors = chunk
    ruled = _by_rule(model, owners, chunk, losses, totals=True)
    named = {name: value for name, value in model.named_parameters() if name in ruled}
    frozen = [value for value in named.values() if not value.requires_grad]
    try:
        for value in frozen:
            value.requires_grad_(True)
        with torch.enable_grad():
            loss = (factors * losses(model(inputs), targets)).sum()
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    finally:
        for value in frozen:
            value.requires_grad_(False)
    kept: Owners = {}
    for name, gradient in zip(named, gradients, strict=True):
        total = ruled[name][0]
        if gradient is None or total is None:
            continue
        scale = gradient.abs().max() + torch.finfo(gradient.dtype).tiny
        if float((total - gradient).abs().max() / scale) < 1e-3:
            kept[name] = owners[name]
    return kept


def _by_rule(model: nn.Module, owners: Owners, chunk: Chunk, losses: Losses, *, totals: bool) -> dict[str, Moments]:
    """Moments of the gradient of every owned parameter whose module was called exactly once."""
    if not owners:
        return {}
    inputs, targets, factors = chunk
    modules = {path: module for path, module, _ in owners.values()}
    with recorded(modules) as seen, torch.enable_grad():
        # Where the input requires a gradient, outputs are in the graph of a frozen model too.
        sample = inputs.detach().requires_grad_(inputs.is_floating_point())
        loss = (factors * losses(model(sample), targets)).sum()
    once = [path for path, calls in seen.outputs.items() if len(calls) == 1 and len(calls[0]) == len(inputs)]
    at_outputs = torch.autograd.grad(loss, [seen.outputs[path][0] for path in once], allow_unused=True)
    backward = dict(zip(once, at_outputs, strict=True))
    found: dict[str, Moments] = {}
    with torch.no_grad():
        for name, (path, module, part) in owners.items():
            gradient = backward.get(path)
            if gradient is None:
                continue
            found[name] = _moments(module, part, seen.inputs[path][0].detach(), gradient, totals=totals)
    return found


CACHED_NUMBERS = 2**18
"""Per-sample gradients that a CPU works on at once: about 1 MiB, a core's own cache."""


def _moments(module: nn.Module, part: str, inputs: Tensor, gradient: Tensor, *, totals: bool) -> Moments:
    """The rule of a layer. ``inputs`` and ``gradient`` (at the output) have the samples first."""
    if isinstance(module, nn.Linear) and part == "weight" and inputs.dim() == 2:
        # (g_o a_i)^2 = g_o^2 a_i^2: the squares need no per-sample matrix.
        return (gradient.T @ inputs if totals else None), gradient.square().T @ inputs.square()
    size = module.get_parameter(part).numel()
    block = max(1, CACHED_NUMBERS // size) if inputs.device.type == "cpu" else len(inputs)
    total: Tensor | None = None
    squares: Tensor | None = None
    for some, behind in zip(inputs.split(block), gradient.split(block), strict=True):
        each = layer_gradients(module, part, some, behind)
        if totals:
            total = each.sum(0) if total is None else total + each.sum(0)
        if squares is None:
            squares = torch.zeros_like(each[0])
        if block < 8:
            for one in each:
                squares.addcmul_(one, one)
        else:
            squares += each.square_().sum(0)
    assert squares is not None
    return total, squares
