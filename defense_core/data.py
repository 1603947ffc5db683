"""The clean set: loading, validation, and disjoint, seeded fit / select / report splits."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from defense_core.config import require
from defense_core.errors import DataError

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"}


@dataclass(frozen=True)
class DataLimits:
    """What a clean set may cost to read.

    Attributes:
        max_images: largest number of images.
        max_bytes: largest decoded size in memory, bytes.
    """

    max_images: int = 200_000
    max_bytes: int = 4 << 30


@dataclass(frozen=True, eq=False)
class CleanSet:
    """Labelled images in memory.

    Attributes:
        images: uint8, (N, C, H, W).
        labels: int64, (N,), in 0..num_classes-1.
        num_classes: number of classes K of the model, not of the labels seen.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise DataError(
                "images are malformed",
                expected="uint8 (N, C, H, W)",
                got=f"{self.images.dtype} {tuple(self.images.shape)}",
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != (len(self.images),):
            raise DataError(
                "labels are malformed",
                expected=f"int64 ({len(self.images)},)",
                got=f"{self.labels.dtype} {tuple(self.labels.shape)}",
            )

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over shape, pixels and labels, in order."""
        state = hashlib.sha256(repr((tuple(self.images.shape), self.num_classes)).encode())
        state.update(self.images.cpu().contiguous().numpy().tobytes())
        state.update(self.labels.cpu().contiguous().numpy().astype("<i8").tobytes())
        return "sha256:" + state.hexdigest()

    @cached_property
    def class_counts(self) -> tuple[int, ...]:
        """Images per class, K numbers."""
        return tuple(torch.bincount(self.labels.cpu(), minlength=self.num_classes).tolist())

    def subset(self, index: Tensor) -> CleanSet:
        """The samples at ``index`` (int64), in that order."""
        index = index.to(self.labels.device)
        return CleanSet(self.images[index], self.labels[index], self.num_classes)

    def to(self, device: torch.device | str) -> CleanSet:
        """The same samples on ``device``."""
        return CleanSet(self.images.to(device), self.labels.to(device), self.num_classes)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Consecutive (images, labels) of at most ``size`` samples, in order."""
        for start in range(0, len(self), size):
            yield self.images[start : start + size], self.labels[start : start + size]


@dataclass(frozen=True)
class Splits:
    """Disjoint parts of one clean set.

    Attributes:
        fit: what a method trains on.
        select: what chooses hyper-parameters and candidates; may be empty where every
            class has one image only.
        report: what figures are quoted on; never given to a method's training or choice.
    """

    fit: CleanSet
    select: CleanSet
    report: CleanSet

    @property
    def digest(self) -> str:
        """One digest over the three parts."""
        joined = "\n".join((self.fit.digest, self.select.digest, self.report.digest))
        return "sha256:" + hashlib.sha256(joined.encode()).hexdigest()


def split_clean_set(clean: CleanSet, *, seed: int, select: float = 0.2, report: float = 0.2) -> Splits:
    """Cut ``clean`` into stratified, disjoint parts.

    Per class of ``n`` images, ``floor(n*select)`` go to *select* and ``floor(n*report)`` to
    *report*, at least one to each as long as one is left for *fit*. A class with a single
    image gives it to *fit*.

    Args:
        seed: order of the draw; the same seed and set give the same parts.
        select: fraction for choosing, in [0, 1).
        report: fraction for quoting, in [0, 1); 0 where a separate test set exists.
    """
    require(
        0 <= select < 1 and 0 <= report < 1 and select + report < 1,
        "select + report",
        "fractions below 1",
        (select, report),
    )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(clean), generator=generator)
    labels = clean.labels.cpu()[order]
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for label in range(clean.num_classes):
        members = order[labels == label]
        count = len(members)
        for_select = _share(count, select, reserved=1)
        for_report = _share(count, report, reserved=1 + for_select)
        parts[1].append(members[:for_select])
        parts[2].append(members[for_select : for_select + for_report])
        parts[0].append(members[for_select + for_report :])
    fit, chosen, reported = (clean.subset(torch.cat(part).sort().values) for part in parts)
    return Splits(fit, chosen, reported)


def _share(count: int, fraction: float, *, reserved: int) -> int:
    if fraction == 0 or count <= reserved:
        return 0
    return min(max(1, int(count * fraction)), count - reserved)


