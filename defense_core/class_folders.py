"""Which class each sub-folder of an image folder holds: by its name where the classes have names, else by its place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from defense_core.errors import DataError


def class_folders(path: Path, num_classes: int, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """The sub-folders of ``path`` in order of name, each with its label; hidden ones are left out.

    Where every sub-folder is called like a class, the names decide, and classes may be absent. Otherwise there must
    be one sub-folder a class, and the first is class 0: with one too few, every later class would be taken for
    another. No sub-folder at all is a set without images, which whoever reads it refuses.

    Raises:
        DataError: the sub-folders do not tell their classes.
        OSError: ``path`` cannot be read.
    """
    folders = sorted(member for member in path.iterdir() if not member.name.startswith(".") and member.is_dir())
    label_of = {name: label for label, name in enumerate(class_names)}
    distinct = len(label_of) == len(class_names)
    if distinct and all(folder.name in label_of for folder in folders):
        return [(folder, label_of[folder.name]) for folder in folders]
    placed = [(folder, label) for label, folder in enumerate(folders)]
    names = [folder.name for folder in folders]
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        raise DataError(
            f"the sub-folders of {path} stand in two orders",
            expected="numbers of the same length, such as 00 to 10, or names of classes",
            got=listed(names),
            hint="Pad the numbers with zeros, or give the model class names and call the sub-folders so",
        )
    spelled = {_plainly(name): label for name, label in label_of.items()}
    # A folder that is called like a class but for the spelling may stand in that class's place alone.
    alike = spelled if len(spelled) == len(label_of) else label_of
    displaced = distinct and any(
        alike.get(_plainly(folder.name), label_of.get(folder.name, label)) != label for folder, label in placed
    )
    if displaced or len(folders) != num_classes:
        raise _refusal(path, names, num_classes, class_names)
    return placed


def _plainly(name: str) -> str:
    """Without case, and with one kind of gap between words."""
    return name.casefold().replace("_", " ").replace("-", " ")


def _refusal(path: Path, found: Sequence[str], num_classes: int, class_names: Sequence[str]) -> DataError:
    return DataError(
        f"the sub-folders of {path} do not tell their classes",
        expected=f"sub-folders called {listed(class_names)}" if class_names else f"{num_classes} sub-folders",
        got=f"{len(found)}: {listed(found)}",
        hint="Make one sub-folder a class, an empty one for a class without images"
        + ("" if class_names else ", or give the model class names and call the sub-folders so"),
    )


def listed(names: Sequence[str]) -> str:
    """The first ten, quoted, and how many more there are."""
    shown = ", ".join(repr(name[:40]) for name in names[:10])
    return f"{shown} and {len(names) - 10} more" if len(names) > 10 else shown
