"""Two observations of the purification methods, measured as features of a model; neither is part of a verdict.

*Activeness*: ascending the loss on clean images moves the weights of few units of a backdoored model far more than
those of the others (Lin et al., TSBD, NeurIPS 2024, arXiv 2405.20291, observation 2). *Curvature*: the loss around a
backdoored model's weights is sharper than around a clean one's (Karim et al., *Fisher information guided purification*,
ECCV 2024, arXiv 2409.00863). Both depend on how a model was trained, and so say something only beside references of
the same recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.curvature import fisher_diagonal
from defense_core.data import CleanSet
from defense_core.errors import ConfigError, MethodDiverged, MethodNotApplicable
from defense_core.inference import channels_last, images_at_once
from defense_core.layers import unit_layers
from defense_core.loop import working_copy
from defense_core.purify.unlearning import unlearning_changes
from defense_core.purify.zeroing import neuron_weight_change
from defense_core.scan.base import Observation, Subject, unmeasured
from defense_core.spectrum import Operator, hessian, top_eigenvalue

SMALLEST = 1e-12
"""A curvature below it counts as it: its logarithm says nothing more."""


@dataclass(frozen=True)
class ActivenessConfig:
    """Settings of the clean unlearning.

    Attributes:
        steps: gradient-ascent steps, at least; a pass over the images is never cut short.
        lr: of the ascent.
        batch_size: images a step.
        share: of a layer's units, those that move most.
    """

    steps: int = 5
    lr: float = 1e-3
    batch_size: int = 128
    share: float = 0.05

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "1 or more", self.steps)
        require(self.lr > 0, "lr", "a positive rate", self.lr)
        require(self.batch_size >= 1, "batch_size", "1 or more", self.batch_size)
        require(0 < self.share < 1, "share", "in (0, 1)", self.share)


MOST_NUMBERS = 1 << 30
"""Of the eigenvalue's vectors and their copy, 4 GiB: what is evidence only may not end a scan for want of memory."""


@dataclass(frozen=True)
class CurvatureConfig:
    """Settings of the curvature.

    Attributes:
        images: for the Fisher trace, at most.
        hessian_images: for the Hessian, at most; its graph holds them all at once.
        products: Hessian-vector products, at most.
        tolerance: relative residual of the eigenvalue at which to stop.
    """

    images: int = 100
    hessian_images: int = 32
    products: int = 8
    tolerance: float = 0.03

    def __post_init__(self) -> None:
        require(self.images >= 1, "images", "1 or more", self.images)
        require(self.hessian_images >= 1, "hessian_images", "1 or more", self.hessian_images)
        require(self.products >= 1, "products", "1 or more", self.products)
        require(self.tolerance > 0, "tolerance", "a positive share", self.tolerance)


def activeness(subject: Subject, config: ActivenessConfig = ActivenessConfig()) -> Observation:
    """Ascend the clean loss for a few steps on a copy, and see whether few units of the last layer take it all.

    The statistic is the logarithm of how much further the most moved units of the last unit layer move than its mean
    unit. A ratio within one layer: no scale of the weights or of the gradient enters.

    Raises:
        ConfigError: there are no images.
        NonFiniteOutputs: the model answers NaN or Inf.
        OutOfTime: the scan's time is used up.
        Cancelled: a stop was requested.
    """
    images = _images(subject, "activeness")
    layers = unit_layers(subject.model)
    if not layers:
        return unmeasured("activeness", "it has no hidden layer with units")
    try:
        changes = unlearning_changes(
            subject.model, images, epochs=1, lr=config.lr, batch_size=config.batch_size, precision="auto",
            task=subject.task, seed=subject.seed, device=subject.device, progress=subject.progress,
            min_steps=config.steps,
        )  # fmt: skip
    except MethodDiverged as error:
        return unmeasured("activeness", f"the unlearning diverged ({error})")
    moved = neuron_weight_change(layers, changes)
    if not all(torch.isfinite(each).all() for each in moved):
        return unmeasured("activeness", "its weights moved by more than a number can hold")
    ratios = [concentration(each, config.share) for each in moved]
    sizes = [float(layer.weight.norm()) / math.sqrt(layer.weight.numel()) for layer in layers]
    relative = [
        float(change.mean()) / size for change, size in zip(changes, sizes, strict=True) if size > 0 and change.any()
    ]
    return Observation(
        detector="activeness",
        statistic=ratios[-1],
        why=(
            f"When clean knowledge is unlearned, the {config.share:.0%} most active units of the last hidden layer "
            f"change {math.exp(ratios[-1]):.1f} times as much as its mean unit; a backdoor concentrates the change, "
            f"but so does longer training."
        ),
        facts=MappingProxyType(
            {
                "measured": True,
                "log_ratio_by_layer": {layer.name: ratio for layer, ratio in zip(layers, ratios, strict=True)},
                "mean_log_ratio": sum(ratios) / len(ratios),
                "log_relative_change": math.log(sum(relative) / len(relative)) if relative else 0.0,
            }
        ),
    )


def concentration(moved: Tensor, share: float) -> float:
    """``log`` of the mean change of the ``share`` of units that moved most over the mean change of all.

    Args:
        moved: change of each unit's weights, non-negative (units,).

    Returns:
        0 where all units moved alike, or none did.
    """
    values = moved.double().sort(descending=True).values
    mean = float(values.mean())
    return math.log(float(values[: max(1, round(share * len(values)))].mean()) / mean) if mean > 0 else 0.0


