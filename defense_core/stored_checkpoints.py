"""Checkpoints in files: bound to the work that they are of, whole or refused, and rarely written.

A file is a seal, a line of JSON and safetensors: nothing in it is ever executed. One that is damaged,
truncated, sealed by somebody else or of other work is named in the log and not used; the work then begins where it can.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from defense_core import __version__
from defense_core.checkpoints import Checkpoint, Saved
from defense_core.config import canonical_json, digest, from_mapping, require
from defense_core.errors import CorruptArtifact, DigestMismatch, QuarantineError, StorageError
from defense_core.files import write_atomic
from defense_core.limits import LoadLimits
from defense_core.safetensors_file import parse_safetensors, safetensors_bytes
from defense_core.seals import sealed, unsealed

FORMAT = 1
MAX_SHARE = 0.05
"""Share of the time that writing checkpoints may take: after a slow write the next one waits longer."""
MAX_PENDING_BYTES = 256 << 20
"""Results of finished loops wait in memory for the next write that is due, up to this size."""

logger = logging.getLogger("quarantine")


class CheckpointFiles(Protocol):
    """Where checkpoints lie: a folder, or a prefix in an object store."""

    def read(self, name: str) -> bytes | None:
        """The content of ``name``, or ``None`` where there is none. Raises QuarantineError."""
        ...

    def write(self, name: str, data: bytes) -> None:
        """Write ``data`` in the place of what is there, whole or not at all. Raises QuarantineError."""
        ...

    def clear(self) -> None:
        """Remove everything. Raises QuarantineError."""
        ...


@dataclass(frozen=True)
class CheckpointFolder:
    """Checkpoints in a folder of their own, which need not exist yet."""

    folder: Path

    def read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot read {self.folder / name}", got=error.strerror) from error

    def write(self, name: str, data: bytes) -> None:
        write_atomic(self.folder / name, data)

    def clear(self) -> None:
        try:
            shutil.rmtree(self.folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(f"cannot remove {self.folder}", got=error.strerror) from error


class StoredCheckpoints:
    """Checkpoints of one piece of work, written at most once an interval.

    What cannot be written or read is a line in the log and never the end of the work.
    """

    def __init__(
        self,
        files: CheckpointFiles,
        *,
        key: str,
        interval_s: float,
        secret: bytes = b"",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Checkpoints in ``files``; the first is written after ``interval_s`` seconds.

        Args:
            key: who the work is, see :func:`work_key`; files of another key are not used.
            interval_s: at least so many seconds from one write to the next.
            secret: seals what is written; what is read must have its seal. Empty: a digest, which anybody can make.
        """
        require(interval_s >= 0, "interval_s", "0 seconds or more", interval_s)
        self._files = files
        self._key = key
        self._interval_s = interval_s
        self._secret = secret
        self._clock = clock
        self._due = clock() + interval_s
        self._loops = 0
        self._pending: dict[str, Saved] = {}

    def of_loop(self, name: str) -> Checkpoint:
        self._loops += 1  # two loops may have the same name; their order never changes
        return _Stored(self, f"{self._loops:03d}-{re.sub('[^a-z0-9.]+', '-', name.lower())}")

    def load(self, name: str) -> Saved | None:
        """What the file ``name`` holds, if it is whole and of this work."""
        try:
            data = self._files.read(name)
            return None if data is None else decoded(data, key=self._key, name=name, secret=self._secret)
        except QuarantineError as error:
            logger.warning("checkpoint %s is not used: %s", name, error)
            return None

    def save(self, name: str, take: Callable[[], Saved], *, finished: bool) -> None:
        """Keep a finished loop's result; write it, and all that is kept, once that is due."""
        started = self._clock()
        due = started >= self._due
        if due or finished:
            self._pending[name] = take()
        if due or (finished and self._pending_bytes() > MAX_PENDING_BYTES):
            self._write_pending()
            cost = self._clock() - started
            self._due = started + cost + max(self._interval_s, cost / MAX_SHARE)

    def _write_pending(self) -> None:
        for name, saved in list(self._pending.items()):
            try:
                self._files.write(name, encoded(saved, key=self._key, name=name, secret=self._secret))
            except QuarantineError as error:
                logger.warning("checkpoint %s was not written, the work goes on: %s", name, error)
                return
            del self._pending[name]

    def _pending_bytes(self) -> int:
        return sum(tensor.nbytes for saved in self._pending.values() for tensor in saved.tensors.values())


