"""The clean set: three formats, everything that can be wrong with them, and the splits."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from defense_core.data import CleanSet, DataLimits, load_clean_set, problems_of, require_apart, split_clean_set
from defense_core.errors import EXIT_USAGE, ConfigError, DataError
from defense_core.parquet_rows import image_column, parquet_rows

SIZE = (3, 8, 8)
CLASSES = 3


def pixels(count: int = 12, channels: int = 3, side: int = 8, *, seed: int = 0) -> numpy.ndarray:
    """Random images, (N, H, W, C) uint8."""
    return numpy.random.default_rng(seed).integers(0, 256, (count, side, side, channels)).astype(numpy.uint8)


def encoded(image: numpy.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image.squeeze()).save(stream, kind)
    return stream.getvalue()


def some_labels(count: int = 12) -> numpy.ndarray:
    return numpy.arange(count) % CLASSES


def write_parquet(path: Path, images: list[Any], labels: Any, *, struct: bool = False) -> Path:
    column = [{"bytes": image, "path": None} for image in images] if struct else images
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]) if struct else pyarrow.binary()
    table = pyarrow.table({"image": pyarrow.array(column, type=kind), "label": pyarrow.array(labels)})
    pyarrow.parquet.write_table(table, path)
    return path


def write_folder(path: Path, images: list[bytes], labels: list[int], suffix: str = ".png") -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (path / f"class{label}").mkdir(parents=True, exist_ok=True)
        (path / f"class{label}" / f"{number:03d}{suffix}").write_bytes(image)
    return path


def write_npz(path: Path, images: Any, labels: Any, **options: Any) -> Path:
    numpy.savez(path, images=images, labels=labels, **options)
    return path


def load(path: Path, **options: Any) -> CleanSet:
    return load_clean_set(path, **{"input_size": SIZE, "num_classes": CLASSES, **options})


def refused(path: Path, words: str, **options: Any) -> str:
    """The sentence with which ``path`` is refused."""
    with pytest.raises(DataError) as caught:
        load(path, **options)
    assert caught.value.exit_code == EXIT_USAGE
    assert caught.value.expected
    assert words in str(caught.value), str(caught.value)
    return str(caught.value)


# -- formats -----------------------------------------------------------------------------


def test_three_formats_give_the_same_set(tmp_path: Path) -> None:
    images, labels = pixels(), numpy.sort(some_labels())
    files = [encoded(image) for image in images]
    loaded = [
        load(write_parquet(tmp_path / "a.parquet", files, labels)),
        load(write_parquet(tmp_path / "b.pq", files, labels, struct=True)),
        load(write_folder(tmp_path / "folder", files, labels.tolist())),
        load(write_npz(tmp_path / "hwc.npz", images, labels)),
        load(write_npz(tmp_path / "chw.npz", images.transpose(0, 3, 1, 2), labels.astype(numpy.int32))),
        load(write_npz(tmp_path / "float.npz", images.astype(numpy.float32) / 255, labels)),
    ]
    assert {each.digest for each in loaded} == {loaded[0].digest}
    assert torch.equal(loaded[0].images, torch.from_numpy(images).permute(0, 3, 1, 2))
    assert loaded[0].labels.tolist() == labels.tolist()
    assert loaded[0].class_counts == (4, 4, 4)


def test_one_channel_images(tmp_path: Path) -> None:
    images = pixels(channels=1)
    loaded = load(
        write_parquet(tmp_path / "a.parquet", [encoded(image) for image in images], some_labels()),
        input_size=(1, 8, 8),
    )
    assert torch.equal(loaded.images, torch.from_numpy(images).permute(0, 3, 1, 2))


def test_parquet_in_several_row_groups_keeps_its_order(tmp_path: Path) -> None:
    images, labels = pixels(), some_labels()
    column = [{"bytes": encoded(image), "path": "x.png"} for image in images]
    table = pyarrow.table({"label": labels, "image": column, "other": ["text"] * len(labels)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    loaded = load(tmp_path / "a.parquet")
    assert torch.equal(loaded.images, torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.mark.parametrize("places", [[0], [-1], [0, -1]], ids=["file", "row group", "both"])
@pytest.mark.parametrize("stated", [126, 1], ids=["63 rows", "-1 rows"])
def test_parquet_that_states_other_rows_than_it_holds(places: list[int], stated: int, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [encoded(image) for image in pixels()], some_labels())
    data = bytearray(path.read_bytes())
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    # 12 rows, as the footer writes a 64-bit number: of the file first, of its one row group last.
    found = [at + 1 for at in range(footer, len(data) - 8) if data[at : at + 2] == b"\x16\x18"]
    for place in places:
        data[found[place]] = stated
    path.write_bytes(data)
    refused(path, "the rows that its footer states")


def test_parquet_of_two_columns_of_one_name(tmp_path: Path) -> None:
    columns = [pyarrow.array([encoded(image) for image in pixels()]), pyarrow.array(some_labels())]
    table = pyarrow.table([*columns, columns[1]], names=["image", "label", "label"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "no readable parquet file")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': (), 'fortran_order': False, 'shape': (12,)}",
        "{1: 0, 'a': 0}",
        "{'descr': '|u1', 'shape': (12,",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (" + "1," * 5000 + ")}",
    ],
    ids=["no type", "keys", "unbalanced", "dimensions"],
)
def test_npz_headers_that_numpy_trips_over(header: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", pixels(), some_labels())
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("images", "labels"):
            array = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
            archive.writestr(f"{name}.npy", array)
    refused(path, "no readable npz file")


def test_a_png_that_pillow_trips_over(tmp_path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">2I5B", 8, 8, 8, 3, 0, 0, 0)) + chunk(b"tRNS", b"\x00")
    png = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(72))) + chunk(b"IEND", b"")
    refused(write_parquet(tmp_path / "a.parquet", [png] * 12, some_labels()), "not an image")


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_colour_modes_are_converted(mode: str, tmp_path: Path) -> None:
    files = []
    for image in pixels():
        stream = io.BytesIO()
        Image.fromarray(image).convert(mode).save(stream, "JPEG" if mode == "CMYK" else "PNG")
        files.append(stream.getvalue())
    assert load(write_parquet(tmp_path / "a.parquet", files, some_labels())).images.shape == (12, *SIZE)


def test_jpegs_in_a_folder(tmp_path: Path) -> None:
    files = [encoded(image, "JPEG") for image in pixels()]
    loaded = load(write_folder(tmp_path / "folder", files, some_labels().tolist(), ".JPG"))
    assert len(loaded) == 12


# -- what is refused ---------------------------------------------------------------------


def test_empty_sets(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no images")
    refused(write_npz(tmp_path / "a.npz", pixels(0), some_labels(0)), "no images")
    refused(write_parquet(tmp_path / "a.parquet", [], pyarrow.array([], pyarrow.int64())), "no images")


def test_sets_that_are_not_there_or_of_another_format(tmp_path: Path) -> None:
    refused(tmp_path / "absent.npz", "is not there")
    (tmp_path / "set.csv").write_text("image,label\n")
    refused(tmp_path / "set.csv", "unknown format")


def test_a_class_without_an_image(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", pixels(), some_labels() % 2)
    refused(path, "1 classes have no image: [2]")
    assert len(load(path, require_all_classes=False)) == 12


@pytest.mark.parametrize("wrong", [-1, 3, 2**40])
def test_labels_out_of_range(wrong: int, tmp_path: Path) -> None:
    labels = some_labels().astype(numpy.int64)
    labels[5] = wrong
    refused(write_npz(tmp_path / "a.npz", pixels(), labels), f"1 labels are outside 0..2 (first: {wrong})")
    files = [encoded(image) for image in pixels()]
    refused(write_parquet(tmp_path / "a.parquet", files, labels), "outside 0..2")


@pytest.mark.parametrize("labels", [some_labels() / 2, some_labels().astype(str), some_labels().reshape(6, 2)])
def test_labels_that_are_no_integers(labels: numpy.ndarray, tmp_path: Path) -> None:
    refused(write_npz(tmp_path / "a.npz", pixels(), labels), "malformed labels")


@pytest.mark.parametrize("labels", [[0.0] * 12, ["cat"] * 12, [True] * 12])
def test_parquet_labels_that_are_no_integers(labels: list[Any], tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    refused(write_parquet(tmp_path / "a.parquet", files, labels), "malformed labels")


def test_a_missing_parquet_label(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    refused(write_parquet(tmp_path / "a.parquet", files, [None, *some_labels(11).tolist()]), "label")


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    refused(write_npz(tmp_path / "a.npz", pixels(), some_labels(11)), "12 images but 11 labels")


def test_one_channel_for_a_model_of_three(tmp_path: Path) -> None:
    grey = [encoded(image) for image in pixels(channels=1)]
    refused(write_parquet(tmp_path / "a.parquet", grey, some_labels()), "wrong number of channels")
    refused(write_folder(tmp_path / "folder", grey, some_labels().tolist()), "wrong number of channels")
    refused(write_npz(tmp_path / "a.npz", pixels(channels=1), some_labels()), "(8, 8, 1), the model wants (3, 8, 8)")


def test_three_channels_for_a_model_of_one(tmp_path: Path) -> None:
    colour = [encoded(image) for image in pixels()]
    refused(
        write_parquet(tmp_path / "a.parquet", colour, some_labels()), "wrong number of channels", input_size=(1, 8, 8)
    )


def test_another_image_size(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels(side=9)]
    words = refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "wrong image size")
    assert "8x8" in words
    assert "9x9" in words
    assert "12 of 12" in words
    refused(write_npz(tmp_path / "a.npz", pixels(side=9), some_labels()), "the model wants (3, 8, 8)")


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"BM" + bytes(60)])
def test_bytes_that_are_no_image(data: bytes, tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    files[3] = data
    assert "1 of 12" in refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "row 3")
    refused(write_folder(tmp_path / "folder", files, some_labels().tolist()), "class0/003.png: not an image")


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TIFF", "PCX"])
def test_formats_off_the_list_are_not_opened(kind: str, tmp_path: Path) -> None:
    files = [encoded(image, kind) for image in pixels()]
    refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "not an image")


@pytest.mark.parametrize("value", [None, "text"])
def test_parquet_images_that_are_no_bytes(value: Any, tmp_path: Path) -> None:
    kind = pyarrow.string() if value else pyarrow.binary()
    table = pyarrow.table({"image": pyarrow.array([value] * 12, kind), "label": some_labels()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "not an image" if value else "not image bytes")


@pytest.mark.parametrize("struct", [False, True])
@pytest.mark.parametrize("text", [pyarrow.string(), pyarrow.large_string()])
def test_a_parquet_column_that_is_called_text_may_hold_images(
    text: pyarrow.DataType, struct: bool, tmp_path: Path
) -> None:
    images = pixels()
    stored = pyarrow.array([encoded(image) for image in images], pyarrow.binary())
    # Neither the type nor the file is checked to be UTF-8.
    wide = stored.cast(pyarrow.large_binary()) if text == pyarrow.large_string() else stored
    column = pyarrow.Array.from_buffers(text, len(wide), wide.buffers())
    if struct:
        column = pyarrow.StructArray.from_arrays([column], ["bytes"])
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "label": some_labels()}), tmp_path / "a.parquet")
    assert (load(tmp_path / "a.parquet").images.permute(0, 2, 3, 1).numpy() == images).all()


@pytest.mark.parametrize("kind", [pyarrow.int64(), pyarrow.list_(pyarrow.int64())])
def test_parquet_images_of_another_type(kind: pyarrow.DataType, tmp_path: Path) -> None:
    values = [1] * 12 if kind == pyarrow.int64() else [[1, 2]] * 12
    pyarrow.parquet.write_table(
        pyarrow.table({"image": pyarrow.array(values, kind), "label": some_labels()}), tmp_path / "a.parquet"
    )
    refused(tmp_path / "a.parquet", "image")


def test_parquet_struct_without_bytes(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [{"path": "a.png"}] * 12, "label": some_labels()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "image")


def test_truncated_jpeg(tmp_path: Path) -> None:
    files = [encoded(image, "JPEG") for image in pixels()]
    files[7] = files[7][: len(files[7]) // 2]
    refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "row 7")


def test_a_picture_that_would_be_huge_is_not_decoded(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    header = bytearray(files[0])
    header[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height of the PNG header
    header[29:33] = zlib.crc32(bytes(header[12:29])).to_bytes(4, "big")
    files[0] = bytes(header)
    refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "row 0")


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0), (0.0, numpy.nan), (0.0, numpy.inf)])
def test_floats_out_of_range(low: float, high: float, tmp_path: Path) -> None:
    images = pixels().astype(numpy.float32) / 255
    images.flat[:2] = low, high
    refused(write_npz(tmp_path / "a.npz", images, some_labels()), "pixels out of range")


@pytest.mark.parametrize("dtype", [numpy.int64, numpy.uint16, bool, complex])
def test_pixels_of_another_type(dtype: Any, tmp_path: Path) -> None:
    refused(write_npz(tmp_path / "a.npz", pixels().astype(dtype), some_labels()), "malformed images")


def test_images_without_four_dimensions(tmp_path: Path) -> None:
    refused(write_npz(tmp_path / "a.npz", pixels().reshape(12, -1), some_labels()), "4 dimensions")


def test_absent_arrays_and_columns(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "a.npz", x=pixels(), y=some_labels())
    assert "x, y" in refused(tmp_path / "a.npz", "lacks arrays")
    pyarrow.parquet.write_table(pyarrow.table({"img": [b""], "label": [0]}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "lacks columns")


def test_contradictory_duplicates(tmp_path: Path) -> None:
    images = pixels()
    images[4] = images[0]
    refused(write_npz(tmp_path / "a.npz", images, some_labels()), "1 images appear again under another label")


def test_a_set_of_copies(tmp_path: Path) -> None:
    images, labels = numpy.tile(pixels(3), (4, 1, 1, 1)), numpy.tile(numpy.arange(3), 4)
    refused(write_npz(tmp_path / "a.npz", images, labels), "9 of 12 images are exact copies")


def test_flat_pictures(tmp_path: Path) -> None:
    flat = numpy.arange(12, dtype=numpy.uint8).reshape(-1, 1, 1, 1) + numpy.zeros((12, 8, 8, 3), numpy.uint8)
    refused(write_npz(tmp_path / "a.npz", flat, some_labels()), "one flat colour")


def test_every_problem_is_named_not_only_the_first() -> None:
    images = pixels(side=9).transpose(0, 3, 1, 2).copy()
    images[4] = images[0]
    labels = some_labels()
    labels[0] = 7
    found = list(problems_of(images, labels, input_size=SIZE, num_classes=CLASSES))
    assert len(found) == 3


# -- hostile files -----------------------------------------------------------------------


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.canary),))


def test_a_pickle_in_an_npz_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    images = numpy.empty(1, dtype=object)
    images[0] = Payload(canary)
    numpy.savez(tmp_path / "a.npz", images=images, labels=some_labels(1))
    refused(tmp_path / "a.npz", "no readable npz file")
    assert not canary.exists()


def test_a_pickle_called_npz_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "a.npz").write_bytes(pickle.dumps(Payload(canary)))
    refused(tmp_path / "a.npz", "no readable npz file")
    assert not canary.exists()


def test_an_npz_that_unpacks_to_too_much(tmp_path: Path) -> None:
    images = numpy.zeros((2000, 8, 8, 3), numpy.uint8)
    numpy.savez_compressed(tmp_path / "a.npz", images=images, labels=some_labels(2000))
    assert (tmp_path / "a.npz").stat().st_size < 10_000
    refused(tmp_path / "a.npz", "too large", limits=DataLimits(max_bytes=100_000))


def npy_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    numpy.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize("count", [10**5, 10**11, 10**15])
def test_an_npz_whose_header_promises_more_than_it_holds(count: int, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("images.npy", npy_header((count, 8, 8, 3)) + bytes(1000))
        archive.writestr("labels.npy", npy_header((2,)) + bytes(2))
    refused(tmp_path / "a.npz", "promises" if count == 10**5 else "too large")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "empty"])
@pytest.mark.parametrize("name", ["a.npz", "a.parquet"])
def test_damaged_files(name: str, damage: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.npz":
        numpy.savez_compressed(path, images=pixels(40), labels=some_labels(40))
    else:
        write_parquet(path, [encoded(image) for image in pixels(40)], some_labels(40))
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        for position in range(200, len(data) - 400, 97):
            data[position] ^= 0xFF
    path.write_bytes({"truncated": data[: len(data) // 2], "flipped": data, "text": b"hello", "empty": b""}[damage])
    refused(path, name)


@pytest.mark.parametrize("position", range(100, 2000, 151))
def test_one_flipped_byte_in_a_compressed_npz(position: int, tmp_path: Path) -> None:
    numpy.savez_compressed(tmp_path / "a.npz", images=pixels(), labels=some_labels())
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[position] ^= 0x10
    (tmp_path / "a.npz").write_bytes(data)
    refused(tmp_path / "a.npz", "a.npz")


def test_too_many_images(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    few = DataLimits(max_images=11)
    refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "too large", limits=few)
    refused(write_folder(tmp_path / "folder", files, some_labels().tolist()), "too large", limits=few)
    refused(write_npz(tmp_path / "a.npz", pixels(), some_labels()), "too large", limits=few)


def test_too_many_bytes(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    small = DataLimits(max_bytes=12 * 3 * 8 * 8 - 1)
    refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "too large", limits=small)
    refused(write_folder(tmp_path / "folder", files, some_labels().tolist()), "too large", limits=small)


@pytest.mark.parametrize("struct", [False, True])
def test_one_value_in_every_row_is_counted_and_never_held_as_often(struct: bool, tmp_path: Path) -> None:
    value, rows = encoded(pixels(1)[0]) + bytes(4_000_000), 400
    repeated = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([value]))
    column = pyarrow.StructArray.from_arrays([repeated], ["bytes"]) if struct else repeated
    labels = pyarrow.array([0] * rows)
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": column, "label": labels}), path, store_schema=False)
    assert path.stat().st_size < 1_000_000
    table, held = pyarrow.parquet.ParquetFile(path), []
    before = pyarrow.total_allocated_bytes()

    def read() -> None:
        for _ in parquet_rows(table, image_column(table.schema_arrow, path), some_labels(rows), path, max_bytes=10**9):
            held.append(pyarrow.total_allocated_bytes() - before)

    with pytest.raises(DataError, match="too large"):
        read()
    assert 0 < max(held) < 8 * len(value)
    refused(path, "too large", limits=DataLimits(max_bytes=10**9))


def test_encoded_images_larger_than_the_limit(tmp_path: Path) -> None:
    files = [encoded(image) + bytes(50_000) for image in pixels()]
    small = DataLimits(max_bytes=100_000)
    refused(write_parquet(tmp_path / "a.parquet", files, some_labels()), "too large", limits=small)
    refused(write_folder(tmp_path / "folder", files, some_labels().tolist()), "too large", limits=small)


def test_folders_that_hold_no_files_where_files_should_be(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    write_folder(tmp_path / "folder", files, some_labels().tolist())
    (tmp_path / "folder" / "class0" / "zzz.png").mkdir()
    refused(tmp_path / "folder", "zzz.png")


def test_files_of_a_folder_that_would_not_be_read_are_named(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    folder = write_folder(tmp_path / "folder", files, some_labels().tolist())
    for left_behind in (".DS_Store", "Thumbs.db"):
        (folder / "class0" / left_behind).write_bytes(b"")
    assert len(load(folder)) == 12
    (folder / "class1" / "scan.tif").write_bytes(b"II*")
    assert "'class1/scan.tif'" in refused(folder, "1 of 13 files that are not read")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    files = [encoded(image) for image in pixels()]
    write_folder(tmp_path / "folder", files, some_labels().tolist())
    (tmp_path / "folder" / "class0" / "zzz.png").symlink_to(tmp_path / "nothing")
    refused(tmp_path / "folder", "zzz.png")


# -- the set itself ----------------------------------------------------------------------


def clean_set(labels: list[int], classes: int = CLASSES) -> CleanSet:
    """Images that carry their own number, so that a sample can be recognised."""
    images = torch.arange(len(labels)).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return CleanSet(images.to(torch.uint8).contiguous(), torch.tensor(labels, dtype=torch.int64), classes)


def test_digest_covers_pixels_labels_order_shape_and_classes() -> None:
    base = clean_set([0, 1, 2, 0])
    again = clean_set([0, 1, 2, 0])
    other_pixels = base.images.clone()
    other_pixels[3, 0, 1, 1] ^= 1
    others = [
        CleanSet(other_pixels, base.labels, CLASSES),
        clean_set([0, 1, 2, 1]),
        base.subset(torch.tensor([1, 0, 2, 3])),
        base.subset(torch.tensor([0, 1, 2])),
        CleanSet(base.images, base.labels, CLASSES + 1),
        CleanSet(base.images.reshape(4, 1, 1, 4), base.labels, CLASSES),
    ]
    assert base.digest == again.digest
    assert base.digest.startswith("sha256:")
    assert len({base.digest, *(each.digest for each in others)}) == len(others) + 1


def test_digest_does_not_depend_on_memory_layout() -> None:
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0])
    strided = images.contiguous(memory_format=torch.channels_last)
    assert CleanSet(images, labels, 3).digest == CleanSet(strided, labels, 3).digest


def test_subset_and_batches() -> None:
    data = clean_set([0, 1, 2, 0, 1])
    chosen = data.subset(torch.tensor([4, 0]))
    assert chosen.labels.tolist() == [1, 0]
    assert chosen.images[:, 0, 0, 0].tolist() == [4, 0]
    sizes = [len(labels) for _, labels in data.batches(2)]
    assert sizes == [2, 2, 1]
    assert torch.cat([labels for _, labels in data.batches(2)]).tolist() == data.labels.tolist()


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 2, 2), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2)),
    ],
)
def test_malformed_sets_are_refused(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(DataError, match="malformed"):
        CleanSet(images, labels, 2)


# -- splits ------------------------------------------------------------------------------


def numbers(part: CleanSet) -> list[int]:
    return part.images[:, 0, 0, 0].tolist()


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    seed=st.integers(0, 1000),
    shares=st.sampled_from([(0.2, 0.2), (0.2, 0.0), (0.0, 0.0), (0.5, 0.4), (0.01, 0.01), (0.0, 0.3)]),
)
def test_splits_are_disjoint_complete_and_stratified(labels: list[int], seed: int, shares: tuple[float, float]) -> None:
    data = clean_set(labels, 5)
    select, report = shares
    parts = split_clean_set(data, seed=seed, select=select, report=report)
    together = numbers(parts.fit) + numbers(parts.select) + numbers(parts.report)
    assert sorted(together) == list(range(len(labels)))
    for label in range(5):
        count = data.class_counts[label]
        fit, chosen, quoted = (part.class_counts[label] for part in (parts.fit, parts.select, parts.report))
        assert (fit > 0) == (count > 0), "every class has something to fit on"
        assert chosen in {int(count * select), 1 if select and count > 1 else 0}
        assert quoted in {int(count * report), 1 if report and count > 1 else 0, 0 if count <= 2 else -1}
        if count >= 3:
            assert (chosen > 0) == (select > 0)
            assert (quoted > 0) == (report > 0)


def test_a_class_with_one_image_gives_it_to_fit() -> None:
    parts = split_clean_set(clean_set([0, 1, 2]), seed=0)
    assert (len(parts.fit), len(parts.select), len(parts.report)) == (3, 0, 0)
    parts = split_clean_set(clean_set([0, 0, 1, 1, 2, 2]), seed=0)
    assert (len(parts.fit), len(parts.select), len(parts.report)) == (3, 3, 0)


def test_the_seed_alone_decides() -> None:
    data = clean_set([0, 1, 2] * 20)
    one, again, other = (split_clean_set(data, seed=seed) for seed in (0, 0, 1))
    assert one.digest == again.digest
    assert one.digest != other.digest
    assert numbers(one.select) != numbers(other.select)


def test_parts_keep_their_labels() -> None:
    labels = [0, 1, 2] * 20
    parts = split_clean_set(clean_set(labels), seed=3)
    for part in (parts.fit, parts.select, parts.report):
        assert part.labels.tolist() == [labels[number] for number in numbers(part)]


def test_splitting_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    split_clean_set(clean_set([0, 1, 2] * 5), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("select", "report"), [(0.5, 0.5), (1.0, 0.0), (-0.1, 0.1), (0.7, 0.6)])
def test_shares_that_leave_nothing_are_refused(select: float, report: float) -> None:
    with pytest.raises(ConfigError, match="fractions below 1"):
        split_clean_set(clean_set([0, 1, 2]), seed=0, select=select, report=report)


def as_before(clean: CleanSet, *, seed: int, select: float, report: float) -> list[list[int]]:
    """What fit, select and report were when every image was drawn by itself: for sets without copies, what they are."""

    def share(count: int, fraction: float, reserved: int) -> int:
        return 0 if fraction == 0 or count <= reserved else min(max(1, int(count * fraction)), count - reserved)

    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(seed))
    parts: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in range(clean.num_classes):
        members = order[clean.labels[order] == label].tolist()
        first = share(len(members), select, 1)
        second = first + share(len(members), report, 1 + first)
        for part, found in zip(parts, (members[second:], members[:first], members[first:second]), strict=True):
            part.extend(found)
    return [sorted(part) for part in parts]


SHARES = st.sampled_from([(0.2, 0.2), (0.2, 0.0), (0.0, 0.0), (0.5, 0.4), (0.0, 0.3)])


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=200), seed=st.integers(0, 2**63 - 1), shares=SHARES)
def test_sets_without_copies_are_cut_as_ever(labels: list[int], seed: int, shares: tuple[float, float]) -> None:
    data = clean_set(labels, 5)
    parts = split_clean_set(data, seed=seed, select=shares[0], report=shares[1])
    found = [numbers(part) for part in (parts.fit, parts.select, parts.report)]
    assert found == as_before(data, seed=seed, select=shares[0], report=shares[1])


@settings(deadline=None)
@given(pictures=st.lists(st.integers(0, 40), min_size=1, max_size=120), seed=st.integers(0, 1000), shares=SHARES)
def test_a_copy_goes_where_its_first_goes(pictures: list[int], seed: int, shares: tuple[float, float]) -> None:
    images = torch.tensor(pictures, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    data = CleanSet(images, torch.tensor([picture % 3 for picture in pictures]), 3)
    parts = split_clean_set(data, seed=seed, select=shares[0], report=shares[1])
    found = [numbers(part) for part in (parts.fit, parts.select, parts.report)]
    assert sorted(picture for part in found for picture in part) == sorted(pictures)
    assert sum(len(set(part)) for part in found) == len(set(pictures)), "no picture is in two parts"
    assert {picture % 3 for picture in found[0]} == {picture % 3 for picture in pictures}
    for part in (parts.fit, parts.select, parts.report):
        assert part.labels.tolist() == [picture % 3 for picture in numbers(part)]


def test_first_copies_names_the_first_of_each() -> None:
    data = clean_set([0, 1, 2])
    assert data.subset(torch.tensor([1, 0, 1, 2, 0])).first_copies.tolist() == [0, 1, 0, 3, 1]


def test_figures_are_quoted_on_no_image_that_was_fitted() -> None:
    data = clean_set([0, 1, 2, 0, 1])
    fitted, quoted = (data.subset(torch.tensor(places)) for places in ([0, 1, 2], [3, 4]))
    require_apart(fitted, quoted, fitted_name="clean", quoted_name="test")
    relabelled = CleanSet(quoted.images, (quoted.labels + 1) % 3, 3)
    for shared in (quoted, relabelled):
        with pytest.raises(DataError, match="the test set holds images of the clean set") as refused:
            require_apart(data, shared.subset(torch.tensor([0, 1, 1])), fitted_name="clean", quoted_name="test")
        assert refused.value.got == "3 of 3 in both"