def curvature(subject: Subject, config: CurvatureConfig = CurvatureConfig()) -> Observation:
    """Sharpness of the clean loss around the weights, in units of the weights' own sizes.

    With ``s_l`` the root mean square of weight tensor *l* and ``S = diag(s)``: the trace of ``S F S`` (F: empirical
    Fisher matrix; the statistic is its logarithm) and the largest eigenvalue of ``S H S`` (H: Hessian). A network
    before a normalisation can be multiplied by any number without changing its function; both stay as they are, as
    the plain trace and eigenvalue would not.

    Raises:
        ConfigError: there are no images.
        NonFiniteOutputs: the model answers NaN or Inf.
        OutOfTime: the scan's time is used up.
        Cancelled: a stop was requested.
    """
    images = _images(subject, "curvature")
    model = working_copy(subject.model, subject.device).eval()
    names = [name for name, value in model.named_parameters() if value.dim() >= 2]
    if not names:
        return unmeasured("curvature", "it has no weights")
    size = sum(value.numel() for name, value in model.named_parameters() if name in names)
    if 2 * size * config.products > MOST_NUMBERS:
        return unmeasured("curvature", f"{config.products} vectors of {size:,} numbers are too many to keep")
    try:
        trace = scaled_trace(subject, model, images.subset(_spread(images, config.images)), names)
        with subject.progress.phase("curvature: Hessian", total=config.products) as phase:
            fitting = images_at_once(images.images, config.hessian_images)
            few = images.subset(_spread(images, fitting))
            operator, size = scaled_hessian(subject, model, few, names, advance=phase.advance)
            found = top_eigenvalue(
                operator, size, generator=subject.generator(), device=subject.device,
                max_iterations=config.products, tolerance=config.tolerance,
            )  # fmt: skip
    except MethodNotApplicable as error:  # a BatchNorm without running statistics: no sample has a loss of its own
        return unmeasured("curvature", str(error))
    # Lanczos ends so on products that are not finite.
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        found = None
    if found is None or not (math.isfinite(trace) and math.isfinite(found.value)):
        return unmeasured("curvature", "its gradients are larger than a number can hold")
    return Observation(
        detector="curvature",
        statistic=math.log(max(trace, SMALLEST)),
        why=(
            f"Around the model's weights the clean loss is of sharpness {trace:.3g} (Fisher trace relative to the "
            f"weights' sizes); a backdoor raises it, and so do longer training and misclassified images."
        ),
        facts=MappingProxyType(
            {
                "measured": True,
                "log_trace": math.log(max(trace, SMALLEST)),
                "eigenvalue": found.value,
                "log_eigenvalue": math.log(max(found.value, SMALLEST)),
                "eigenvalue_converged": found.converged,
            }
        ),
    )


def scaled_trace(subject: Subject, model: nn.Module, images: CleanSet, names: list[str]) -> float:
    """``sum_l s_l^2 Tr F_l`` over the weight tensors ``names`` of ``model``."""
    with subject.progress.phase("curvature: Fisher") as phase:
        diagonal = fisher_diagonal(
            model,
            channels_last(subject.task.inputs(images.images.to(subject.device))),
            images.labels.to(subject.device),
            losses=subject.task.losses,
            names=names,
            after_chunk=phase.advance,
        )
    sizes = _sizes(model, names)
    return sum(float(diagonal[name].sum(dtype=torch.float64)) * sizes[name] ** 2 for name in names)


def scaled_hessian(
    subject: Subject, model: nn.Module, images: CleanSet, names: list[str], *, advance: Callable[[], None]
) -> tuple[Operator, int]:
    """``S H S`` of the mean loss as a product with a flat vector, and its size; ``advance`` is called per product."""
    inputs = channels_last(subject.task.inputs(images.images.to(subject.device)))
    plain, size = hessian(model, inputs, images.labels.to(subject.device), losses=subject.task.losses, names=names)
    parameters, sizes = dict(model.named_parameters()), _sizes(model, names)
    scale = torch.cat([torch.full((parameters[name].numel(),), sizes[name]) for name in names]).to(subject.device)

    def product(vector: Tensor) -> Tensor:
        advance()
        return scale * plain(scale * vector)

    return product, size


def _sizes(model: nn.Module, names: list[str]) -> dict[str, float]:
    """Root mean square of each weight tensor."""
    parameters = dict(model.named_parameters())
    return {name: float(parameters[name].detach().double().square().mean().sqrt()) for name in names}


def _images(subject: Subject, detector: str) -> CleanSet:
    """The clean images, after a look at whether the model answers them.

    Raises:
        ConfigError: there are none.
        NonFiniteOutputs: the model answers NaN or Inf.
    """
    if subject.images is None or not len(subject.images):
        raise ConfigError(f"{detector} needs clean images", expected="at least one", got="none")
    with torch.no_grad():
        subject.logits(subject.images.images[:2].to(subject.device).float() / 255)
    return subject.images


def _spread(images: CleanSet, count: int) -> Tensor:
    """Positions of at most ``count`` images, spread evenly over the set, so that a set sorted by class serves too."""
    return torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()
