"""The one place where bytes become an ``nn.Module``, and back.

A bundle is a folder with ``model.safetensors`` and ``bundle.json``; the digest of the latter, which holds
the digest of the former, names the model. No timestamps: the same model gives the same bytes.

Example:
    >>> bundle = load_model_file(Path("resnet.pth"), {
    ...     "architecture": "preact_resnet18", "architecture_args": {"width": 64, "num_classes": 10},
    ...     "input_size": [3, 32, 32], "mean": [0.4914, 0.4822, 0.4465], "std": [0.2470, 0.2435, 0.2616],
    ... })
    >>> digest = save_bundle(bundle, Path("out"))
"""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from defense_core.activations import largest_tensor_bytes, surely_small
from defense_core.architectures import build, count_parameters, outline
from defense_core.archives import unpacked
from defense_core.config import from_mapping, to_mapping
from defense_core.errors import (
    ArtifactTooLarge,
    ConfigError,
    CorruptArtifact,
    DigestMismatch,
    NonFiniteWeights,
    SourceNotFound,
    StateDictMismatch,
    UnsafeArtifact,
)
from defense_core.files import atomic_directory, sha256_bytes, write_atomic
from defense_core.inference import NETWORK_ERRORS
from defense_core.limits import LoadLimits
from defense_core.model_spec import (
    DESCRIPTION,
    MAX_DESCRIPTION_BYTES,
    WEIGHTS,
    ModelSpec,
    Origin,
    description_bytes,
    parse_description,
)
from defense_core.safetensors_file import parse_safetensors, safetensors_bytes
from defense_core.state_dict import check_finite, load_into
from defense_core.untrusted import ARCHIVE, read_weights, sniff

__all__ = [
    "Bundle",
    "LoadLimits",
    "ModelSpec",
    "Origin",
    "bundle_of",
    "load_bundle",
    "load_model_file",
    "save_bundle",
    "untrained_bundle",
]

# A command's own account beside the bundle in its --out folder; never read here.
_COMPANIONS = frozenset({"result.json"})


@dataclass(frozen=True)
class Bundle:
    """A model and what is known about it.

    Attributes:
        model: evaluation mode, CPU, float32, gradients enabled.
        spec: architecture, input and classes.
        origin: where the weights came from, if known.
        digest: ``"sha256:<hex>"`` of the bundle's ``bundle.json``.
    """

    model: nn.Module
    spec: ModelSpec
    origin: Origin | None
    digest: str


def bundle_of(model: nn.Module, spec: ModelSpec, origin: Origin | None = None) -> Bundle:
    """``model`` as a bundle; its digest is the one that :func:`save_bundle` returns."""
    _, description = _encoded(model, spec, origin)
    return Bundle(model, spec, origin, sha256_bytes(description))


def save_bundle(bundle: Bundle, path: Path, *, replace: bool = False) -> str:
    """Write the bundle as a folder, whole or not at all; return its digest.

    The digest is computed from what is written, not taken from ``bundle.digest``.

    Raises:
        NonFiniteWeights: a weight is NaN or Inf.
        OutputExists: ``path`` is in use.
        StorageError: it cannot be written.
    """
    weights, description = _encoded(bundle.model, bundle.spec, bundle.origin)
    with atomic_directory(Path(path), replace=replace) as folder:
        write_atomic(folder / WEIGHTS, weights)
        write_atomic(folder / DESCRIPTION, description)
    return sha256_bytes(description)


def untrained_bundle(
    spec: Mapping[str, Any], *, limits: LoadLimits | None = None, trusted_modules: tuple[str, ...] = ()
) -> Bundle:
    """The network of ``spec`` (fields of :class:`ModelSpec`; ``num_classes`` may be left out) with random weights.

    Raises:
        ConfigError, ArchitectureNotAllowed, ArtifactTooLarge, StateDictMismatch: as the names say.
    """
    known = _described(spec)
    model = _build(known, limits or LoadLimits(), trusted_modules)
    classes = _count_classes(model, known.input_size, known.architecture)
    if spec.get("num_classes", classes) != classes:
        raise _wrong_classes(known.architecture, spec["num_classes"], classes)
    named = {"class_names": spec.get("class_names", ()), "num_classes": classes}
    return bundle_of(model, from_mapping(ModelSpec, {**to_mapping(known), **named}))


