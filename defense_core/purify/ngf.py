"""NGF, Natural Gradient Fine-tuning (Karim et al., 2023, arXiv 2306.17441).

One layer is tuned by ``w <- w - lr * (F + lambda I)^-1 r``, with ``F`` the Fisher matrix of the
clean batch and ``r = grad CE + eta * Fbar (w - wbar)``: the gradient and the regulariser that
holds what clean data rely on. Nothing is factorised or averaged: the empirical Fisher of a batch
of ``N`` samples has rank ``N``, so the step is one N x N solve (Woodbury).

The paper tunes the classifier. Its features already carry the backdoor, and where a trigger
moves them along directions that clean data use, no classifier on top can tell. ``part="block"``
therefore starts the last hidden layers and the classifier afresh, as many as accuracy on the
*select* split permits, and tunes these. ``docs/methods-nft-ngf.md`` compares the parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.errors import ConfigError, MethodDiverged
from defense_core.layer_gradients import layer_gradients
from defense_core.layers import classifier_head, evaluating, unit_layers
from defense_core.loop import HistoryRow, accuracy, batch_indices, channels_last, finished, seeded, working_copy
from defense_core.per_sample import recorded
from defense_core.progress import Progress
from defense_core.purify.base import Method, Purified, chooser, strongest_within
from defense_core.purify.natural_step import head_step, sample_weights, true_head_step
from defense_core.purify.statistics import renew_statistics
from defense_core.task import Task

Part = Literal["head", "fresh_head", "feature_mask", "block"]


@dataclass(frozen=True)
class NGFConfig:
    """Settings of NGF.

    Attributes:
        part: what is tuned. ``"head"``: the classifier, the paper's choice. ``"fresh_head"``:
            the classifier, started at zero. ``"feature_mask"``: a mask in [0, 1] on the
            classifier's inputs. ``"block"``: the last hidden layers and the classifier, started
            at random. The first three run on cached features.
        layers: hidden layers of ``"block"``, or ``None`` to choose their number from
            ``layers_grid`` by :func:`~defense_core.purify.base.strongest_within`.
        layers_grid: candidates.
        max_drop: permitted drop of accuracy on the *select* split, in [0, 1].
        fisher: ``"empirical"``, or ``"true"``: the model's own labels, solved by conjugate
            gradients; for ``"head"`` and ``"fresh_head"``.
        eta: weight of the regulariser ``eta / 2 * sum Fbar_ii (w_i - wbar_i)^2``, with ``Fbar``
            the empirical Fisher's diagonal at the start; ``"head"`` only.
        damping: lambda, relative to the mean nonzero eigenvalue of F.
        lr: length of a step; falls linearly to 0. 1 is Newton's.
        views: augmented views of the fit split whose features are cached.
        epochs: passes over the fit split.
        min_steps: at least so many steps: more passes on small sets. Nothing is trained where
            ``epochs`` is 0.
        batch_size: samples per step of ``"block"``, and so the size of the solve. The parts on
            cached features take up to 1,024 at once.
    """

    part: Part = "block"
    layers: int | None = None
    layers_grid: tuple[int, ...] = (1, 2)
    max_drop: float = 0.02
    fisher: Literal["empirical", "true"] = "empirical"
    eta: float = 1.0
    damping: float = 0.1
    lr: float = 0.5
    views: int = 8
    epochs: int = 10
    min_steps: int = 60
    batch_size: int = 128

    def __post_init__(self) -> None:
        require(self.layers is None or self.layers >= 1, "layers", "1 or more, or null", self.layers)
        require(bool(self.layers_grid) and min(self.layers_grid) >= 1, "layers_grid", "counts", self.layers_grid)
        require(0 <= self.max_drop < 1, "max_drop", "in [0, 1)", self.max_drop)
        require(self.eta >= 0, "eta", "0 or more", self.eta)
        require(self.damping > 0, "damping", "a positive number", self.damping)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        require(self.views >= 1, "views", "1 or more", self.views)
        require(self.epochs >= 0, "epochs", "0 or more", self.epochs)
        require(self.min_steps >= 0, "min_steps", "0 or more", self.min_steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)


@dataclass(frozen=True, eq=False)
class _Run:
    """What every part needs."""

    data: CleanSet
    config: NGFConfig
    task: Task
    seed: int
    device: torch.device | str
    progress: Progress

    def epochs(self, batch_size: int) -> int:
        steps = len(batch_indices(len(self.data), batch_size, torch.Generator()))
        return max(self.config.epochs, math.ceil(self.config.min_steps / steps)) if self.config.epochs else 0


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
        The purified model. ``facts`` holds ``part`` and, for ``"block"``, the names of the
        ``layers`` tuned and the ``trials`` behind their number.

    Raises:
        ConfigError: the network does not end in a linear layer.
        MethodDiverged: a loss or weight became NaN or Inf.
        Cancelled: a stop was requested.
    """
    images = len(chooser(clean))

    def select_accuracy(network: nn.Module) -> float:
        return accuracy(network, chooser(clean), task=task, device=device)

    original = working_copy(model, device)
    reference = select_accuracy(original)
    run = _Run(clean.fit.to(device), config, task, seed, device, progress)
    if config.part != "block":
        history = _tune_on_features(original, run)
        return Purified(finished(original, "ngf"), tuple(history), {"part": config.part})
    names = _last_layers(original, run)

    def attempt(strength: float) -> tuple[float, tuple[nn.Module, list[HistoryRow]]]:
        tuned = working_copy(original, device)
        rows = _tune_block(tuned, names[-int(strength) - 1 :], run)
        return select_accuracy(tuned), (tuned, rows)

    most = len(names) - 1
    wanted = config.layers_grid if config.layers is None else (config.layers,)
    count, (purified, history), trials = strongest_within(
        tuple(sorted({float(min(layers, most)) for layers in wanted})),
        attempt,
        reference=reference,
        max_drop=config.max_drop,
        images=images,
    )
    facts: dict[str, Any] = {"part": "block", "layers": names[-int(count) - 1 :], "trials": trials}
    return Purified(finished(purified, "ngf"), tuple(history), facts)


