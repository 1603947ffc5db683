"""Calibrate: clean reference models become a pool file. Not a pipeline step: done once for a kind of model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from components._runtime.loading import open_model, resolve_device
from components._runtime.plan import Loading
from components._runtime.trust import trusted_modules
from defense_core import __version__, architectures
from defense_core.bundle import untrained_bundle
from defense_core.config import canonical_json, digest, from_mapping, require
from defense_core.data import CleanSet, load_clean_set, require_apart
from defense_core.errors import ConfigError, StorageError
from defense_core.evaluate import Proportion
from defense_core.files import reading, require_writable, write_atomic
from defense_core.inference import correct
from defense_core.progress import NullProgress, Progress
from defense_core.scan.detectors import Settings
from defense_core.scan.pool import MIN_REFERENCES, Pool, Reference, Stratum, save_pool
from defense_core.scan.references import ReferenceTraining, pool_of, read_reference, train_reference
from defense_core.task import ImageClassification


def calibrate_pool(
    out: Path,
    *,
    clean: Path,
    specs: Sequence[Mapping[str, Any]],
    train: Path | None = None,
    count: int = MIN_REFERENCES + 1,
    given: Sequence[Path] = (),
    training: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    loading: Loading = Loading(),
    progress: Progress = NullProgress(),
) -> Pool:
    """Train references on ``train``, or take ``given`` ones, read them and write the pool to ``out``.

    What was read is kept in ``<out>.partial``, a file a reference, until the pool is written.

    Args:
        clean: images that no reference was trained on; each is read on its own draw of 10 and 100 of them.
        specs: how the networks are built; references take turns.
        loading: limits, and whose code may build a network.

    Raises:
        ConfigError: neither training images nor references, or both; no reference to train; a bad setting; a reference
            that has learnt nothing.
        DataError: among others, a clean image that references would be trained on: their statistics on it are not
            those of a scan.
        OutputExists: ``out`` is a folder.
        StorageError: ``out``, or what is kept beside it, cannot be written or read.
        ArtifactError, SourceError, MethodDiverged, Cancelled: of the kind that fits.
    """
    require_writable(out)
    if bool(train) == bool(given):
        raise ConfigError(
            "nothing to calibrate with", expected="either --train or --reference", got="both" if given else "neither"
        )
    require(count >= 1, "references", "1 or more", count)
    parsed = from_mapping(Settings, settings or {}, where="settings")
    recipe = from_mapping(ReferenceTraining, training or {}, where="training")
    trusted = trusted_modules(loading.trusted_modules)
    models = [untrained_bundle(spec, limits=loading.limits, trusted_modules=trusted).spec for spec in specs]
    first, where = models[0], resolve_device(device)
    shape: dict[str, Any] = {
        "input_size": first.input_size, "num_classes": first.num_classes, "class_names": first.class_names
    }  # fmt: skip
    images = load_clean_set(clean, **shape)
    stratum = Stratum(first.architecture, first.num_classes, first.input_size, first.class_names)
    shelf = out.with_name(f"{out.name}.partial")
    asked = {
        "settings": parsed, "models": models, "clean": images.digest, "drawn": "for each, over the classes",
        "version": __version__, "torch": torch.__version__, "device": str(where),
    }  # fmt: skip

    def read(name: str, number: int, model: Any, facts: Mapping[str, Any], kept: Path) -> Reference:
        _require_learnt(name, model, images, task=first.task_object(), device=where)
        reference = read_reference(
            name, model, facts, images, parsed, number=number, task=first.task_object(), device=where,
            progress=progress,
        )  # fmt: skip
        write_atomic(kept, canonical_json(reference))
        return reference

    def place(number: int, **made_of: Any) -> Path:
        return shelf / f"{digest({**asked, **made_of}).removeprefix('sha256:')[:16]}-{number:04}.json"

    def trained(data: CleanSet) -> Iterator[Reference]:
        for number in range(count):
            kept = place(number, train=data.digest, recipe=recipe.varied(number))
            earlier = _earlier(kept)
            if earlier is not None:
                yield earlier
                continue
            spec = models[number % len(models)]
            network = architectures.build(spec.architecture, spec.architecture_args, trusted_modules=trusted)
            model, facts = train_reference(
                network, data, number, recipe, task=spec.task_object(), device=where, progress=progress
            )
            recorded = {**facts, "architecture_args": spec.architecture_args}
            yield read(f"reference-{number:04}", number, model, recorded, kept)

    def taken() -> Iterator[Reference]:
        known: dict[str, Path] = {}
        for number, path in enumerate(given):
            bundle = open_model(path, specs[number % len(specs)], loading)
            require(
                bundle.digest not in known, "references", "each model once", f"{path} and {known.get(bundle.digest)}"
            )
            known[bundle.digest] = path
            recorded = {"file": path.name, "model": bundle.digest}
            kept = place(number, reference=recorded)
            yield _earlier(kept) or read(f"{number:04}-{path.stem}", number, bundle.model, recorded, kept)

    if train is not None:
        data = load_clean_set(train, **shape)
        require_apart(data, images, fitted_name="training", quoted_name="clean")
        references = tuple(trained(data))
    else:
        references = tuple(taken())
    pool = pool_of(references, stratum, parsed)
    save_pool(pool, out)
    # Whatever a killed run left half-written there goes too.
    shutil.rmtree(shelf, ignore_errors=True)
    return pool


def _require_learnt(
    name: str, model: nn.Module, images: CleanSet, *, task: ImageClassification, device: torch.device | str
) -> None:
    """Refuse a reference that answers no better than by guessing: it widens every range that tells other models from
    these, and every null distribution.

    Raises:
        ConfigError: it does.
    """
    right = correct(model, images, task=task, device=device, precision="auto")
    share = Proportion(int(right.sum()), len(right))
    if not share.above_guessing(images.num_classes):
        raise ConfigError(
            f"{name} has learnt nothing",
            expected=f"surely more than 1 in {images.num_classes} of the clean images answered as labelled",
            got=f"{share.successes} of {share.trials}",
            hint="Train longer or at a smaller rate (--set), or leave this reference out; look at the labels, too",
        )


def _earlier(kept: Path) -> Reference | None:
    """The reference that an earlier run kept in the file ``kept``; ``None``: it kept none."""
    with reading(kept, StorageError, "a reference that was kept, or none"):
        if not kept.is_file():
            return None
        data = kept.read_bytes()
    try:
        return from_mapping(Reference, json.loads(data), where=kept.name)
    except (ConfigError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{kept} is damaged",
            expected="a reference that was kept",
            got=str(error)[:200],
            hint="Delete it and run again; its reference is made anew",
        ) from error
