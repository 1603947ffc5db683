"""Fine-Pruning (Liu et al., RAID 2018, arXiv 1805.12185), a baseline.

The inputs of the classifier that clean images activate least are cut off, as many as accuracy on
the *select* split permits, and the rest is fine-tuned with them held at zero. The reference
benchmark chooses the number on the test set; this does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.calls import few_inputs, recorded, used_head
from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.inference import accuracy, channels_last, images_at_once
from defense_core.layers import evaluating, linear_head
from defense_core.loop import finished, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, choosers, strongest_within
from defense_core.purify.fine_tuning import FineTuningConfig, tune_within
from defense_core.task import Task


@dataclass(frozen=True)
class FinePruningConfig(FineTuningConfig):
    """Settings of fine-pruning.

    Attributes:
        share: share of the classifier's inputs to cut, or ``None`` to choose it from
            ``share_grid`` by :func:`~defense_core.purify.choice.strongest_within`.
        share_grid: candidates.
        lr, lr_grid, max_drop, epochs, batch_size, weight_decay, schedule, precision: as plain
            fine-tuning's; ``max_drop`` bounds the cut too.
    """

    share: float | None = None
    share_grid: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.share is None or 0 <= self.share < 1, "share", "in [0, 1), or null", self.share)
        in_range = bool(self.share_grid) and all(0 <= share < 1 for share in self.share_grid)
        require(in_range, "share_grid", "shares in [0, 1)", self.share_grid)


def purify(
    model: nn.Module,
    clean: Splits,
    config: FinePruningConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Cut dormant classifier inputs, then fine-tune. ``facts`` adds ``share`` and its ``trials``.

    Raises:
        MethodNotApplicable: the network does not end in a linear layer that is given one vector a sample.
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device, precision=config.precision)

    pruned = working_copy(model, device)
    head = used_head(pruned, few_inputs(clean.fit, task=task, device=device), method="fine-pruning")
    reference = select_accuracy(pruned)
    order = mean_inputs(pruned, head, clean.fit, task=task, device=device).argsort(stable=True)
    weight = head.weight.detach().clone()
    shares = config.share_grid if config.share is None else (config.share,)
    with progress.phase("choose share", total=len(shares)) as choosing:

        def attempt(share: float) -> tuple[float, Tensor]:
            cut = order[: int(share * len(order))]
            _cut(head, weight, cut)
            reached = select_accuracy(pruned)
            choosing.advance()
            return reached, cut

        share, cut, trials = strongest_within(
            shares, attempt, reference=reference, max_drop=config.max_drop, images=choosers(clean)
        )
    _cut(head, weight, cut)

    def holding(tuned: nn.Module) -> Callable[[], None]:
        theirs = linear_head(tuned, method="fine-pruning")
        return lambda: _cut(theirs, theirs.weight, cut)

    tuned, rows, facts = tune_within(
        pruned,
        clean,
        config,
        task=task,
        seed=seed,
        device=device,
        progress=progress,
        name="fine-prune",
        reference=reference,
        holding=holding,
    )
    return Purified(
        finished(tuned, "fine_pruning"), tuple(rows), {**facts, "share": share, "pruned": len(cut), "trials": trials}
    )


@torch.no_grad()
def mean_inputs(model: nn.Module, head: nn.Linear, data: CleanSet, *, task: Task, device: torch.device | str) -> Tensor:
    """Mean over ``data`` of each input of ``head``, (D,), eval mode."""
    total = torch.zeros(head.in_features, dtype=torch.float64, device=device)
    with recorded({"head": head}) as seen, evaluating(model):
        for images, _ in data.batches(images_at_once(data.images)):
            model(channels_last(task.inputs(images.to(device))))
            total += seen.taken("head").detach().flatten(0, -2).double().sum(0)
    return total / len(data)


@torch.no_grad()
def _cut(head: nn.Linear, weight: Tensor, columns: Tensor) -> None:
    if weight is not head.weight:
        head.weight.copy_(weight)
    head.weight[:, columns] = 0.0


METHOD = Method(
    name="fine_pruning",
    config=FinePruningConfig,
    function=purify,
    summary="cut the classifier inputs that clean images activate least, then fine-tune, a baseline",
    zero_steps={"share": 0.0, "epochs": 0},
    baseline=True,
)
