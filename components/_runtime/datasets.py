"""The folder that hands a run's images and probes from fetch to the later steps."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense_core.config import canonical_json
from defense_core.errors import DataError
from defense_core.files import write_atomic

if TYPE_CHECKING:
    from defense_core.data import CleanSet

CLEAN, TEST, PROBES, POOL = "clean.npz", "test.npz", "probes.json", "pool.json"


@dataclass(frozen=True)
class RunData:
    """Paths of a run's images, and its probes.

    Attributes:
        clean: the clean set.
        test: the test set; ``None``: the clean set's *report* split is quoted.
        probes: trigger specifications.
        pool: the calibration pool of the scan; ``None``: one that comes along.
    """

    clean: Path
    test: Path | None
    probes: tuple[Mapping[str, Any], ...]
    pool: Path | None = None

    def report_share(self, share: float) -> float:
        """The clean set's share to set aside for quoting: none where there is a test set."""
        return share if self.test is None else 0.0


def write_data(folder: Path, clean: CleanSet, test: CleanSet | None, probes: Sequence[Mapping[str, Any]]) -> None:
    """Write validated images and probes into the existing ``folder``; the same content, the same bytes."""
    write_atomic(folder / CLEAN, _npz(clean))
    if test is not None:
        write_atomic(folder / TEST, _npz(test))
    write_atomic(folder / PROBES, canonical_json(list(probes)))


def read_data(folder: Path) -> RunData:
    """The paths in ``folder``. Raises DataError if it is not such a folder."""
    folder = Path(folder)
    try:
        probes = json.loads((folder / PROBES).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{folder} holds no run data", expected=f"{CLEAN} and {PROBES}", got=error) from error
    if not isinstance(probes, list):
        raise DataError(f"{folder} holds no run data", expected=f"a list in {PROBES}", got=type(probes).__name__)
    test, pool = ((folder / name if (folder / name).is_file() else None) for name in (TEST, POOL))
    return RunData(folder / CLEAN, test, tuple(probes), pool)


def _npz(images: CleanSet) -> bytes:
    import numpy

    buffer = io.BytesIO()
    numpy.savez(buffer, images=images.images.cpu().numpy(), labels=images.labels.cpu().numpy())
    return buffer.getvalue()