def load_clean_set(
    path: Path | str,
    *,
    input_size: tuple[int, int, int],
    num_classes: int,
    limits: DataLimits = DataLimits(),
    require_all_classes: bool = True,
) -> CleanSet:
    """Read a clean set and validate it.

    Formats: a parquet file (columns ``image``: encoded bytes or the ``{bytes, path}`` struct
    of the datasets library, and ``label``: integers); a folder with one sub-folder per class,
    sorted by name; an ``.npz`` with ``images`` (N, H, W, C) or (N, C, H, W), uint8, or
    floating point in [0, 1], and ``labels``.

    Args:
        input_size: (C, H, W) that the model wants; images of another size are refused.
        num_classes: K of the model.
        limits: size limits, checked while reading.
        require_all_classes: refuse a set in which a class has no image.

    Raises:
        DataError: with everything that is wrong, not only the first problem.
    """
    path = Path(path)
    if path.is_dir():
        images, labels = _read_folder(path, input_size, limits)
    elif not path.exists():
        raise DataError(f"clean set {path} is not there", expected="a .parquet or .npz file, or an image folder")
    elif path.suffix == ".npz":
        images, labels = _read_npz(path, input_size, limits)
    elif path.suffix in (".parquet", ".pq"):
        images, labels = _read_parquet(path, input_size, limits)
    else:
        raise DataError(
            f"clean set {path} has an unknown format",
            expected="a .parquet or .npz file, or an image folder",
            got=path.suffix or "no suffix",
        )
    problems = list(
        problems_of(
            images, labels, input_size=input_size, num_classes=num_classes, require_all_classes=require_all_classes
        )
    )
    if problems:
        raise DataError(
            f"clean set {path} is unusable",
            expected=f"uint8 images {input_size} and labels 0..{num_classes - 1}, every class present",
            got="; ".join(problems),
            hint="Correct the set; nothing was done with it",
        )
    return CleanSet(torch.from_numpy(images), torch.from_numpy(labels), num_classes)


def problems_of(
    images: numpy.ndarray,
    labels: numpy.ndarray,
    *,
    input_size: tuple[int, int, int],
    num_classes: int,
    require_all_classes: bool = True,
) -> Iterator[str]:
    """Everything that is wrong with a set, one sentence each (empty: usable)."""
    if len(images) == 0:
        yield "there are no images"
        return
    if images.shape[1:] != tuple(input_size):
        yield f"images are {images.shape[1:]}, the model wants {tuple(input_size)}"
    if len(images) != len(labels):
        yield f"{len(images)} images but {len(labels)} labels"
        return
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside):
        yield f"{len(outside)} labels are outside 0..{num_classes - 1} (first: {int(outside[0])})"
    elif require_all_classes:
        absent = sorted(set(range(num_classes)) - set(labels.tolist()))
        if absent:
            yield f"{len(absent)} classes have no image: {absent[:10]}"
    flat = images.reshape(len(images), -1)
    if len(flat) > 1 and (flat == flat[:, :1]).all():
        yield "every image is one flat colour"
    seen: dict[bytes, int] = {}
    contradictions = 0
    copies = 0
    for row, label in zip(flat, labels.tolist(), strict=True):
        key = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        if key in seen:
            copies += 1
            contradictions += seen[key] != label
        else:
            seen[key] = label
    if contradictions:
        yield f"{contradictions} images appear again under another label"
    if copies > len(images) // 2:
        yield f"{copies} of {len(images)} images are exact copies of others"


# -- readers ---------------------------------------------------------------------------


def _read_parquet(
    path: Path, input_size: tuple[int, int, int], limits: DataLimits
) -> tuple[numpy.ndarray, numpy.ndarray]:
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = set(table.schema_arrow.names)
        if not {"image", "label"} <= names:
            raise DataError(f"{path} lacks columns", expected="columns image and label", got=", ".join(sorted(names)))
        _check_count(table.metadata.num_rows, input_size, limits)
        content = table.read(columns=["image", "label"])
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is no readable parquet file", expected="parquet", got=str(error)[:200]) from error
    if not pyarrow.types.is_integer(content.schema.field("label").type):
        raise DataError(f"{path} has malformed labels", expected="integers", got=content.schema.field("label").type)
    column = content.column("image")
    if pyarrow.types.is_struct(column.type):
        column = column.combine_chunks().field("bytes")
    labels = content.column("label").to_numpy()
    encoded = ((f"row {row}", item.as_py()) for row, item in enumerate(column))
    return _decode_all(encoded, len(labels), input_size), labels.astype(numpy.int64)


