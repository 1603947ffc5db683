"""Pictures of a scan: where the classes stand, and what an inverted trigger does to real images. PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from defense_core.data import CleanSet
from defense_core.scan.base import InvertedTrigger, Observation
from defense_core.scan.sampling import spread_over_classes

SHOWN_IMAGES = 4
MAX_BARS = 40
INK, SOFT, ALARM = "#3b4252", "#9aa5b8", "#c2410c"
STYLE = {"font.family": "DejaVu Sans", "text.parse_math": False}
"""Around building a figure as well as writing it: a text keeps what held when it was made, and the layout reads it. The
names of classes are the user's, and a dollar in them is a dollar."""
TITLES = {
    "margin": "How strongly any image can be made to look like each class",
    "subspace": "How strongly each class is reached without what its own images show",
    "token": "How firmly one part of the image alone sends images to each class",
    "patch": "How small a patch sends images to each class (higher: smaller)",
    "additive": "How well one faint change sends images to each class",
    "generator": "How well a learned change sends images to each class",
    "pairs": "How easily images of other classes are turned into each class",
}


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        name: file name without ending.
        title, note: for the page.
        alt: what it shows, in words.
        png: the file's bytes.
    """

    name: str
    title: str
    note: str
    alt: str
    png: bytes


def class_pictures(
    observations: Mapping[str, Observation], suspects: Sequence[int], class_names: Sequence[str] = ()
) -> list[Picture]:
    """A bar a class for every detector of the verdict that scores classes; suspected ones in another colour."""
    return [
        _bars(observation, suspects, class_names)
        for name, observation in observations.items()
        if name in TITLES and len(observation.class_scores) > 1
    ]


@matplotlib.rc_context(STYLE)
def trigger_picture(
    detector: str, trigger: InvertedTrigger, clean: CleanSet, note: str, class_names: Sequence[str] = ()
) -> Picture:
    """Images of other classes as they are, with the trigger, and the change itself, amplified to be seen."""
    wanted = clean.labels != trigger.target
    if trigger.sources:
        wanted &= torch.isin(clean.labels, torch.tensor(trigger.sources, device=clean.labels.device))
    # In turn of every class: the first of a file are often of one.
    chosen = [each for each in spread_over_classes(clean).tolist() if wanted[each]] or list(range(len(clean)))
    chosen = chosen[:SHOWN_IMAGES]
    images = clean.images[torch.tensor(chosen)].cpu()
    changed = trigger.apply(images).cpu()
    difference = changed - images.float()
    gain = 127 / max(float(difference.abs().max()), 1.0)
    rows = (images.float(), changed, 128 + gain * difference)
    named = _named(trigger.target, class_names)
    kind = {"patch": "patch", "additive": "faint change", "generated": "learned change"}[trigger.kind]
    away = f" from {', '.join(_named(each, class_names) for each in trigger.sources)}" if trigger.sources else ""
    title = f"{detector}: {kind} found {f'to lead{away} to' if away else 'for'} {named}"
    figure = Figure(figsize=(1.0 * len(chosen) + 0.9, 3.1), dpi=96)
    for row, (label, pixels) in enumerate(zip(("clean", "with it", f"change ×{gain:.2g}"), rows, strict=True)):
        for column, image in enumerate(pixels):
            axes = figure.add_subplot(3, len(chosen), row * len(chosen) + column + 1)
            axes.imshow(_shown(image), vmin=0, vmax=255, cmap="gray", interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(label, fontsize=8, color=INK)
    figure.tight_layout(pad=0.3)
    alt = f"{len(chosen)} clean images, the same images with the inverted trigger for {named}, and the amplified change"
    source = "".join(f"-from-{each}" for each in trigger.sources)
    return Picture(f"trigger-{detector}-{trigger.target}{source}", title, note, alt, _png(figure))


@matplotlib.rc_context(STYLE)
def _bars(observation: Observation, suspects: Sequence[int], class_names: Sequence[str]) -> Picture:
    scores = torch.tensor(observation.class_scores)
    order = list(range(len(scores)))
    if len(scores) > MAX_BARS:
        order = scores.argsort(descending=True, stable=True)[:MAX_BARS].tolist()
    heights = [float(scores[place] - scores.median()) for place in order]
    labels = [_named(observation.classes[place], class_names) for place in order]
    colours = [ALARM if observation.classes[place] in suspects else SOFT for place in order]
    figure = Figure(figsize=(5.6, 2.2), dpi=96)
    axes = figure.add_subplot()
    axes.bar(range(len(heights)), heights, color=colours)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(labels)), labels, rotation=35 if max(map(len, labels)) > 2 else 0, ha="right", fontsize=8)
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout(pad=0.4)
    highest = labels[max(range(len(heights)), key=heights.__getitem__)]
    shown = f"{len(heights)} classes" if len(heights) == len(scores) else f"the highest {len(heights)} of {len(scores)}"
    marked = ", ".join(_named(each, class_names) for each in suspects) or "none"
    return Picture(
        f"classes-{observation.detector}",
        TITLES[observation.detector],
        observation.why,
        f"Bars of {shown} around the median of all; {highest} is highest; suspected: {marked}",
        _png(figure),
    )


def _named(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if label < len(class_names) else f"class {label}"


def _shown(image: torch.Tensor) -> Any:
    pixels = image.clamp(0, 255).to(torch.uint8)
    return pixels[0].numpy() if len(pixels) != 3 else pixels.permute(1, 2, 0).numpy()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