# -- a linear layer on cached features -----------------------------------------------------


def _linear_head(model: nn.Module) -> nn.Linear:
    head = classifier_head(model)
    if not isinstance(head, nn.Linear):
        raise ConfigError("NGF needs a linear classifier", expected="a network that ends in nn.Linear", got=head)
    return head


@torch.no_grad()
def cached_features(model: nn.Module, run: _Run) -> list[Tensor]:
    """Inputs of the classifier, float64 (N, D), one tensor a view; eval mode."""
    head = _linear_head(model)
    generator = torch.Generator().manual_seed(run.seed)
    views = []
    with recorded({"head": head}) as seen, evaluating(model), run.progress.phase("features", run.config.views) as phase:
        for _ in range(run.config.views):
            parts = []
            for batch in torch.arange(len(run.data)).split(512):
                images = run.task.augmented(run.data.images[batch.to(run.device)], generator)
                model(channels_last(run.task.inputs(images)))
                parts.append(seen.inputs["head"][0].detach().flatten(1).double())
            views.append(torch.cat(parts))
            phase.advance()
    return views


def _tune_on_features(model: nn.Module, run: _Run) -> list[HistoryRow]:
    """``head``, ``fresh_head`` and ``feature_mask``, in place."""
    config, head = run.config, _linear_head(model)
    size = max(config.batch_size, 1024)
    epochs = run.epochs(size)
    views = cached_features(model, run) if epochs else []
    start = torch.cat([head.weight.detach(), _bias(head).unsqueeze(1)], 1).double()
    theta = torch.zeros_like(start) if config.part == "fresh_head" else start.clone()
    mask = torch.ones(head.in_features, dtype=torch.float64, device=start.device)
    held: Tensor | None = None

    def logits(H: Tensor) -> Tensor:
        return (H * F.pad(mask, (0, 1), value=1.0)) @ theta.T

    def step(batch: Tensor, view: Tensor, rate: float) -> Tensor:
        nonlocal theta, mask, held
        H = F.pad(view[batch], (0, 1), value=1.0)
        losses, E = _errors(logits(H), run.data.labels[batch], run.task)
        if config.part == "feature_mask":
            rows = H[:, :-1] * (E @ theta[:, :-1])
            mask = (mask - rate * rows.T @ sample_weights(rows @ rows.T, damping=config.damping)).clamp(0, 1)
            return losses
        if held is None:  # at the first step: the classifier that came in
            held = (config.eta if config.part == "head" else 0.0) * E.square().T @ H.square() / len(H)
        residual = held * (theta - start)
        if config.fisher == "true":
            right = E.T @ H / len(H) + residual
            move = true_head_step(H, logits(H).softmax(1), right, damping=config.damping, curvature=held)
        elif config.eta and config.part == "head":
            move = head_step(H, E, damping=config.damping, curvature=held, residual=residual)
        else:
            move = head_step(H, E, damping=config.damping)
        theta = theta - rate * move
        return losses

    history = _passes(run, size, epochs, f"natural {config.part}", lambda b, e, r: step(b, views[e % len(views)], r))
    if epochs:
        with torch.no_grad():
            head.weight.copy_(theta[:, :-1] * mask)
            if head.bias is not None:
                head.bias.copy_(theta[:, -1])
    return history


