"""Child process that turns a checked ``torch.save`` file into safetensors. Run as a script, never imported.

``python -I pickle_worker.py INPUT OUTPUT MAX_BYTES CPU_S SITE...`` prints one JSON line. It stands alone
(standard library, torch, safetensors) because an isolated interpreter does not see this package.
Exit status: 0 with a report on standard output; 70 if it could not start.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
from collections.abc import Mapping
from typing import Any

# Where training scripts put the state dict inside their checkpoint.
CONTAINERS = ("state_dict", "model_state_dict", "model", "net")
_FORBIDDEN_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "subprocess.",
    "socket.",
    "pty.",
    "ctypes.dlopen",
)


class Refused(Exception):
    """The file holds no usable state dict; ``kind`` selects the parent's error type."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(what)
        self.kind = kind


def confine(max_bytes: int, cpu_s: int) -> None:
    """Limit memory, processor time and file size, and make starting programs or talking fatal."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        used = int(stream.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # The file, its tensors, their contiguous copies and the writer's buffer, beside what torch maps.
    room = used + 4 * max_bytes + (512 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes + (64 << 20),) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def audit(event: str, _: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN_EVENTS):
            os._exit(71)

    sys.addaudithook(audit)


def state_dict_of(loaded: Any) -> Mapping[str, Any]:
    """The mapping of names to tensors inside a checkpoint, at most three containers deep."""
    for _ in range(4):
        if not isinstance(loaded, Mapping):
            raise Refused("mismatch", f"a {type(loaded).__name__} instead of a mapping of names to tensors")
        inner = [key for key in CONTAINERS if isinstance(loaded.get(key), Mapping)]
        if not inner:
            return loaded
        if len(inner) > 1:
            raise Refused("mismatch", "more than one state dict: " + ", ".join(inner))
        loaded = loaded[inner[0]]
    raise Refused("mismatch", "a state dict nested more than three deep")


def plain_tensors(state: Mapping[str, Any], max_bytes: int) -> dict[str, Any]:
    """Dense CPU copies without shared memory; what is no tensor is left out."""
    import torch

    tensors: dict[str, Any] = {}
    total = 0
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        if not isinstance(name, str):
            raise Refused("mismatch", f"a parameter name of type {type(name).__name__}")
        if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
            raise Refused("mismatch", f"{name} is not a dense CPU tensor")
        total += value.numel() * value.element_size()
        # A stride of zero makes a few bytes claim any size.
        if total > max_bytes:
            raise Refused("unsafe", f"tensors of more than {max_bytes} bytes")
        tensors[name] = value.detach().clone(memory_format=torch.contiguous_format)
    if not tensors:
        raise Refused("mismatch", "no tensors")
    return tensors


def main(arguments: list[str]) -> dict[str, Any]:
    source, target, max_bytes, cpu_s, *sites = arguments
    sys.path.extend(sites)
    try:
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError as error:
        sys.stderr.write(str(error))
        sys.exit(70)
    confine(int(max_bytes), int(cpu_s))
    kind, got = None, ""
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
        save_file(plain_tensors(state_dict_of(loaded), int(max_bytes)), target)
    except Refused as error:
        kind, got = error.kind, str(error)
    except pickle.UnpicklingError as error:
        kind, got = "unsafe", str(error)
    except MemoryError:
        kind, got = "memory", "a file that needs more memory than the limit"
    except SafetensorError as error:
        kind, got = "storage", str(error)
    except OSError as error:
        kind, got = "corrupt" if error.errno is None else "storage", str(error)
    except Exception as error:  # noqa: BLE001 - damaged input raises anything; the parent makes it one typed error
        kind, got = "memory" if "allocate memory" in str(error) else "corrupt", f"{type(error).__name__}: {error}"
    return {"error": kind, "got": got[:300]}


if __name__ == "__main__":
    report = main(sys.argv[1:])
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()
    # Skip interpreter teardown: nothing is left to do, and a damaged object must not be finalised.
    os._exit(0)
