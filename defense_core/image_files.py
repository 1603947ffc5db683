"""Labelled images in files: parquet, image folder, npz. Bounded, never unpickled, whole or refused.

The parsers of pyarrow, numpy and Pillow raise errors of any type for bytes that nobody thought of: each says the same.
"""

from __future__ import annotations

import io
import math
import stat
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
from PIL import Image

from defense_core.class_folders import class_folders, listed
from defense_core.errors import DataError, QuarantineError
from defense_core.files import reading
from defense_core.parquet_rows import image_column, parquet_rows, stated_rows
from defense_core.zip_layout import require_few_entries

# Pillow knows more, some of which start other programs (EPS); a stranger's file must not choose.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "WEBP")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"}
SYSTEM_FILES = frozenset({"thumbs.db", "desktop.ini"})
"""What Windows leaves in folders of images; like hidden files, no one put them there."""

_Read = tuple[numpy.ndarray, numpy.ndarray]
_MAX_NPZ_ARRAYS = 1000


@dataclass(frozen=True)
class DataLimits:
    """What a clean set may cost to read.

    Attributes:
        max_images: largest number of images.
        max_bytes: largest size, bytes: of the files, of what they unpack to, and of the decoded images.
    """

    max_images: int = 200_000
    max_bytes: int = 4 << 30


def read_images(
    path: Path,
    input_size: tuple[int, int, int],
    limits: DataLimits,
    *,
    num_classes: int,
    class_names: Sequence[str] = (),
) -> _Read:
    """Images, uint8 (N, C, H, W), and labels, int64 (N,), of the set at ``path``; the format follows its name.

    Args:
        num_classes, class_names: which class a sub-folder of an image folder holds; other formats state labels.

    Raises:
        DataError: absent, damaged, too large, or an image that cannot be used.
        UnsafeArtifact: an npz file of more than ``_MAX_NPZ_ARRAYS`` entries.
    """
    with reading(path, DataError, "a .parquet or .npz file, or an image folder"):
        is_folder, is_there = path.is_dir(), path.exists()
    if is_folder:
        return _read_folder(path, input_size, limits, num_classes, class_names)
    if not is_there:
        raise DataError(f"clean set {path} is not there", expected="a .parquet or .npz file, or an image folder")
    if path.suffix == ".npz":
        return _read_npz(path, input_size, limits)
    if path.suffix in (".parquet", ".pq"):
        return _read_parquet(path, input_size, limits)
    raise DataError(
        f"clean set {path} has an unknown format",
        expected="a .parquet or .npz file, or an image folder",
        got=path.suffix or "no suffix",
    )


# -- parquet ---------------------------------------------------------------------------


def _read_parquet(path: Path, input_size: tuple[int, int, int], limits: DataLimits) -> _Read:
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            column = image_column(table.schema_arrow, path)
            groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
            count = stated_rows(table, path)
            _check_size(count, sum(group.total_byte_size for group in groups), input_size, limits)
            labels = numpy.zeros(count, dtype=numpy.int64)
            rows = parquet_rows(table, column, labels, path, max_bytes=limits.max_bytes)
            return _decode_all(rows, len(labels), input_size), labels
    except QuarantineError:
        raise
    except Exception as error:
        raise DataError(f"{path} is no readable parquet file", expected="parquet", got=str(error)[:200]) from error


# -- image folder ----------------------------------------------------------------------


def _read_folder(
    path: Path, input_size: tuple[int, int, int], limits: DataLimits, num_classes: int, class_names: Sequence[str]
) -> _Read:
    with reading(path, DataError, "readable image files"):
        files = [
            (file, label)
            for folder, label in class_folders(path, num_classes, class_names)
            for file in sorted(folder.iterdir())
            if not (file.name.startswith(".") or file.name.lower() in SYSTEM_FILES)
        ]
        _check_endings(path, [file for file, _ in files])
        _check_size(len(files), sum(_file_size(file) for file, _ in files), input_size, limits)
        encoded = ((str(file.relative_to(path)), file.read_bytes()) for file, _ in files)
        images = _decode_all(encoded, len(files), input_size)
    return images, numpy.array([label for _, label in files], dtype=numpy.int64)


