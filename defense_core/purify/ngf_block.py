"""NGF on the last hidden layers, started afresh: exact natural steps by the samples' Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from defense_core.calls import few_inputs, once_per_sample, recorded
from defense_core.errors import MethodNotApplicable
from defense_core.inference import channels_last
from defense_core.layer_gradients import has_rule, layer_gradients, patch_sums
from defense_core.layers import evaluating, linear_head, unit_layers
from defense_core.loop import HistoryRow, seeded
from defense_core.purify.natural_step import Damping, sample_weights
from defense_core.purify.ngf_run import NAME, Run, passes, require_finite
from defense_core.purify.statistics import renew_statistics


def last_layers(model: nn.Module, run: Run) -> list[str]:
    """Names of the hidden convolutions and linear layers that run once, in call order, and the head's."""
    modules = dict(model.named_modules())
    names = [layer.name.removesuffix(".weight") for layer in unit_layers(model, scope="all")]
    hidden = {name: modules[name] for name in names if name in modules and has_rule(modules[name])}
    head = linear_head(model, method=NAME)
    once = list(once_per_sample(model, hidden, few_inputs(run.data, task=run.task, device=run.device)))
    if not once:
        raise MethodNotApplicable(
            "there is no hidden layer to tune",
            expected="a convolution or linear layer",
            got="none",
            hint="Use another method",
        )
    return [*once, next(name for name, module in modules.items() if module is head)]


def tune_block(model: nn.Module, names: list[str], run: Run) -> list[HistoryRow]:
    """Start the layers ``names`` afresh and tune them by natural steps, in place."""
    config = run.config
    if not run.epochs:
        return []
    chosen = {name: model.get_submodule(name) for name in names}
    before = _norms(model, run)
    with seeded(run.seed, run.device):
        for module in chosen.values():
            module.reset_parameters()  # type: ignore[operator]
    behind = {name for name, inputs in _norms(model, run).items() if not torch.equal(inputs, before[name])}
    # In front of the fresh layers nothing changed; measured afresh on clean images, those statistics would bring a
    # closed backdoor back.
    renew_statistics(
        model,
        run.data,
        task=run.task,
        batch_size=config.batch_size,
        seed=run.seed,
        device=run.device,
        progress=run.progress,
        only=behind,
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    parameters = [p.requires_grad_() for module in chosen.values() for p in module.parameters(recurse=False)]
    generator, damping = torch.Generator().manual_seed(run.seed), Damping(config.damping)

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
                gram += _gram(module, part, seen.inputs[name][0].detach(), slope)
        require_finite(losses)
        weights = sample_weights(gram.detach(), damping=damping)
        # sum_n a_n g_n, without keeping any g_n: the gradient of the weighted losses.
        for parameter, gradient in zip(
            parameters, torch.autograd.grad((weights * losses).sum(), parameters), strict=True
        ):
            parameter.data.sub_(gradient, alpha=rate)
        return losses.detach()

    changed = {f"layer.{index}": parameter for index, parameter in enumerate(parameters)}
    return passes(
        run,
        f"natural block of {len(names) - 1}",
        step,
        kept={**changed, "augmentation": generator, "damping": damping.first},
    )


def _gram(module: nn.Module, part: str, inputs: Tensor, slope: Tensor) -> Tensor:
    """Inner products of the samples' gradients in one parameter, (N, N). Gradients that are outer products,
    ``s_n a_n^T``, are never made: those of a linear layer of 4,096 units that meets as many take 64 MB a sample."""
    if isinstance(module, nn.Linear) and slope.dim() == 2:
        outer = slope @ slope.T
        return outer * (inputs @ inputs.T) if part == "weight" else outer
    # In front of a mean over all places the slope is the same at each of them.
    if isinstance(module, nn.Conv2d) and part == "weight" and module.groups == 1:
        once = slope[:, :, :1, :1]
        if torch.equal(slope, once.expand_as(slope)):
            sums = patch_sums(module, inputs, *slope.shape[2:])
            return (once.flatten(1) @ once.flatten(1).T) * (sums @ sums.T)
    rows = layer_gradients(module, part, inputs, slope).flatten(1)
    return rows @ rows.T


def _norms(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """What every normalisation with running statistics is given for two clean images."""
    norms: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
    }
    with recorded(norms) as seen, evaluating(model), torch.no_grad():
        model(few_inputs(run.data, task=run.task, device=run.device))
    return {name: torch.cat([each.flatten() for each in inputs]) for name, inputs in seen.inputs.items()}
