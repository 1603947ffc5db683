"""What the detectors read on the zoo's models, kept in the user's cache: read once, recalled by every later stage."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from benchmarks.memory import peak_mb, reset_peak
from benchmarks.zoo import Victim, ZooModel, cache_folder, recipe_task
from defense_core import config
from defense_core.data import CleanSet
from defense_core.files import atomic_directory
from defense_core.progress import NullProgress
from defense_core.scan.base import DRAWS, Observation
from defense_core.scan.detectors import DETECTORS, MANY, Settings, regime_for, regime_of, searched_and_held_out
from defense_core.scan.observe import Observed, observe, wanted
from defense_core.scan.stored_triggers import tensors_of, trigger_from


def clean_images(held_out: CleanSet, count: int, *, seed: int = 17) -> CleanSet | None:
    """The clean set of a user who has ``count`` images, drawn by ``seed``; the same images for every model."""
    if count == 0:
        return None
    order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(seed))
    return held_out.subset(order[: min(count, len(held_out))])


def readings_folder(model: ZooModel, count: int, detector: str, settings: Settings) -> Path:
    """Where what one detector saw on one model is kept."""
    own = {"recipe": model.recipe, "detector": detector, "config": getattr(settings, detector), "seed": DRAWS}
    key = config.digest(own | {"images": 0 if DETECTORS[detector].regimes == ("none",) else count})
    return cache_folder() / "scan" / key.removeprefix("sha256:")[:24]


def detectors_of(count: int) -> tuple[str, ...]:
    """Names of the detectors that a scan with ``count`` images runs."""
    return wanted(("none", regime_for(count)))


def read(model: ZooModel, loaded: Victim, count: int, settings: Settings) -> None:
    """Run the detectors on one model and keep what they saw, triggers included."""
    for detector in detectors_of(count):
        folder = readings_folder(model, count, detector, settings)
        if folder.exists():
            continue
        clean = clean_images(loaded.held_out, count)
        reset_peak("cpu")
        seconds: dict[str, float] = {}
        observed = observe(
            loaded.model, clean, regime_of(clean), settings, task=recipe_task(model.recipe), device="cpu",
            progress=NullProgress(), seconds=seconds, only=(detector,),
        )  # fmt: skip
        observation = observed.observations[detector]
        triggers = [
            {"target": each.target, "kind": each.kind, "sources": each.sources} for each in observation.triggers
        ]
        plain = {key: value for key, value in vars(observation).items() if key != "triggers"}
        facts = {
            "name": model.name,
            "observation": plain | {"triggers": triggers},
            "covariates": observed.covariates,
            "seconds": seconds[detector],
            "peak_mb": peak_mb("cpu"),
        }
        with atomic_directory(folder) as temporary:
            safetensors.torch.save_file(tensors_of(observation.triggers), temporary / "triggers.safetensors")
            (temporary / "observed.json").write_text(json.dumps(config.to_mapping(facts)) + "\n", "utf-8")


def recall(model: ZooModel, count: int, settings: Settings) -> tuple[Observed, dict[str, float], float] | None:
    """(what was seen, seconds by detector, peak MB) of a model that was read before; ``None`` if not wholly."""
    observations, seconds, peaks = {}, {}, []
    covariates: dict[str, float] = {}
    for detector in detectors_of(count):
        folder = readings_folder(model, count, detector, settings)
        if not folder.exists():
            return None
        facts = json.loads((folder / "observed.json").read_text("utf-8"))
        tensors = safetensors.torch.load_file(folder / "triggers.safetensors")
        each = facts["observation"]
        triggers = tuple(
            trigger_from(
                tensors, number, target=trigger["target"], kind=trigger["kind"], sources=tuple(trigger["sources"])
            )
            for number, trigger in enumerate(each["triggers"])
        )  # fmt: skip
        observations[detector] = Observation(
            each["detector"], each["statistic"], each["why"], tuple(each["class_scores"]), tuple(each["classes"]),
            tuple(each["targets"]), tuple(map(tuple, each["pairs"])), triggers, each["facts"],
        )  # fmt: skip
        covariates.update(facts["covariates"])
        seconds[detector] = facts["seconds"]
        peaks.append(facts["peak_mb"])
    return Observed(observations, covariates, ()), seconds, max(peaks)


def images_for(loaded: Victim, count: int) -> tuple[CleanSet | None, CleanSet | None]:
    """Of a user's ``count`` images, those that the detectors searched with, and the others."""
    first = clean_images(loaded.held_out, min(count, MANY))
    searched, held_out = searched_and_held_out(first, regime_of(first))
    more = clean_images(loaded.held_out, count)
    if count <= MANY or held_out is None or more is None:
        return searched, held_out
    more = more.subset(torch.arange(MANY, len(more)))
    return searched, CleanSet(
        torch.cat([held_out.images, more.images]), torch.cat([held_out.labels, more.labels]), held_out.num_classes
    )
