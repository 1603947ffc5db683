"""Child process that judges pickles which passed the opcode check. Run as a script, never imported.

``python -I -S scan_worker.py MAX_BYTES CPU_S`` reads length-prefixed parts from standard input, settings and
then pickles, and prints one JSON line. Two judges: fickling's static analysis, and a reading of what the
tensors claim in which every name stands for a harmless recorder. No function that a pickle names is looked up.

fickling's allow-list for machine learning is extended by the setting ``allow``.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import resource
import struct
import sys
from typing import Any

# Objections of these analyses mean that it could not follow, not that it found something.
_COULD_NOT_FOLLOW = ("InvalidOpcode", "InterpretationErrorAnalysis", "ResourceExhaustionAnalysis")
# These object to every import of torch, to every call, rebuilding a tensor included, and to tensors in tuples.
_NOT_FOR_TENSORS = ("NonStandardImports", "OvertlyBadEvals", "UnusedVariables")
_FORBIDDEN_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "ctypes.",
    "pickle.",
)


def confine(max_bytes: int, cpu_s: int) -> None:
    """Limit memory, processor time and files; unpickling, programs and connections are fatal."""
    resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def audit(event: str, _: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN_EVENTS):
            os._exit(71)

    sys.addaudithook(audit)


class Contradiction(ValueError):
    """A tensor lies outside its storage, or a storage is not as large as its record."""


class Recorder:
    """Stands for anything that a pickle of tensors names; calling it does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        # The one attribute that torch.save writes; others could replace what a reader relies on.
        if not isinstance(state, dict) or set(state) - {"_metadata"}:
            raise Contradiction(f"attributes that a state dict does not have: {str(state)[:60]}")

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class Claims(pickle._Unpickler):  # type: ignore[name-defined]
    """Python's own unpickler, the one that is written in Python, with every name replaced."""

    def __init__(self, data: bytes, sizes: dict[str, int] | None, max_bytes: int) -> None:
        super().__init__(io.BytesIO(data))
        self.sizes, self.max_bytes, self.claimed = sizes, max_bytes, 0
        # Elements, and bytes of one, as each storage is first named: so it is stored.
        self.storages: dict[Any, tuple[int, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return self.tensor
        return name if name.endswith("Storage") else Recorder

    def persistent_load(self, pid: Any) -> Any:
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or pid[1] not in ITEM_BYTES:
            raise Contradiction(f"a reference to {str(pid)[:60]!r}")
        name, key, elements = pid[1], pid[2], pid[4]
        if type(elements) is not int or elements < 0 or elements * ITEM_BYTES[name] > self.max_bytes:
            raise Contradiction(f"storage {str(key)[:20]!r} claims {str(elements)[:24]} elements")
        stored = self.sizes.get(key) if self.sizes is not None else elements * ITEM_BYTES[name]
        if stored != elements * ITEM_BYTES[name]:
            raise Contradiction(f"storage {str(key)[:20]!r} claims {elements} x {name}, its record has {stored} bytes")
        first = self.storages.setdefault(key, (elements, ITEM_BYTES[name]))
        if math.prod(first) != elements * ITEM_BYTES[name]:
            raise Contradiction(f"storage {str(key)[:20]!r} claims two sizes")
        return name, self.viewed(elements, pid[5] if len(pid) > 5 else None)

    def viewed(self, elements: int, view: Any) -> int:
        """Elements of a storage of ``elements``, or of the part of it that old files name as (key, offset, size)."""
        if view is None:
            return elements
        if not isinstance(view, tuple) or len(view) != 3 or not all(type(n) is int and n >= 0 for n in view[1:]):
            raise Contradiction(f"a view {str(view)[:60]!r} of a storage")
        if view[1] + view[2] > elements:
            raise Contradiction(f"a view of {view[2]} elements from {view[1]} on in a storage of {elements}")
        return int(view[2])

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> Recorder:
        name, elements = storage
        sizes, strides = tuple(size), tuple(stride)
        numbers = (offset, *sizes, *strides)
        if len(sizes) != len(strides) or not all(type(n) is int and 0 <= n < 1 << 60 for n in numbers):
            raise Contradiction(f"a tensor with the shape {str(sizes)[:60]}")
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        # An untyped storage counts bytes; its tensors say their type themselves, at least one byte an element.
        if math.prod(sizes) and last >= elements:
            raise Contradiction(f"a tensor of the shape {str(sizes)[:60]} reaches beyond its storage of {elements}")
        self.claimed += math.prod(sizes) * ITEM_BYTES[name]
        if self.claimed > self.max_bytes:
            raise Contradiction(f"tensors that claim more than {self.max_bytes} bytes, as {str(sizes)[:60]}")
        return Recorder()


ITEM_BYTES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage", "UntypedStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage", "ComplexFloatStorage"), 8),
    "ComplexDoubleStorage": 16,
}


def check_claims(pickles: list[bytes], settings: dict[str, Any], answer: dict[str, list[Any]]) -> None:
    """Note where the tensors of the pickles of one file contradict their storages."""
    try:
        read = [Claims(data, settings["sizes"], settings["max_bytes"]) for data in pickles]
        values = [claims.load() for claims in read]
        if settings["in_order"]:
            answer["storages"] += stored_in_order(values[-1], read[-2].storages)
        elif unnamed := set(settings["sizes"] or ()).difference(*(claims.storages for claims in read)):
            raise Contradiction(f"{len(unnamed)} records that belong to no tensor, as {min(unnamed)[:20]!r}")
    except Contradiction as error:
        answer["contradictions"].append(str(error))
    except MemoryError:
        answer["undecided"].append("reading the tensors' sizes needs more memory than the limit")
    except Exception as error:  # noqa: BLE001 - whatever stops the reading makes it undecided, never clean
        answer["undecided"].append(f"sizes of tensors: {type(error).__name__}: {str(error)[:120]}")


def stored_in_order(keys: Any, storages: dict[Any, tuple[int, int]]) -> list[tuple[int, int]]:
    """What follows the pickles of an old file, which name each storage once and no other."""
    if not isinstance(keys, list) or len(keys) != len(storages) or set(keys) != set(storages):
        raise Contradiction(f"a table of storages, {str(keys)[:60]}, that are not those of the tensors")
    return [storages[key] for key in keys]


def pickles_in(data: bytes) -> list[bytes]:
    """The length-prefixed parts of ``data``."""
    found, at = [], 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        found.append(data[at + 8 : at + 8 + size])
        at += 8 + size
    return found


def ask_fickling(data: bytes, analyses: list[Any], answer: dict[str, list[str]]) -> None:
    """Note what fickling says of one pickle."""
    from fickling.analysis import AnalysisContext
    from fickling.fickle import Pickled

    try:
        context = AnalysisContext(Pickled.load(data))
        for analysis in analyses:
            name = type(analysis).__name__
            for result in context.analyze(analysis):
                unable = name in _COULD_NOT_FOLLOW or result.analysis_name == "InterpretationError"
                answer["undecided" if unable else "refused"].append(f"{name}: {str(result)[:200]}")
    except MemoryError:
        answer["undecided"].append("fickling needs more memory than the limit")
    except Exception as error:  # noqa: BLE001 - whatever stops the analysis makes it undecided, never clean
        answer["undecided"].append(f"fickling stopped with {type(error).__name__}: {str(error)[:120]}")


def main(arguments: list[str]) -> dict[str, list[Any]]:
    first, *pickles = pickles_in(sys.stdin.buffer.read())
    settings, max_bytes, cpu_s = json.loads(first), int(arguments[0]), int(arguments[1])
    sys.path.extend(settings["sites"])
    # Imported before the limits, and before a byte of the stranger's is looked at.
    from fickling.analysis import Analysis
    from fickling.ml import ML_ALLOWLIST, MLAllowlist

    confine(max_bytes, cpu_s)
    allowed = {module: dict(names) for module, names in ML_ALLOWLIST.items()}
    for dotted in settings["allow"]:
        module, _, name = dotted.rpartition(".")
        allowed.setdefault(module, {}).setdefault(name, "plain tensor data")
    own_list = MLAllowlist()
    own_list.allowlist = allowed
    analyses = [own_list, *(each for each in Analysis.ALL if type(each).__name__ not in _NOT_FOR_TENSORS)]
    answer: dict[str, list[Any]] = {"refused": [], "undecided": [], "contradictions": []}
    for data in pickles:
        ask_fickling(data, analyses, answer)
    storages: dict[str, list[Any]] = {"storages": []}
    check_claims(pickles, settings, answer | storages)
    return {name: lines[:20] for name, lines in answer.items()} | storages


if __name__ == "__main__":
    sys.setrecursionlimit(5000)
    sys.stdout.write(json.dumps(main(sys.argv[1:])))
    sys.stdout.flush()
    os._exit(0)