def _check_endings(path: Path, files: Sequence[Path]) -> None:
    """Refuse a set that would be read without some of its files; hidden ones were left out before."""
    others = [str(file.relative_to(path)) for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        raise DataError(
            f"{path} holds {len(others)} of {len(files)} files that are not read",
            expected="files of " + ", ".join(sorted(IMAGE_SUFFIXES)),
            got=listed(others),
            hint="Convert those that are images, and take the others out of the sub-folders",
        )


def _file_size(file: Path) -> int:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{file} is no file", expected="an image file", got=stat.filemode(status.st_mode))
    return status.st_size


# -- npz -------------------------------------------------------------------------------


def _read_npz(path: Path, input_size: tuple[int, int, int], limits: DataLimits) -> _Read:
    try:
        require_few_entries(path, _MAX_NPZ_ARRAYS)
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if not {"images", "labels"} <= members.keys():
                raise DataError(
                    f"{path} lacks arrays", expected="arrays images and labels", got=", ".join(members)[:200]
                )
            images = _read_npy(archive, members["images"], path, input_size, limits)
            labels = _read_npy(archive, members["labels"], path, input_size, limits)
    except QuarantineError:
        raise
    except Exception as error:
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


def _read_npy(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    path: Path,
    input_size: tuple[int, int, int],
    limits: DataLimits,
) -> numpy.ndarray:
    """One array; numpy allocates what the header promises, so the promise is held against the size first."""
    with archive.open(member) as stream:
        shape, dtype, header_bytes = _npy_header(stream)
    if dtype.hasobject:
        raise ValueError(f"{member.filename} holds pickled objects")
    _check_size(shape[0] if shape else 1, member.file_size, input_size, limits)
    if header_bytes + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{member.filename} promises {shape} of {dtype} in {member.file_size} bytes")
    with archive.open(member) as stream:
        array: numpy.ndarray = numpy.lib.format.read_array(stream, allow_pickle=False)
    return array


def _npy_header(stream: Any) -> tuple[tuple[int, ...], numpy.dtype[Any], int]:
    readers = {
        (1, 0): numpy.lib.format.read_array_header_1_0,
        (2, 0): numpy.lib.format.read_array_header_2_0,
    }
    version = numpy.lib.format.read_magic(stream)
    if version not in readers:
        raise ValueError(f"numpy format version {version}")
    shape, _, dtype = readers[version](stream)
    return tuple(shape), dtype, int(stream.tell())


def _pixels(images: numpy.ndarray, path: Path) -> numpy.ndarray:
    if images.dtype == numpy.uint8:
        return images
    if numpy.issubdtype(images.dtype, numpy.floating):
        low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
        if numpy.isfinite([low, high]).all() and low >= 0 and high <= 1:
            rounded: numpy.ndarray = numpy.rint(images * 255).astype(numpy.uint8)
            return rounded
        raise DataError(
            f"{path} has pixels out of range", expected="floats in [0, 1], or uint8", got=f"{low:g}..{high:g}"
        )
    raise DataError(f"{path} has malformed images", expected="uint8, or floats in [0, 1]", got=images.dtype)


# -- images ----------------------------------------------------------------------------


def _decode_all(encoded: Iterable[tuple[str, object]], count: int, input_size: tuple[int, int, int]) -> numpy.ndarray:
    images = numpy.zeros((count, *input_size), dtype=numpy.uint8)
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


def _decode(data: object, input_size: tuple[int, int, int]) -> numpy.ndarray:
    channels, height, width = input_size
    if not isinstance(data, bytes):
        raise DataError("not image bytes", got=type(data).__name__)
    try:
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            if image.size != (width, height):
                raise DataError(
                    "wrong image size", expected=f"{width}x{height}", got=f"{image.size[0]}x{image.size[1]}"
                )
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                # Pillow would clip these to 0..255: nearly every pixel black or white.
                raise DataError("more than 8 bits a channel", expected="8 bits a channel", got=f"mode {image.mode}")
            found = 1 if image.mode in ("L", "1") else 3
            if found != channels:
                raise DataError("wrong number of channels", expected=channels, got=f"{found} (mode {image.mode})")
            array = numpy.asarray(image.convert("L" if channels == 1 else "RGB"))
    except DataError:
        raise
    except Exception as error:
        raise DataError("not an image", got=str(error)[:100]) from error
    return array.reshape(height, width, channels).transpose(2, 0, 1)


def _check_size(count: int, stored_bytes: int, input_size: tuple[int, int, int], limits: DataLimits) -> None:
    decoded_bytes = count * math.prod(input_size)
    if count > limits.max_images or max(stored_bytes, decoded_bytes) > limits.max_bytes:
        raise DataError(
            "clean set is too large",
            expected=f"at most {limits.max_images} images and {limits.max_bytes} bytes",
            got=f"{count} images, {max(stored_bytes, decoded_bytes)} bytes",
        )
