"""How a network calls its layers, found by running it: methods that work by layer need to know."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from defense_core.errors import MethodNotApplicable
from defense_core.layers import evaluating, linear_head
from defense_core.per_sample import recorded


@torch.no_grad()
def once_per_sample(model: nn.Module, modules: dict[str, nn.Module], inputs: Tensor) -> dict[str, nn.Module]:
    """Those of ``modules`` that one pass calls once, for all samples, which are their output's first dimension.

    Args:
        inputs: two samples or more, (N, ...). The model runs a second time, on one less: where there are as many
            tokens as samples, a layer that has tokens first looks like one that has samples first.

    Returns:
        In the order of their calls.
    """
    for count in range(len(inputs), max(len(inputs) - 2, 0), -1):
        with recorded(modules) as seen, evaluating(model):
            model(inputs[:count])
        modules = {
            name: modules[name]
            for name, called in seen.outputs.items()
            if [len(output) for output in called] == [count]
        }
    return modules


@torch.no_grad()
def used_head(model: nn.Module, inputs: Tensor, *, method: str) -> nn.Linear:
    """The classifier, for a method that works on what it is given, (N, D), and on the logits that it makes of it.

    Raises:
        MethodNotApplicable: it is not linear; or the last linear layer is not called, more than once, on something
            else than one vector a sample, or does not make the logits.
    """
    head = linear_head(model, method=method)
    with recorded({"head": head}) as seen, evaluating(model):
        logits = model(inputs)
    shapes = [tuple(given.shape) for given in seen.inputs.get("head", [])]
    wanted = (len(inputs), head.in_features)
    if shapes != [wanted] or tuple(logits.shape) != (len(inputs), head.out_features):
        raise MethodNotApplicable(
            f"{method} needs a classifier that makes the logits of one vector a sample",
            expected=f"the last nn.Linear called once, on {wanted}, for logits of its {head.out_features} outputs",
            got=f"called on {shapes or 'nothing'}, logits {tuple(logits.shape)}",
            hint="Define the classifier after all other linear layers, or use another method",
        )
    return head
