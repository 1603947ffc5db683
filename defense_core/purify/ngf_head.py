"""NGF on a linear classifier: exact natural steps on features that are computed once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense_core.calls import recorded
from defense_core.inference import autocast, channels_last, images_at_once
from defense_core.layers import evaluating, linear_head
from defense_core.loop import HistoryRow
from defense_core.purify.natural_step import Damping, head_step, sample_weights, true_head_step
from defense_core.purify.ngf_run import NAME, Run, passes, require_finite
from defense_core.task import Task


@torch.no_grad()
def cached_features(model: nn.Module, run: Run) -> list[Tensor]:
    """Inputs of the classifier, float64 (N, D), one tensor a view; eval mode."""
    head = linear_head(model, method=NAME)
    context = autocast(model, run.config.precision, run.device)
    generator = torch.Generator().manual_seed(run.seed)
    views = []
    with recorded({"head": head}) as seen, evaluating(model), run.progress.phase("features", run.config.views) as phase:
        for _ in range(run.config.views):
            parts = []
            for batch in torch.arange(len(run.data)).split(images_at_once(run.data.images)):
                images = run.task.augmented(run.data.images[batch.to(run.device)], generator)
                with context():
                    model(channels_last(run.task.inputs(images)))
                parts.append(seen.taken("head").detach().flatten(1).double())
            views.append(torch.cat(parts))
            phase.advance()
    return views


def tune_on_features(model: nn.Module, run: Run) -> list[HistoryRow]:
    """Every part but ``block``, in place."""
    config, head = run.config, linear_head(model, method=NAME)
    if not run.epochs:
        return []
    held_back = config.part in ("masked", "head") and config.eta > 0
    views = cached_features(model, run)
    start = torch.cat([head.weight.detach(), _bias(head).unsqueeze(1)], 1).double()
    theta = torch.zeros_like(start) if config.part == "fresh_head" else start.clone()
    mask = torch.ones(head.in_features, dtype=torch.float64, device=start.device)
    damping, bias = Damping(config.damping), 0.0 if head.bias is None else 1.0
    held = torch.zeros_like(start)
    if held_back:  # of the classifier that came in, on all images
        H = F.pad(views[0], (0, 1), value=bias)
        losses, E = _errors(H @ start.T, run.data.labels, run.task)
        require_finite(losses)
        held = config.eta * E.square().T @ H.square() / len(H)

    def logits(H: Tensor) -> Tensor:
        return (H * F.pad(mask, (0, 1), value=1.0)) @ theta.T

    def step(batch: Tensor, view: Tensor, rate: float) -> Tensor:
        H = F.pad(view[batch], (0, 1), value=bias)
        losses, E = _errors(logits(H), run.data.labels[batch], run.task)
        require_finite(losses)
        if config.part == "feature_mask":
            rows = H[:, :-1] * (E @ theta[:, :-1])
            mask.sub_(rate * rows.T @ sample_weights(rows @ rows.T, damping=damping)).clamp_(0, 1)
            return losses
        residual = held * (theta - start)
        if config.fisher == "true":
            right = E.T @ H / len(H) + residual
            move = true_head_step(H, logits(H).softmax(1), right, damping=damping, curvature=held)
        elif held_back:
            move = head_step(H, E, damping=damping, curvature=held, residual=residual)
        else:
            move = head_step(H, E, damping=damping)
        theta.sub_(rate * move)
        return losses

    history = passes(
        run,
        f"natural {config.part}",
        lambda b, e, r: step(b, views[e % len(views)], r),
        kept={"theta": theta, "mask": mask, "damping": damping.first},
    )
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
