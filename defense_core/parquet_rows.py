"""Encoded images in a parquet file, one row at a time, whatever its footer says of their size.

A parquet file of a megabyte may hold one value of a megabyte that stands in every row: a batch of rows has it once a
row. Reading it as a dictionary has it once, and takes three times the memory for images that differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from defense_core.errors import DataError

_BATCH_ROWS = 1  # 0.05 ms a row, where decoding takes as long
_BYTES_OR_TEXT = (
    pyarrow.types.is_binary,
    pyarrow.types.is_large_binary,
    pyarrow.types.is_string,
    pyarrow.types.is_large_string,
)


def image_column(schema: pyarrow.Schema, path: Path) -> str:
    """The column that holds the encoded images: ``image``, or the part ``bytes`` of it.

    Raises:
        DataError: there are no such columns.
    """
    if not {"image", "label"} <= set(schema.names):
        raise DataError(f"{path} lacks columns", expected="columns image and label", got=", ".join(schema.names)[:200])
    kind = schema.field("label").type
    if not pyarrow.types.is_integer(kind):
        raise DataError(f"{path} has malformed labels", expected="integers", got=kind)
    kind, name = schema.field("image").type, "image"
    # The datasets library stores {"bytes": …, "path": …}.
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind, name = kind.field("bytes").type, "image.bytes"
    if not any(is_kind(kind) for is_kind in _BYTES_OR_TEXT):
        raise DataError(
            f"{path} has malformed images", expected="a column image of bytes, or of structs with bytes", got=kind
        )
    return name


def stated_rows(table: pyarrow.parquet.ParquetFile, path: Path) -> int:
    """How many rows the footer says there are.

    Raises:
        DataError: it contradicts itself.
    """
    groups = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    count = int(table.metadata.num_rows)
    if count < 0 or min(groups, default=0) < 0 or count != sum(groups):
        raise _other_rows(path, sum(groups), count)
    return count


def parquet_rows(
    table: pyarrow.parquet.ParquetFile, column: str, labels: numpy.ndarray, path: Path, *, max_bytes: int
) -> Iterator[tuple[str, bytes | None]]:
    """Encoded images row by row; ``labels`` is filled on the way.

    Args:
        column: from :func:`image_column`.
        labels: one place for each of the :func:`stated_rows`.
        max_bytes: largest size of the encoded images together.

    Raises:
        DataError: more than ``max_bytes``, a row without label, or other rows than there are places.
    """
    row = seen_bytes = 0
    for batch in table.iter_batches(_BATCH_ROWS, columns=[column, "label"]):
        stated = batch.column("label")
        if stated.null_count:
            raise DataError(f"{path} has malformed labels", expected="a label a row", got=f"{stated.null_count} nulls")
        if row + len(stated) > len(labels):
            raise _other_rows(path, len(labels), row + len(stated))
        labels[row : row + len(stated)] = stated.to_numpy(zero_copy_only=False).astype(numpy.int64)
        # What the footer says of sizes is the file's own claim.
        seen_bytes += _encoded_bytes(batch.column("image"))
        if seen_bytes > max_bytes:
            raise DataError(
                f"{path} is too large",
                expected=f"at most {max_bytes} bytes of encoded images",
                got=f"{seen_bytes} up to row {row + len(stated)}",
            )
        for image in batch.column("image"):
            yield f"row {row}", _bytes_of(image)
            row += 1
    if row != len(labels):
        raise _other_rows(path, len(labels), row)


def _other_rows(path: Path, expected: int, got: int) -> DataError:
    return DataError(f"{path} does not hold the rows that its footer states", expected=f"{expected} rows", got=got)


def _bytes_of(image: pyarrow.Scalar) -> bytes | None:
    """The bytes of a value; ``None`` where there are none. Of a text too: an image need not be UTF-8."""
    if isinstance(image, pyarrow.StructScalar):
        image = image["bytes"] if image.is_valid else None
    buffer = image.as_buffer() if image is not None else None
    return None if buffer is None else buffer.to_pybytes()


def _encoded_bytes(images: pyarrow.Array) -> int:
    """The lengths of all values together; nothing is decoded or copied."""
    if pyarrow.types.is_struct(images.type):
        images = images.field("bytes")
    return int(pyarrow.compute.sum(pyarrow.compute.binary_length(images)).as_py() or 0)