def _read_folder(
    path: Path, input_size: tuple[int, int, int], limits: DataLimits
) -> tuple[numpy.ndarray, numpy.ndarray]:
    folders = sorted(member for member in path.iterdir() if member.is_dir() and not member.name.startswith("."))
    files = [
        (file, label)
        for label, folder in enumerate(folders)
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    _check_count(len(files), input_size, limits)
    encoded = ((str(file.relative_to(path)), file.read_bytes()) for file, _ in files)
    return _decode_all(encoded, len(files), input_size), numpy.array([label for _, label in files], dtype=numpy.int64)


def _read_npz(path: Path, input_size: tuple[int, int, int], limits: DataLimits) -> tuple[numpy.ndarray, numpy.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
        if declared > limits.max_bytes:
            raise DataError(f"{path} is too large", expected=f"at most {limits.max_bytes} bytes unpacked", got=declared)
        with numpy.load(path, allow_pickle=False) as content:
            if not {"images", "labels"} <= set(content.files):
                raise DataError(
                    f"{path} lacks arrays", expected="arrays images and labels", got=", ".join(content.files)
                )
            images, labels = content["images"], content["labels"]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is no readable npz file", expected="numpy arrays without pickles", got=str(error)[:200]
        ) from error
    if images.ndim != 4:
        raise DataError(f"{path} has malformed images", expected="4 dimensions", got=images.shape)
    if images.shape[1:] != tuple(input_size) and images.shape[1:] == (*input_size[1:], input_size[0]):
        images = images.transpose(0, 3, 1, 2)
    if not numpy.issubdtype(labels.dtype, numpy.integer) or labels.ndim != 1:
        raise DataError(
            f"{path} has malformed labels", expected="one integer an image", got=f"{labels.dtype} {labels.shape}"
        )
    return numpy.ascontiguousarray(_pixels(images, path)), labels.astype(numpy.int64)


def _pixels(images: Any, path: Path) -> numpy.ndarray:
    if images.dtype == numpy.uint8:
        return numpy.asarray(images)
    if numpy.issubdtype(images.dtype, numpy.floating):
        low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
        if numpy.isfinite([low, high]).all() and low >= 0 and high <= 1:
            return numpy.asarray(numpy.rint(images * 255), dtype=numpy.uint8)
        raise DataError(
            f"{path} has pixels out of range", expected="floats in [0, 1], or uint8", got=f"{low:g}..{high:g}"
        )
    raise DataError(f"{path} has malformed images", expected="uint8, or floats in [0, 1]", got=images.dtype)


def _decode_all(
    encoded: Iterable[tuple[str, bytes | None]], count: int, input_size: tuple[int, int, int]
) -> numpy.ndarray:
    images = numpy.empty((count, *input_size), dtype=numpy.uint8)
    problems: Counter[str] = Counter()
    first = ""
    for row, (name, data) in enumerate(encoded):
        try:
            images[row] = _decode(data, input_size)
        except DataError as error:
            problems[error.what] += 1
            first = first or f"{name}: {error}"
    if problems:
        raise DataError(
            f"{sum(problems.values())} of {count} images cannot be used",
            expected=f"images of {input_size[2]}x{input_size[1]} pixels and {input_size[0]} channels",
            got=f"{first}",
        )
    return images


def _decode(data: bytes | None, input_size: tuple[int, int, int]) -> numpy.ndarray:
    channels, height, width = input_size
    if not isinstance(data, bytes):
        raise DataError("not image bytes", got=type(data).__name__)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.size != (width, height):
                raise DataError(
                    "wrong image size", expected=f"{width}x{height}", got=f"{image.size[0]}x{image.size[1]}"
                )
            found = 1 if image.mode in ("L", "1", "I;16", "I", "F") else 3
            if found != channels:
                raise DataError("wrong number of channels", expected=channels, got=f"{found} (mode {image.mode})")
            array = numpy.asarray(image.convert("L" if channels == 1 else "RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise DataError("not an image", got=str(error)[:100]) from error
    return array.reshape(height, width, channels).transpose(2, 0, 1)


def _check_count(count: int, input_size: tuple[int, int, int], limits: DataLimits) -> None:
    size = count * input_size[0] * input_size[1] * input_size[2]
    if count > limits.max_images or size > limits.max_bytes:
        raise DataError(
            "clean set is too large",
            expected=f"at most {limits.max_images} images and {limits.max_bytes} bytes",
            got=f"{count} images, {size} bytes",
        )