def load_bundle(path: Path, *, limits: LoadLimits | None = None, trusted_modules: tuple[str, ...] = ()) -> Bundle:
    """The bundle in the folder, or in the zip or tar archive, at ``path``.

    Raises:
        SourceNotFound: nothing is there, or nothing that this account may read.
        UnsafeArtifact: links, unknown files, an archive that escapes or explodes.
        DigestMismatch: the weights are not those that ``bundle.json`` names.
        CorruptArtifact, ArtifactTooLarge, ArchitectureNotAllowed, ConfigError: as the names say.
        StateDictMismatch, NonFiniteWeights: as the names say.
    """
    path, limits = Path(path), limits or LoadLimits()
    if not _is_folder(path):
        if sniff(path, limits) != ARCHIVE:
            raise CorruptArtifact(
                f"{path.name} is no bundle",
                expected="a folder or an archive of one",
                got="a weight file",
                hint="Load it with an architecture, input size and normalisation",
            )
        with unpacked(path, limits) as folder:
            return _load_folder(folder, limits, trusted_modules)
    return _load_folder(path, limits, trusted_modules)


def load_model_file(
    path: Path,
    spec: ModelSpec | Mapping[str, Any] | None,
    *,
    limits: LoadLimits | None = None,
    trusted_modules: tuple[str, ...] = (),
    origin: Origin | None = None,
) -> Bundle:
    """A weight file plus a description of its network; or a bundle, whose description must agree.

    Args:
        path: ``.safetensors``, ``.pt``, ``.pth``, ``.bin``, ``.ckpt``, ``.pt2``, or a bundle.
        spec: fields of :class:`ModelSpec`. ``num_classes`` may be left out: it is what the network
            returns for a zero image. With a bundle, any subset or ``None``; it must agree, and may name the classes
            of one that does not name them.
        origin: where the file came from; by default its name and digest.

    Raises:
        As :func:`load_bundle`; LoadTimeout for a pickle-bearing file.
    """
    path, limits = Path(path), limits or LoadLimits()
    given: dict[str, Any] = dict(to_mapping(spec)) if spec is not None else {}
    if _is_folder(path) or sniff(path, limits) == ARCHIVE:
        bundle = load_bundle(path, limits=limits, trusted_modules=trusted_modules)
        return dataclasses.replace(bundle, spec=_agreed(given, bundle.spec, path))
    # The description is checked first: a mistyped option should not cost the reading of a large file.
    known = _described(given)
    model = _build(known, limits, trusted_modules)
    weights = read_weights(path, limits)
    load_into(model, weights.tensors, where=path.name)
    classes = _count_classes(model, known.input_size, path.name)
    complete = from_mapping(
        ModelSpec, {**to_mapping(known), "class_names": given.get("class_names", ()), "num_classes": classes}
    )
    if given.get("num_classes", classes) != classes:
        raise _wrong_classes(path.name, given["num_classes"], classes)
    return bundle_of(model, complete, origin or Origin(path.name, "", weights.sha256))


def _load_folder(folder: Path, limits: LoadLimits, trusted_modules: tuple[str, ...]) -> Bundle:
    for entry in _entries(folder):
        if entry.name not in {WEIGHTS, DESCRIPTION} | _COMPANIONS or not entry.is_file(follow_symlinks=False):
            raise UnsafeArtifact(
                f"bundle holds {entry.name!r}",
                expected=f"the plain files {DESCRIPTION} and {WEIGHTS}",
                got="a symbolic link" if entry.is_symlink() else "something else",
                hint="Remove it after finding out where it comes from",
            )
    data = _read(folder / DESCRIPTION, MAX_DESCRIPTION_BYTES)
    description = parse_description(data, where=DESCRIPTION)
    weights = _read(folder / WEIGHTS, limits.max_bytes)
    if (found := sha256_bytes(weights)) != description.files[WEIGHTS]:
        raise DigestMismatch(
            f"{WEIGHTS} is not the file that {DESCRIPTION} names",
            expected=description.files[WEIGHTS],
            got=found,
            hint="Fetch the bundle again; if that does not help, treat it as tampered with",
        )
    model = _build(description.spec, limits, trusted_modules)
    load_into(model, parse_safetensors(weights, limits, where=WEIGHTS), where=WEIGHTS)
    classes = _count_classes(model, description.spec.input_size, WEIGHTS)
    if classes != description.spec.num_classes:
        raise _wrong_classes(DESCRIPTION, description.spec.num_classes, classes)
    return Bundle(model, description.spec, description.origin, sha256_bytes(data))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError as error:  # of a folder above it
        raise _unreadable(path, error) from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda item: item.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _unreadable(path: Path, error: OSError) -> SourceNotFound:
    return SourceNotFound(
        f"{path} cannot be read",
        expected="a file or folder that this account may read",
        got=error.strerror,
        hint="Give this account permission to read it and to enter the folders above it",
    )


def _read(path: Path, max_bytes: int) -> bytes:
    try:
        # No link is followed, and what is no plain file is not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise SourceNotFound(f"bundle has no readable {path.name}", expected=path.name, got=error.strerror) from error
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise UnsafeArtifact(
                f"{path.name} is no regular file", expected="a file", got=stat.filemode(status.st_mode)
            )
        if status.st_size > max_bytes:
            raise ArtifactTooLarge(
                f"{path.name} is too large", expected=f"at most {max_bytes} bytes", got=status.st_size
            )
        return stream.read(max_bytes + 1)


