"""NGF, Natural Gradient Fine-tuning (Karim et al., 2023, arXiv 2306.17441).

One layer is tuned by ``w <- w - lr * (F + lambda I)^-1 r``, with ``F`` the Fisher matrix of the
clean batch and ``r = grad CE + eta * Fbar (w - wbar)``: the gradient and the regulariser that
holds what clean data rely on. Nothing is factorised or averaged: the empirical Fisher of a batch
of ``N`` samples has rank ``N``, so the step is one N x N solve (Woodbury).

The paper tunes the classifier. Its features already carry the backdoor, and where a trigger
moves them along directions that clean data use, no classifier on top can tell. The default,
``part="masked_block"``, therefore first closes the hidden units that a short clean unlearning moves
most, which is borrowed from TSBD, and then starts the last hidden layer and the classifier afresh.
In front of them nothing is trained or re-normalised. ``docs/methods-nft-ngf.md`` compares the parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from defense_core.data import Splits
from defense_core.inference import accuracy, correct
from defense_core.layers import linear_head
from defense_core.loop import HistoryRow, finished, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import cautious_accuracy, chooser, strongest_training
from defense_core.purify.ngf_block import last_layers, tune_block
from defense_core.purify.ngf_head import tune_on_features
from defense_core.purify.ngf_run import NAME, NGFConfig, Run
from defense_core.purify.unlearning import close_most_moved
from defense_core.task import Task


def purify(
    model: nn.Module,
    clean: Splits,
    config: NGFConfig,
    *,
    task: Task,
    seed: int,
    device: torch.device | str,
    progress: Progress,
) -> Purified:
    """Tune the chosen part; BatchNorm normalises by its running statistics throughout.

    Returns:
        The purified model. ``facts`` holds ``part``; for the masked parts the ``ratio`` of
        units closed, for the blocks the names of the ``layers`` tuned, and the ``trials`` behind them.

    Raises:
        MethodNotApplicable: the network does not end in a linear layer, or has no hidden one to tune.
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    tuned = working_copy(model, device)
    linear_head(tuned, method=NAME)
    run = Run(clean.fit.to(device), config, task, seed, device, progress)
    if config.part == "block":
        tuned, history, facts = _choose_layers(tuned, clean, run)
    elif config.part == "masked_block":
        facts = _close_units(tuned, clean, run) if config.epochs else {}
        names = last_layers(tuned, run)[-2:]
        history = tune_block(tuned, names, run)
        facts["layers"] = names
    else:
        facts = _close_units(tuned, clean, run) if config.part == "masked" and config.epochs else {}
        history = tune_on_features(tuned, run)
    return Purified(finished(tuned, "ngf"), tuple(history), {"part": config.part, **facts})


def _close_units(model: nn.Module, clean: Splits, run: Run) -> dict[str, Any]:
    """Zero the weights that clean unlearning moves most, in place, as many as accuracy permits."""
    config = run.config

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=run.task, device=run.device, precision=config.precision)

    ratio, _, trials, _ = close_most_moved(
        model,
        clean,
        config,
        granularity="weight",
        select_accuracy=select_accuracy,
        reference=select_accuracy(model),
        task=run.task,
        seed=run.seed,
        device=run.device,
        progress=run.progress,
    )
    return {"ratio": ratio, "trials": trials}


def _choose_layers(model: nn.Module, clean: Splits, run: Run) -> tuple[nn.Module, list[HistoryRow], dict[str, Any]]:
    """``block`` at each number of layers, and the one that the rule takes."""
    config, chosen = run.config, chooser(clean)

    def right(network: nn.Module) -> torch.Tensor:
        return correct(network, chosen, task=run.task, device=run.device)

    before = right(model)
    names = last_layers(model, run)

    def attempt(strength: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        tuned = working_copy(model, run.device)
        rows = tune_block(tuned, names[-int(strength) - 1 :], run)
        return cautious_accuracy(before, right(tuned)), (tuned, rows)

    most = len(names) - 1
    wanted = config.layers_grid if config.layers is None else (config.layers,)
    count, (tuned, history), trials = strongest_training(
        tuple(sorted({float(min(layers, most)) for layers in wanted})),
        attempt,
        clean=clean,
        reference=float(before.float().mean()),
        max_drop=config.max_drop,
    )
    return tuned, history, {"layers": names[-int(count) - 1 :], "trials": trials}


METHOD = Method(
    name="ngf",
    config=NGFConfig,
    function=purify,
    summary="close what clean unlearning moves most, tune the last layers by exact natural-gradient steps (NGF)",
    zero_steps={"epochs": 0},
)
