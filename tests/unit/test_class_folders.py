"""Image folders: which class a sub-folder holds, and pictures of more than 8 bits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy
import pytest
from PIL import Image

from defense_core.data import CleanSet, load_clean_set
from defense_core.errors import EXIT_USAGE, DataError

NAMES = ("cat", "dog", "ant")


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def folders(path: Path, *names: str, empty: tuple[str, ...] = ()) -> Path:
    """One sub-folder a name with two images."""
    generator = numpy.random.default_rng(0)
    path.mkdir()
    for name in names:
        (path / name).mkdir()
        for number in range(2):
            image = Image.fromarray(generator.integers(0, 256, (8, 8, 3)).astype(numpy.uint8))
            (path / name / f"{number}.png").write_bytes(png(image))
    for name in empty:
        (path / name).mkdir()
    return path


def load(path: Path, names: tuple[str, ...] = (), *, every_class: bool = False) -> CleanSet:
    return load_clean_set(path, input_size=(3, 8, 8), num_classes=3, class_names=names, require_all_classes=every_class)


def refused(path: Path, names: tuple[str, ...] = (), *, every_class: bool = False) -> DataError:
    with pytest.raises(DataError) as caught:
        load(path, names, every_class=every_class)
    assert caught.value.exit_code == EXIT_USAGE
    return caught.value


def test_without_names_the_order_decides(tmp_path: Path) -> None:
    assert load(folders(tmp_path / "x", "c", "a", "b")).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_numbers_whose_order_as_text_is_another_are_refused(tmp_path: Path) -> None:
    error = refused(folders(tmp_path / "x", "1", "2", "10"))
    assert error.got == "'1', '10', '2'"
    assert load(folders(tmp_path / "padded", "01", "02", "10")).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert load(folders(tmp_path / "named", "1", "2", "10"), ("1", "2", "10")).labels.tolist() == [0, 0, 2, 2, 1, 1]


def test_a_missing_sub_folder_is_refused_where_the_order_decides(tmp_path: Path) -> None:
    error = refused(folders(tmp_path / "x", "cat", "dog"))
    assert error.expected == "3 sub-folders"
    assert error.got == "2: 'cat', 'dog'"


@pytest.mark.parametrize("every_class", [True, False])
def test_a_sub_folder_too_many_is_refused(tmp_path: Path, every_class: bool) -> None:
    assert "4: " in str(refused(folders(tmp_path / "x", "a", "b", "c", empty=("d",)), every_class=every_class))


def test_names_of_classes_decide_where_all_sub_folders_bear_one(tmp_path: Path) -> None:
    assert load(folders(tmp_path / "all", *NAMES), NAMES, every_class=True).labels.tolist() == [2, 2, 0, 0, 1, 1]
    assert load(folders(tmp_path / "some", "dog", "ant"), NAMES).labels.tolist() == [2, 2, 1, 1]


def test_sub_folders_that_bear_other_names_are_taken_in_order(tmp_path: Path) -> None:
    assert load(folders(tmp_path / "x", "n0", "n1", "n2"), NAMES).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert "sub-folders called 'cat', 'dog', 'ant'" in str(refused(folders(tmp_path / "y", "n0", "n1"), NAMES))


def test_a_misspelt_name_among_right_ones_moves_no_class(tmp_path: Path) -> None:
    """In order, ant would be class 0 and dog class 2, which their names deny."""
    assert "'ant', 'catt', 'dog'" in str(refused(folders(tmp_path / "x", "ant", "catt", "dog"), NAMES))


def test_names_that_differ_in_spelling_alone_move_no_class(tmp_path: Path) -> None:
    path = folders(tmp_path / "x", "Ant", "Cat", "Dog")
    assert "'Ant', 'Cat', 'Dog'" in str(refused(path, NAMES))
    assert load(path, ("ant", "cat", "dog")).labels.tolist() == [0, 0, 1, 1, 2, 2]
    lights = folders(tmp_path / "y", "a", "red_light", "stop-sign")
    assert load(lights, ("other", "red light", "stop sign")).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert "'red_light'" in str(refused(lights, ("other", "stop sign", "red light")))


def test_two_classes_of_one_name_are_told_apart_by_order(tmp_path: Path) -> None:
    assert load(folders(tmp_path / "x", "a", "b", "c"), ("b", "b", "a")).labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_an_empty_class_folder_is_a_class_without_images(tmp_path: Path) -> None:
    path = folders(tmp_path / "x", "b", "c", empty=("a", ".hidden"))
    assert load(path).labels.tolist() == [1, 1, 2, 2]
    assert "no image: [0]" in str(refused(path, every_class=True))


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_a_channel_are_refused(kind: str, channels: int, tmp_path: Path) -> None:
    """Pillow would clip them: nearly every pixel white."""
    for name in "abc":
        (tmp_path / name).mkdir()
        pixels = numpy.random.default_rng(ord(name)).integers(0, 65536, (8, 8)).astype(numpy.uint16)
        (tmp_path / name / ("0." + kind.lower())).write_bytes(png(Image.fromarray(pixels), kind))
    with pytest.raises(DataError, match="more than 8 bits a channel: expected 8 bits a channel, got mode I"):
        load_clean_set(tmp_path, input_size=(channels, 8, 8), num_classes=3)


def test_a_path_that_no_file_can_have_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="File name too long"):
        load(tmp_path / ("x" * 300))
