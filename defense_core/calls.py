"""How a network calls its layers, found by running it: methods that work by layer need to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from defense_core.data import CleanSet
from defense_core.errors import MethodNotApplicable
from defense_core.inference import channels_last
from defense_core.layers import evaluating, first_argument, linear_head
from defense_core.task import Task


@dataclass(eq=False)
class Recorded:
    """What layers saw in the forward passes since recording began.

    Attributes:
        inputs: module name to the first argument of each call.
        outputs: module name to the result of each call.
    """

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    def taken(self, name: str) -> Tensor:
        """The first argument of the module's only call since this was last asked, which is then forgotten."""
        self.outputs.pop(name)
        (found,) = self.inputs.pop(name)
        return found


@contextmanager
def recorded(modules: dict[str, nn.Module]) -> Iterator[Recorded]:
    """Record inputs and outputs of ``modules`` in every forward pass; hooks go on every exit path."""
    seen = Recorded()

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], Tensor]:
        def record(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
            seen.inputs.setdefault(name, []).append(first_argument(arguments, named))
            seen.outputs.setdefault(name, []).append(output)
            return output.clone()  # a following in-place operation must not reach what is recorded

        return record

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def few_inputs(data: CleanSet, *, task: Task, device: torch.device | str) -> Tensor:
    """Two samples as the network takes them, with which it is found what its layers are called on."""
    images = data.images[:2].to(device)
    return channels_last(task.inputs(images if len(images) == 2 else images.expand(2, -1, -1, -1)))


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