@dataclass(frozen=True)
class _Stored:
    """One loop's place among stored checkpoints."""

    all: StoredCheckpoints
    name: str

    def load(self) -> Saved | None:
        return self.all.load(self.name)

    def save(self, take: Callable[[], Saved], *, finished: bool) -> None:
        self.all.save(self.name, take, finished=finished)


def work_key(*, model: str, clean: str, method: str, config: Any, seed: int, device: torch.device | str) -> str:
    """Who a purification is: everything that its bytes depend on, down to the kind of machine.

    A checkpoint from a machine that computes otherwise would end in bytes that neither machine gives
    undisturbed.

    Args:
        model: digest of the bundle.
        clean: digest of the splits.
        method, config, seed: as for :func:`defense_core.purify.purify`.
        device: where it runs.

    Returns:
        ``"sha256:<hex>"``.
    """
    work = {"model": model, "clean": clean, "method": method, "config": digest(config), "seed": seed}
    code = {"version": __version__, "torch": torch.__version__, "format": FORMAT}
    return digest({**work, **code, "machine": _machine(torch.device(device)), "threads": torch.get_num_threads()})


def _machine(device: torch.device) -> dict[str, Any]:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not there before torch 2.12
    # How many cores there are makes no difference, how many threads are used does.
    processor = {name: value for name, value in capabilities.items() if not name.startswith("num_")}
    processor["kernels"] = torch.backends.cpu.get_cpu_capability()
    return {**processor, "cuda": torch.cuda.get_device_name(device)} if device.type == "cuda" else processor


@dataclass(frozen=True)
class _Head:
    """The line of JSON before the tensors; ``strides`` is the layout of each, which safetensors does not keep."""

    format: int
    key: str
    name: str
    done: int
    finished: bool
    history: tuple[Mapping[str, Any], ...]
    strides: Mapping[str, tuple[int, ...]]


def encoded(saved: Saved, *, key: str, name: str, secret: bytes = b"") -> bytes:
    """The content of a checkpoint file. Raises ConfigError where the history holds NaN or Inf."""
    strides = {tensor: value.stride() for tensor, value in saved.tensors.items()}
    head = _Head(FORMAT, key, name, saved.done, saved.finished, saved.history, strides)
    body = canonical_json(head) + b"\n" + safetensors_bytes(saved.tensors)
    return sealed(body, secret)


def decoded(data: bytes, *, key: str, name: str, secret: bytes = b"") -> Saved:
    """What :func:`encoded` was given.

    Raises:
        CorruptArtifact, ConfigError: damaged, truncated, sealed by another secret, or no checkpoint.
        DigestMismatch: of other work, or of another loop of it.
    """
    line, _, rest = unsealed(data, secret, f"checkpoint {name}").partition(b"\n")
    try:
        mapping = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorruptArtifact(f"checkpoint {name} is damaged", expected="a line of JSON", got=error) from error
    head = from_mapping(_Head, mapping, where=f"checkpoint {name}")
    if (head.format, head.key, head.name) != (FORMAT, key, name):
        got = f"{head.name} of {head.key}, format {head.format}"
        raise DigestMismatch(f"checkpoint {name} is of other work", expected=f"{name} of {key}", got=got)
    tensors = parse_safetensors(rest, LoadLimits(max_bytes=max(1, len(rest))), where=f"checkpoint {name}")
    if tensors.keys() != head.strides.keys():
        raise CorruptArtifact(f"checkpoint {name} is damaged", expected=sorted(head.strides), got=sorted(tensors))
    laid_out = {tensor: _laid_out(value, head.strides[tensor], name) for tensor, value in tensors.items()}
    return Saved(head.done, head.finished, head.history, laid_out)


def _laid_out(tensor: Tensor, strides: tuple[int, ...], name: str) -> Tensor:
    """A copy with these strides: kernels may add up in another order where the layout is another."""
    sizes = list(tensor.shape)
    extent = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False)) if tensor.numel() else 0
    if len(strides) != len(sizes) or min(strides, default=0) < 0 or extent != tensor.numel():
        raise CorruptArtifact(f"checkpoint {name} is damaged", expected=f"a dense layout of {sizes}", got=strides)
    return torch.empty_strided(sizes, strides, dtype=tensor.dtype).copy_(tensor)