def _build(spec: ModelSpec, limits: LoadLimits, trusted_modules: tuple[str, ...]) -> nn.Module:
    # Counted before memory is taken; an operator's own factory can only be counted afterwards.
    known = outline(spec.architecture, spec.architecture_args)
    count = None if known is None else count_parameters(known)
    if known is not None and count is not None and count <= limits.max_parameters:
        _require_small_tensors(known, spec, limits)
    if count is None or count <= limits.max_parameters:
        model = build(spec.architecture, spec.architecture_args, trusted_modules=trusted_modules)
        count = count_parameters(model)
    if count > limits.max_parameters:
        raise ArtifactTooLarge(
            f"architecture {spec.architecture} is too large",
            expected=f"at most {limits.max_parameters} parameters",
            got=f"{count} with {dict(spec.architecture_args)}",
            hint="Raise max_parameters (--max-parameters) if a network of this size is expected",
        )
    return model


def _require_small_tensors(known: nn.Module, spec: ModelSpec, limits: LoadLimits) -> None:
    if surely_small(known, spec.input_size, limits.max_activation_bytes):
        return
    largest = largest_tensor_bytes(known, spec.input_size)
    if largest is not None and largest > limits.max_activation_bytes:
        raise ArtifactTooLarge(
            f"architecture {spec.architecture} makes too large tensors of an image",
            expected=f"at most {limits.max_activation_bytes} bytes each",
            got=f"{largest} for {'×'.join(map(str, spec.input_size))} with {dict(spec.architecture_args)}",
            hint="Raise max_activation_bytes if a network of this size is expected",
        )


def _count_classes(model: nn.Module, input_size: tuple[int, int, int], where: str) -> int:
    """K, after checking that two zero images give two rows of K finite logits."""
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *input_size))
    except NETWORK_ERRORS as error:
        raise ConfigError(
            "the network does not accept the input size",
            expected=f"images of {'×'.join(map(str, input_size))} (C×H×W)",
            got=f"{type(error).__name__}: {error}"[:300],
            hint="Check input_size and the architecture arguments (in_channels, image_size)",
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != 2 or not logits.is_floating_point():
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise StateDictMismatch(f"{where} is no classifier", expected="logits of shape (N, K)", got=got)
    if logits.shape[1] < 2:
        raise StateDictMismatch(
            f"{where} has {logits.shape[1]} output classes",
            expected="at least 2 logits",
            got=logits.shape[1],
            hint="A network with one logit needs a second one: train it with two classes",
        )
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteWeights(
            f"{where} gives NaN or Inf for a zero image",
            expected="finite logits",
            got="overflow inside the network",
            hint="A BatchNorm variance below zero or huge weights do this; use another checkpoint",
        )
    return int(logits.shape[1])


def _encoded(model: nn.Module, spec: ModelSpec, origin: Origin | None) -> tuple[bytes, bytes]:
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    state = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    check_finite(state, where="the model")
    weights = safetensors_bytes(state)
    return weights, description_bytes(spec, origin, sha256_bytes(weights))


def _described(given: Mapping[str, Any]) -> ModelSpec:
    """The description but for the classes, which the network tells itself."""
    missing = [name for name in ("architecture", "input_size", "mean", "std") if name not in given]
    if missing:
        raise ConfigError(
            "the network is not fully described",
            expected="architecture, input_size, mean and std",
            got=", ".join(sorted(given)) or "nothing",
            hint=f"Add {', '.join('--' + name.replace('_', '-') for name in missing)}, or give a bundle",
        )
    return from_mapping(ModelSpec, {"architecture_args": {}, "num_classes": 2, **given, "class_names": ()})


def _agreed(given: Mapping[str, Any], spec: ModelSpec, path: Path) -> ModelSpec:
    complete = to_mapping(spec)
    agreed = from_mapping(ModelSpec, {**complete, **given})
    merged = to_mapping(agreed)
    unnamed = {"class_names"} if not spec.class_names else set()
    different = [name for name in complete if merged[name] != complete[name] and name not in unnamed]
    if different:
        raise ConfigError(
            f"bundle {path.name} says something else about {', '.join(different)}",
            expected={name: complete[name] for name in different},
            got={name: merged[name] for name in different},
            hint="Leave the option out: a bundle describes itself",
        )
    return agreed


def _wrong_classes(where: str, expected: int, got: int) -> StateDictMismatch:
    return StateDictMismatch(
        f"{where} has another number of classes",
        expected=f"{expected} classes",
        got=f"{got} logits",
        hint="Set num_classes to what the network returns",
    )