def _bias(head: nn.Linear) -> Tensor:
    return head.bias.detach() if head.bias is not None else head.weight.new_zeros(head.out_features)


def _errors(logits: Tensor, targets: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    """Losses (N,) and their gradients at the logits (N, K), float64."""
    leaf = logits.detach().requires_grad_()
    losses = task.losses(leaf, targets)
    (errors,) = torch.autograd.grad(losses.sum(), leaf)
    return losses.detach(), errors.double()


# -- the last hidden layers ----------------------------------------------------------------


def _last_layers(model: nn.Module, run: _Run) -> list[str]:
    """Names of the hidden convolutions and linear layers that run once, in order, then the head's."""
    modules = dict(model.named_modules())
    names = [layer.name.removesuffix(".weight") for layer in unit_layers(model, scope="all")]
    hidden = {name: modules[name] for name in names if isinstance(modules.get(name), (nn.Conv2d, nn.Linear))}
    head = _linear_head(model)
    with recorded(hidden) as seen, evaluating(model), torch.no_grad():
        model(channels_last(run.task.inputs(run.data.images[:2])))
    once = [name for name in hidden if len(seen.outputs.get(name, ())) == 1]
    if not once:
        raise ConfigError("there is no hidden layer to tune", expected="a convolution or linear layer", got="none")
    return [*once, next(name for name, module in modules.items() if module is head)]


def _tune_block(model: nn.Module, names: list[str], run: _Run) -> list[HistoryRow]:
    """Start the layers ``names`` afresh and tune them by natural steps, in place."""
    config = run.config
    epochs = run.epochs(config.batch_size)
    if not epochs:
        return []
    chosen = {name: model.get_submodule(name) for name in names}
    with seeded(run.seed, run.device):
        for module in chosen.values():
            module.reset_parameters()  # type: ignore[operator]
    renew_statistics(
        model,
        run.data,
        task=run.task,
        batch_size=config.batch_size,
        seed=run.seed,
        device=run.device,
        progress=run.progress,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = [p.requires_grad_() for module in chosen.values() for p in module.parameters(recurse=False)]
    generator = torch.Generator().manual_seed(run.seed)

    def step(batch: Tensor, epoch: int, rate: float) -> Tensor:
        images = run.task.augmented(run.data.images[batch], generator)
        targets = run.data.labels[batch]
        with recorded(chosen) as seen, evaluating(model):
            losses = run.task.losses(model(channels_last(run.task.inputs(images))), targets)
        outputs = [seen.outputs[name][0] for name in names]
        slopes = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
        gram = torch.zeros(len(batch), len(batch), device=losses.device)
        for (name, module), slope in zip(chosen.items(), slopes, strict=True):
            for part, _ in module.named_parameters(recurse=False):
                rows = layer_gradients(module, part, seen.inputs[name][0].detach(), slope).flatten(1)
                gram += rows @ rows.T
        weights = _weights(gram, losses, config.damping)
        # sum_n a_n g_n, without keeping any g_n: the gradient of the weighted losses.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad((weights * losses).sum(), parameters), strict=True
        ):
            parameter.data.sub_(gradient, alpha=rate)
        return losses.detach()

    return _passes(run, config.batch_size, epochs, f"natural block of {len(names) - 1}", step)


def _weights(gram: Tensor, losses: Tensor, damping: float) -> Tensor:
    _finite(losses)
    return sample_weights(gram.detach(), damping=damping)


def _finite(losses: Tensor) -> None:
    if not bool(torch.isfinite(losses).all()):
        raise MethodDiverged("NGF diverged", expected="finite losses", got="NaN or Inf", hint="Lower lr, raise damping")


def _passes(
    run: _Run, size: int, epochs: int, name: str, step: Callable[[Tensor, int, float], Tensor]
) -> list[HistoryRow]:
    """``epochs`` shuffled passes of ``step(batch, epoch, rate)``."""
    generator = torch.Generator().manual_seed(run.seed)
    each = len(batch_indices(len(run.data), size, torch.Generator()))
    history: list[HistoryRow] = []
    done = 0
    with run.progress.phase(name, total=epochs * each) as phase:
        for epoch in range(epochs):
            total = 0.0
            for batch in batch_indices(len(run.data), size, generator):
                rate = run.config.lr * (1 - done / (epochs * each))
                losses = step(batch.to(run.device), epoch, rate)
                _finite(losses)
                total += float(losses.mean())
                done += 1
                phase.advance(loss=total / each)
            history.append({"phase": name, "step": epoch + 1, "loss": total / each, "lr": rate})
    return history


METHOD = Method(
    name="ngf",
    config=NGFConfig,
    function=purify,
    summary="start the last layers afresh and tune them by exact natural-gradient steps (NGF)",
    zero_steps={"epochs": 0},
)
