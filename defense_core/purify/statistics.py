"""BatchNorm statistics of a network whose weights were changed."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.data import CleanSet
from defense_core.inference import channels_last
from defense_core.loop import batch_indices
from defense_core.progress import Progress
from defense_core.task import Task


@torch.no_grad()
def renew_statistics(
    model: nn.Module,
    data: CleanSet,
    *,
    task: Task,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    progress: Progress,
    only: Collection[str] | None = None,
) -> None:
    """BatchNorm statistics measured afresh, in place, as the mean over the batches of one pass.

    Needed where weights changed while the statistics did not follow, or followed mixed images,
    whose variance is smaller. The model is left in eval mode.

    Args:
        only: names of the layers to measure; the others normalise by their running statistics meanwhile, as they will
            afterwards, and keep them. ``None``: all.
    """
    layers = [
        module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and (only is None or name in only)
    ]
    if not layers:
        model.eval()
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over batches
    model.train(only is None)
    for layer in layers:
        layer.training = True  # also where the network's own train() keeps them in eval mode
    data = data.to(device)
    generator = torch.Generator().manual_seed(seed)
    batches = batch_indices(len(data), batch_size, generator)
    with progress.phase("statistics", total=len(batches)) as phase:
        for batch in batches:
            images = task.augmented(data.images[batch.to(device)], generator)
            model(channels_last(task.inputs(images)))
            phase.advance()
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
