"""What a choice between candidates may rest on: clean accuracy and answers on noisy images. No trigger is involved."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from defense_core.data import CleanSet
from defense_core.progress import Progress
from defense_core.task import Task

MAX_IMAGES = 2000
"""Answers are kept for at most this many images of the select split, evenly spaced."""

NOISE_PIXELS = 16.0
"""Standard deviation of the noise, in pixel values 0..255."""

BATCH = 256


def select_signals(
    model: nn.Module, select: CleanSet, *, task: Task, device: str, progress: Progress
) -> dict[str, Any] | None:
    """Accuracy on the *select* split, and the labels that the model gives to noisy copies of its images.

    The noise is the same for every model, so the answers of two models can be compared one by one.

    Returns:
        ``{"images", "correct", "accuracy", "noisy_labels"}``; ``None`` where the split is empty.
    """
    if not len(select):
        return None
    clean = _answers(model, select.images, task=task, device=device, progress=progress)
    correct = int((clean == select.labels.cpu()).sum())
    index = torch.linspace(0, len(select) - 1, min(MAX_IMAGES, len(select))).round().long()
    noisy = _answers(model, _noisy(select.images[index]), task=task, device=device, progress=progress)
    return {
        "images": len(select),
        "correct": correct,
        "accuracy": correct / len(select),
        "noisy_labels": noisy.tolist(),
    }


def _noisy(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator) * NOISE_PIXELS
    return (images.cpu().float() + noise).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def _answers(model: nn.Module, images: Tensor, *, task: Task, device: str, progress: Progress) -> Tensor:
    """Predicted labels on the CPU, int64 (N,). The model is in eval mode and is moved back to the CPU."""
    answers = []
    model.to(device)
    try:
        with progress.phase("signals", total=-(-len(images) // BATCH)) as phase:
            for start in range(0, len(images), BATCH):
                batch = images[start : start + BATCH].to(device)
                answers.append(task.predict(model(task.inputs(batch))).cpu())
                phase.advance()
    finally:
        model.cpu()
    return torch.cat(answers)
