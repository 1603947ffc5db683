"""What a model is, apart from its weights; the content of ``bundle.json``."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from defense_core.config import canonical_json, from_mapping, require
from defense_core.errors import CorruptArtifact, QuarantineError
from defense_core.task import Augment, ImageClassification

FORMAT = 1
WEIGHTS = "model.safetensors"
DESCRIPTION = "bundle.json"
MAX_DESCRIPTION_BYTES = 1 << 20
MAX_INPUT_VALUES = 1 << 22
"""Values of one input image, 16 MiB as float32; layers hold many times that."""
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_KEYS = frozenset({
    "format", "architecture", "input_size", "mean", "std", "num_classes", "class_names", "augment", "task", "origin",
    "files",
})  # fmt: skip


@dataclass(frozen=True)
class ModelSpec:
    """Architecture and interface of an image classifier.

    Attributes:
        architecture: a name that :func:`defense_core.architectures.build` knows.
        architecture_args: its keyword arguments, JSON types.
        input_size: (C, H, W); at most ``MAX_INPUT_VALUES`` values in all, as of 3×1024×1024.
        mean, std: per-channel normalisation, in units of [0, 1] pixels.
        num_classes: number of logits K, at least 2.
        class_names: K names, or empty.
        augment: label-preserving transform for tuning; see :class:`defense_core.task.ImageClassification`.
        task: the only task so far.
    """

    architecture: str
    architecture_args: Mapping[str, Any]
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    class_names: tuple[str, ...] = ()
    augment: Augment = "crop"
    task: Literal["image_classification"] = "image_classification"

    def __post_init__(self) -> None:
        require(len(self.input_size) == 3, "input_size", "three numbers C,H,W", self.input_size)
        require(all(1 <= side <= 8192 for side in self.input_size), "input_size", "1 to 8192 each", self.input_size)
        # A file of a few kilobytes may name it, and the network is run on two such images when it is loaded.
        require(
            math.prod(self.input_size) <= MAX_INPUT_VALUES,
            "input_size",
            f"at most {MAX_INPUT_VALUES} values C×H×W in all",
            self.input_size,
        )
        self.task_object()

    def task_object(self) -> ImageClassification:
        """The task that methods and evaluations use."""
        return ImageClassification(
            input_size=self.input_size,
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
            class_names=self.class_names,
            augment=self.augment,
        )


@dataclass(frozen=True)
class Origin:
    """Where the weights came from.

    Attributes:
        uri: source address without credentials, or the file's name.
        version_id: version of the object at that address, or empty.
        sha256: ``"sha256:<hex>"`` of the bytes that were fetched.
    """

    uri: str
    version_id: str
    sha256: str

    def __post_init__(self) -> None:
        require(_DIGEST.fullmatch(self.sha256) is not None, "origin.sha256", "sha256:<64 hex digits>", self.sha256)


@dataclass(frozen=True)
class Description:
    """``bundle.json``, parsed."""

    spec: ModelSpec
    origin: Origin | None
    files: Mapping[str, str] = field(default_factory=dict)


def description_bytes(spec: ModelSpec, origin: Origin | None, weights_digest: str) -> bytes:
    """Canonical ``bundle.json``: the same model gives the same bytes."""
    return canonical_json(
        {
            "format": FORMAT,
            "architecture": {"name": spec.architecture, "args": spec.architecture_args},
            "input_size": spec.input_size,
            "mean": spec.mean,
            "std": spec.std,
            "num_classes": spec.num_classes,
            "class_names": spec.class_names,
            "augment": spec.augment,
            "task": spec.task,
            "origin": origin,
            "files": {WEIGHTS: weights_digest},
        }
    )


def parse_description(data: bytes, *, where: str) -> Description:
    """``bundle.json`` from a stranger, strictly.

    Raises:
        CorruptArtifact: no JSON, a repeated, missing or unknown key, or a value of the wrong type.
    """
    if len(data) > MAX_DESCRIPTION_BYTES:
        raise _malformed(where, f"at most {MAX_DESCRIPTION_BYTES} bytes", len(data))
    try:
        content = json.loads(data, object_pairs_hook=_distinct, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _malformed(where, "JSON without repeated keys", str(error)[:200]) from error
    if not isinstance(content, dict):
        raise _malformed(where, "a mapping", type(content).__name__)
    if content.get("format") != FORMAT or isinstance(content.get("format"), bool):
        raise _malformed(
            where, f"format {FORMAT}", repr(content.get("format"))[:50], "Use a release that reads this format"
        )
    if set(content) != _KEYS:
        odd = sorted(set(content) ^ _KEYS)
        raise _malformed(
            where, "exactly the keys " + ", ".join(sorted(_KEYS)), "missing or unknown " + ", ".join(odd)[:200]
        )
    architecture, files = content.pop("architecture"), content.pop("files")
    if not isinstance(architecture, dict) or set(architecture) != {"name", "args"}:
        raise _malformed(where, "architecture with name and args", repr(architecture)[:100])
    digests = isinstance(files, dict) and all(isinstance(v, str) and _DIGEST.fullmatch(v) for v in files.values())
    if not digests or set(files) != {WEIGHTS}:
        raise _malformed(where, f"files with the digest of {WEIGHTS} and nothing else", repr(files)[:100])
    content.pop("format")
    origin = content.pop("origin")
    values = {**content, "architecture": architecture["name"], "architecture_args": architecture["args"]}
    try:
        spec = from_mapping(ModelSpec, values, where="bundle")
        source = None if origin is None else from_mapping(Origin, origin, where="bundle.origin")
    except QuarantineError as error:
        raise _malformed(where, error.expected, error.got, error.what) from error
    return Description(spec, source, files)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a key occurs twice")
    return mapping


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _malformed(where: str, expected: object, got: object, hint: str | None = None) -> CorruptArtifact:
    return CorruptArtifact(
        f"{where} is malformed", expected=expected, got=got, hint=hint or "Write bundles with save_bundle"
    )
