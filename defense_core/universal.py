"""Universal targeted perturbations: one small change of all images for each class that a model is pushed towards.

Moosavi-Dezfooli et al., *Universal adversarial perturbations*, CVPR 2017, in the targeted form. A backdoored model has
a shortcut to its target class, and a perturbation computed on it finds and uses that shortcut, whatever the trigger
was. So the share of images that the same perturbation still sends to that class after purification says whether the
shortcut is still there. Clean images are all that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.data import CleanSet, Splits
from defense_core.inference import autocast, channels_last, correct, images_at_once, items_at_once
from defense_core.loop import same_each_time, working_copy
from defense_core.progress import Phase, Progress
from defense_core.purify.choice import calibrating_temperature, cautious_accuracy, chooser, expected_drop
from defense_core.selection import Signals
from defense_core.task import Task

MAX_TARGETS = 16
"""With more classes than twice this, a short first pass chooses the targets that are reached most easily."""
SCREENING_STEPS = 8
CONVINCED = 0.05
"""Cross-entropy below which a sample counts as convinced."""


@dataclass(frozen=True)
class Search:
    """How a perturbation is found.

    Attributes:
        epsilon: bound on every pixel's change, in grey levels 0..255.
        steps: signed-gradient steps with momentum, each of ``epsilon / 8``.
        batch_size: images a target and step.
        seed: draws the images.
    """

    epsilon: float = 16.0
    steps: int = 40
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.epsilon <= 255, "epsilon", "in (0, 255]", self.epsilon)
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)


@dataclass(frozen=True, eq=False)
class Perturbations:
    """What was found.

    Attributes:
        targets: class of each perturbation, in ascending order.
        changes: float32 (T, C, H, W), grey levels to add to an image before it is clipped to 0..255.
    """

    targets: tuple[int, ...]
    changes: Tensor


def universal_perturbations(
    model: nn.Module,
    clean: CleanSet,
    *,
    task: Task,
    device: torch.device | str,
    progress: Progress,
    search: Search = Search(),
) -> Perturbations:
    """For each class *t*, ``argmin sum CE(f(clip(x + change)), t)`` subject to ``max |change| <= epsilon``.

    Args:
        model: left as it is.
        clean: images that the search draws from; their labels are not used.

    Returns:
        One perturbation a class; where there are more than ``2 * MAX_TARGETS`` classes, for the ``MAX_TARGETS``
        whose loss is lowest after a few steps.
    """
    frozen = working_copy(model, device).eval()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    images = clean.images.to(device)
    targets = torch.arange(clean.num_classes)
    # Compared between candidates of several processes: a run that is resumed has to find the same again.
    with progress.phase("universal perturbations") as phase, same_each_time(device):

        def found(targets: Tensor, steps: int) -> tuple[Tensor, Tensor]:
            parts = []
            for some in targets.split(items_at_once(images, search.batch_size)):
                parts.append(_descend(frozen, images, some, steps, search, task=task, phase=phase))
            changes, losses = zip(*parts, strict=True)
            return torch.cat(changes), torch.cat(losses)

        if len(targets) > 2 * MAX_TARGETS:
            _, losses = found(targets, SCREENING_STEPS)
            targets = losses.argsort(stable=True)[:MAX_TARGETS].sort().values
        changes, _ = found(targets, search.steps)
    return Perturbations(tuple(targets.tolist()), changes)


@torch.no_grad()
def reached(
    model: nn.Module, clean: CleanSet, perturbations: Perturbations, *, task: Task, device: torch.device | str
) -> tuple[float, ...]:
    """For each perturbation, the share of perturbed images of other classes that ``model`` puts into its target.

    Args:
        model: left as it is.
        clean: images to perturb; those of the target class itself are left out.

    Returns:
        Shares in [0, 1]; 0 for a target without any image of another class.
    """
    frozen = working_copy(model, device).eval()
    context = autocast(frozen, "auto", device)
    shares = []
    for target, change in zip(perturbations.targets, perturbations.changes, strict=True):
        others = clean.images[clean.labels != target]
        hits = 0
        for images in others.split(images_at_once(others, 256)):
            perturbed = (images.to(device) + change.to(device)).clamp(0, 255) / 255
            with context():
                outputs = frozen(channels_last(task.inputs(perturbed)))
            hits += int((task.predict(outputs) == target).sum())
        shares.append(hits / max(len(others), 1))
    return tuple(shares)


def select_signals(
    given: nn.Module,
    purified: nn.Module,
    clean: Splits,
    *,
    task: Task,
    device: torch.device | str,
    progress: Progress,
    perturbations: Perturbations | None = None,
) -> Signals:
    """Ask a purified model.

    The perturbations are found on the *fit* images and tried on the *select* images (on the *fit* images too where
    nothing could be set aside); they depend on the given model and the clean set alone.

    Args:
        perturbations: those of ``given`` and ``clean.fit`` where they are known already.
    """
    asked = chooser(clean)
    source, candidate = (working_copy(model, device).eval() for model in (given, purified))
    right = [correct(model, asked, task=task, device=device, precision="auto") for model in (source, candidate)]
    if perturbations is None:
        perturbations = universal_perturbations(given, clean.fit, task=task, device=device, progress=progress)
    drop = expected_drop(
        source,
        candidate,
        asked,
        task=task,
        seed=0,
        device=device,
        progress=progress,
        temperature=calibrating_temperature(source, asked, task=task, device=device),
    )
    before, after = (reached(model, asked, perturbations, task=task, device=device) for model in (given, purified))
    return Signals(
        images=len(asked),
        correct_before=int(right[0].sum()),
        correct=int(right[1].sum()),
        cautious_accuracy=cautious_accuracy(right[0], right[1]),
        targets=perturbations.targets,
        reached_before=before,
        reached=after,
        expected_drop=drop,
    )


def _descend(
    model: nn.Module, images: Tensor, targets: Tensor, steps: int, search: Search, *, task: Task, phase: Phase
) -> tuple[Tensor, Tensor]:
    """Changes (T, C, H, W) and the last mean losses (T,) of some targets, on the CPU."""
    generator = torch.Generator().manual_seed(search.seed)
    context = autocast(model, "auto", images.device)
    changes = torch.zeros(len(targets), *images.shape[1:], device=images.device)
    momentum = torch.zeros_like(changes)
    wanted = targets.to(images.device).repeat_interleave(search.batch_size)
    losses = torch.zeros(len(targets))
    for _ in range(steps):
        index = torch.randint(len(images), (search.batch_size,), generator=generator).to(images.device)
        changes.requires_grad_(True)
        perturbed = (images[index][None] + changes[:, None]).clamp(0, 255).flatten(0, 1) / 255
        with context():
            outputs = model(channels_last(task.inputs(perturbed)))
        # Samples that are well inside the target class already pull no further.
        each = task.losses(outputs, wanted).clamp_min(CONVINCED)
        (gradient,) = torch.autograd.grad(each.sum(), changes)
        momentum = 0.8 * momentum + gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(1e-12)
        changes = changes.detach() - search.epsilon / 8 * momentum.sign()
        changes = changes.clamp(-search.epsilon, search.epsilon)
        losses = each.detach().view(len(targets), -1).mean(1).cpu()
        phase.advance()
    return changes.cpu(), losses
