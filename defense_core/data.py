"""The clean set: loading, validation, and disjoint, seeded fit / select / report splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
import torch
from torch import Tensor

from defense_core.config import require
from defense_core.errors import DataError
from defense_core.image_files import DataLimits, read_images

__all__ = ["CleanSet", "DataLimits", "Splits", "load_clean_set", "problems_of", "require_apart", "split_clean_set"]


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
    def first_copies(self) -> Tensor:
        """For each image the number of the first one with the same pixels; its own where no earlier one has them."""
        return torch.from_numpy(_first_copies(self.images.cpu().numpy()))

    @property
    def distinct(self) -> Tensor:
        """The numbers of the images that no earlier one equals, in order, int64."""
        return torch.nonzero(self.first_copies == torch.arange(len(self))).flatten()

    def without_copies(self) -> CleanSet:
        """The first of all samples with the same pixels; itself where there are no copies."""
        distinct = self.distinct
        return self if len(distinct) == len(self) else self.subset(distinct)

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
    def unfitted(self) -> CleanSet:
        """*select* and *report* together: what no method trains on."""
        return joined(self.select, self.report)

    @property
    def digest(self) -> str:
        """One digest over the three parts."""
        joined = "\n".join((self.fit.digest, self.select.digest, self.report.digest))
        return "sha256:" + hashlib.sha256(joined.encode()).hexdigest()


def evenly_spaced(count: int, limit: int) -> Tensor:
    """At most ``limit`` indices below ``count``, so that a set sorted by class is not cut off: int64."""
    return torch.arange(count) if count <= limit else torch.arange(limit) * count // limit


def joined(first: CleanSet, second: CleanSet) -> CleanSet:
    """The samples of both, in order."""
    images, labels = (torch.cat(parts) for parts in ((first.images, second.images), (first.labels, second.labels)))
    return CleanSet(images, labels, first.num_classes)


def split_clean_set(clean: CleanSet, *, seed: int, select: float = 0.2, report: float = 0.2) -> Splits:
    """Cut ``clean`` into stratified, disjoint parts.

    Per class of ``n`` different images, ``floor(n*select)`` go to *select* and ``floor(n*report)`` to
    *report*, at least one to each as long as one is left for *fit*. A class with a single
    image gives it to *fit*. An exact copy goes where the first such image goes, so no part holds an
    image of another.

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
    different = clean.distinct
    order = different[torch.randperm(len(different), generator=generator)]
    labels = clean.labels.cpu()[order]
    part_of = torch.zeros(len(clean), dtype=torch.int64)
    for label in range(clean.num_classes):
        members = order[labels == label]
        count = len(members)
        for_select = _share(count, select, reserved=1)
        for_report = _share(count, report, reserved=1 + for_select)
        part_of[members[:for_select]] = 1
        part_of[members[for_select : for_select + for_report]] = 2
    part_of = part_of[clean.first_copies]
    fit, chosen, reported = (clean.subset(torch.nonzero(part_of == part).flatten()) for part in range(3))
    return Splits(fit, chosen, reported)


def _share(count: int, fraction: float, *, reserved: int) -> int:
    if fraction == 0 or count <= reserved:
        return 0
    return min(max(1, int(count * fraction)), count - reserved)


def require_apart(fitted: CleanSet, quoted: CleanSet, *, fitted_name: str, quoted_name: str) -> None:
    """Refuse to quote figures on images that a network is fitted on; equal pixels make an image the same.

    Args:
        fitted_name, quoted_name: what messages call the two sets.

    Raises:
        DataError: the sets share images.
    """
    known = set(_fingerprints(fitted.images.cpu().numpy()))
    shared = sum(each in known for each in _fingerprints(quoted.images.cpu().numpy()))
    if shared:
        raise DataError(
            f"the {quoted_name} set holds images of the {fitted_name} set",
            expected=f"images that the {fitted_name} set does not hold",
            got=f"{shared} of {len(quoted)} in both",
            hint="Take them out of one of the two: figures on them would be of images that were fitted",
        )


def load_clean_set(
    path: Path | str,
    *,
    input_size: tuple[int, int, int],
    num_classes: int,
    limits: DataLimits = DataLimits(),
    require_all_classes: bool = True,
    class_names: Sequence[str] = (),
) -> CleanSet:
    """Read a clean set and validate it.

    Formats: a parquet file (columns ``image``: encoded bytes or the ``{bytes, path}`` struct
    of the datasets library, and ``label``: integers); a folder with one sub-folder per class,
    see :func:`~defense_core.class_folders.class_folders`; an ``.npz`` with ``images`` (N, H, W, C)
    or (N, C, H, W), uint8, or floating point in [0, 1], and ``labels``.

    Args:
        input_size: (C, H, W) that the model wants; images of another size are refused.
        num_classes: K of the model.
        limits: size limits, checked while reading.
        require_all_classes: refuse a set in which a class has no image.
        class_names: K names of the model's classes, which sub-folders may bear, or none.

    Raises:
        DataError: with everything that is wrong, not only the first problem.
    """
    path = Path(path)
    images, labels = read_images(path, input_size, limits, num_classes=num_classes, class_names=class_names)
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
    first = _first_copies(images)
    copies = int((first != numpy.arange(len(first))).sum())
    contradictions = int((labels[first] != labels).sum())
    if contradictions:
        yield f"{contradictions} images appear again under another label"
    if copies > len(images) // 2:
        yield f"{copies} of {len(images)} images are exact copies of others"


def _first_copies(images: numpy.ndarray) -> numpy.ndarray:
    """For each image, the number of the first one with the same bytes, int64 (N,)."""
    seen: dict[bytes, int] = {}
    found = numpy.empty(len(images), dtype=numpy.int64)
    for number, fingerprint in enumerate(_fingerprints(images)):
        found[number] = seen.setdefault(fingerprint, number)
    return found


def _fingerprints(images: numpy.ndarray) -> Iterator[bytes]:
    return (hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images)
