"""How far a loop has come: what of it is saved, and how it goes on from there bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from defense_core.checkpoints import Checkpoint, Saved

Kept = Mapping[str, Tensor | torch.Generator]
"""What a loop changes, by name. Tensors are changed in place, so that they can be put back in place."""

MOMENTUM = "momentum."

logger = logging.getLogger("quarantine")


class Course:
    """The steps of one loop, from a checkpoint on where there is one.

    Attributes:
        done: steps taken, those before a restart among them.
        history: a row per finished epoch.
        finished: the loop had ended before the restart; everything is as it left it.
    """

    def __init__(
        self, checkpoint: Checkpoint, name: str, kept: Kept, *, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Put everything back to where ``checkpoint`` says the loop stood.

        Args:
            checkpoint: the loop's own.
            name: of the loop, for messages.
            kept: everything that its steps read and change, but for the optimiser's momentum.
            optimizer: SGD, whose momentum is saved too.
        """
        self.done = 0
        self.history: list[dict[str, Any]] = []
        self.finished = False
        self._checkpoint = checkpoint
        self._kept = kept
        self._optimizer = optimizer
        saved = checkpoint.load()
        if saved is not None and self._fits(saved, name):
            self._restore(saved)
            logger.info("%s %s at step %d", name, "had ended" if self.finished else "goes on", self.done)

    def step(self) -> None:
        """Count a step, and save if that is due."""
        self.done += 1
        self._checkpoint.save(lambda: self._saved(finished=False), finished=False)

    def finish(self) -> list[dict[str, Any]]:
        """The loop has ended; its history."""
        self._checkpoint.save(lambda: self._saved(finished=True), finished=True)
        return self.history

    def _saved(self, *, finished: bool) -> Saved:
        parts = self._kept if finished else {**self._kept, **_momentum(self._optimizer)}
        tensors = {name: _state(part).detach().to("cpu", copy=True) for name, part in parts.items()}
        return Saved(self.done, finished, tuple(dict(row) for row in self.history), tensors)

    def _fits(self, saved: Saved, name: str) -> bool:
        wanted = {key: (_state(part).shape, _state(part).dtype) for key, part in self._kept.items()}
        got = {key: (value.shape, value.dtype) for key, value in saved.tensors.items() if not key.startswith(MOMENTUM)}
        if wanted != got:
            logger.warning("the checkpoint of %s is of another loop and is not used", name)
        return wanted == got

    @torch.no_grad()
    def _restore(self, saved: Saved) -> None:
        self.done, self.finished = saved.done, saved.finished
        self.history = [dict(row) for row in saved.history]
        for name, part in self._kept.items():
            if isinstance(part, torch.Generator):
                part.set_state(saved.tensors[name])
            else:
                part.copy_(saved.tensors[name])
        if self._optimizer is not None:
            parameters = self._optimizer.param_groups[0]["params"]
            for name, value in saved.tensors.items():
                if name.startswith(MOMENTUM):
                    parameter = parameters[int(name.removeprefix(MOMENTUM))]
                    self._optimizer.state[parameter]["momentum_buffer"] = value.to(parameter.device)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer of ``model``, those that no state dict holds among them."""
    return {f"model.{name}": value for name, value in [*model.named_parameters(), *model.named_buffers()]}


def random_state(device: torch.device | str) -> dict[str, torch.Generator]:
    """The process's generators that a network on ``device`` may draw from by itself."""
    place = torch.device(device)
    found = {"random.cpu": torch.default_generator}
    if place.type == "cuda":
        index = torch.cuda.current_device() if place.index is None else place.index
        found["random.cuda"] = torch.cuda.default_generators[index]
    return found


def _state(part: Tensor | torch.Generator) -> Tensor:
    return part.get_state() if isinstance(part, torch.Generator) else part


def _momentum(optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """Momentum buffers by the position of their parameter; there are none before the first step."""
    if optimizer is None:
        return {}
    buffers = [optimizer.state.get(each, {}).get("momentum_buffer") for each in optimizer.param_groups[0]["params"]]
    return {f"{MOMENTUM}{index}": buffer for index, buffer in enumerate(buffers) if buffer is not None}
