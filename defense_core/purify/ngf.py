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

from defense_core.calls import few_inputs, used_head
from defense_core.data import Splits
from defense_core.inference import accuracy
from defense_core.layers import unit_layers
from defense_core.loop import HistoryRow, finished, working_copy
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified
from defense_core.purify.choice import chooser, expected_drop, strongest_by_halving, strongest_expected
from defense_core.purify.ngf_block import last_layers, tune_block
from defense_core.purify.ngf_head import tune_on_features
from defense_core.purify.ngf_run import NAME, NGFConfig, Run
from defense_core.purify.unlearning import close_most_moved, closed_weights
from defense_core.purify.zeroing import zero
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
        units closed, for the blocks the names of the ``layers`` tuned, and the trials behind them, of which
        ``factor_trials`` and those of ``block`` have the expected change as ``accuracy``.

    Raises:
        MethodNotApplicable: the network does not end in a linear layer, or has no hidden one to tune.
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    tuned = working_copy(model, device)
    run = Run(clean.fit.to(device), config, task, seed, device, progress)
    used_head(tuned, few_inputs(run.data, task=task, device=device), method=NAME)
    if config.part == "block":
        tuned, history, facts = _choose_layers(tuned, clean, run)
    elif config.part in ("masked", "masked_block") and config.epochs:
        tuned, history, facts = _choose_ratio(tuned, clean, run)
    else:
        history, facts = _tune(tuned, run)
    return Purified(finished(tuned, "ngf"), tuple(history), {"part": config.part, **facts})


def _tune(model: nn.Module, run: Run) -> tuple[list[HistoryRow], dict[str, Any]]:
    """Every part but ``block``, in place, whatever is closed."""
    if run.config.part != "masked_block":
        return tune_on_features(model, run), {}
    names = last_layers(model, run)[-2:]
    return tune_block(model, names, run), {"layers": names}


def _choose_ratio(model: nn.Module, clean: Splits, run: Run) -> tuple[nn.Module, list[HistoryRow], dict[str, Any]]:
    """Zero the weights that clean unlearning moves most, tune, and take the most that accuracy permits after it."""
    config = run.config

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=run.task, device=run.device, precision=config.precision)

    first, _, trials, changes = close_most_moved(
        working_copy(model, run.device),
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

    def attempt(factor: float) -> tuple[float, tuple[nn.Module, float, list[HistoryRow], dict[str, Any]]]:
        tuned, ratio = working_copy(model, run.device), min(first * factor, 1.0)
        layers = unit_layers(tuned)
        zero(layers, closed_weights(layers, changes, ratio=ratio, granularity="weight"))
        rows, facts = _tune(tuned, run)
        return _change(model, tuned, clean, run), (tuned, ratio, rows, facts)

    factors = config.factors if config.ratio is None else (1.0,)
    _, (tuned, ratio, history, facts), more = strongest_by_halving(
        factors, attempt, clean=clean, max_drop=config.max_drop
    )
    return tuned, history, {"ratio": ratio, "trials": trials, "factor_trials": more, **facts}


def _choose_layers(model: nn.Module, clean: Splits, run: Run) -> tuple[nn.Module, list[HistoryRow], dict[str, Any]]:
    """``block`` at each number of layers, and the one that the rule takes."""
    config = run.config
    names = last_layers(model, run)

    def attempt(strength: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        tuned = working_copy(model, run.device)
        rows = tune_block(tuned, names[-int(strength) - 1 :], run)
        return _change(model, tuned, clean, run), (tuned, rows)

    most = len(names) - 1
    wanted = config.layers_grid if config.layers is None else (config.layers,)
    count, (tuned, history), trials = strongest_expected(
        tuple(sorted({float(min(layers, most)) for layers in wanted})), attempt, clean=clean, max_drop=config.max_drop
    )
    return tuned, history, {"layers": names[-int(count) - 1 :], "trials": trials}


def _change(model: nn.Module, tuned: nn.Module, clean: Splits, run: Run) -> float:
    return -expected_drop(
        model, tuned, chooser(clean), task=run.task, seed=run.seed, device=run.device, progress=run.progress,
        precision=run.config.precision,
    )  # fmt: skip


METHOD = Method(
    name="ngf",
    config=NGFConfig,
    function=purify,
    summary="close what clean unlearning moves most, tune the last layers by exact natural-gradient steps (NGF)",
    zero_steps={"epochs": 0},
)
