"""Peak memory of a stretch of a process: resident on the CPU, allocated on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch


def on_cuda(device: str) -> bool:
    """Whether ``device`` is a GPU: ``cuda``, or one of several, ``cuda:1``."""
    return torch.device(device).type == "cuda"


def device_name(device: str) -> str:
    """What a row says of where it was measured: the GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if on_cuda(device) else "cpu"


def reset_peak(device: str) -> None:
    """Begin a new stretch."""
    if on_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # 5: set the peak to what is resident now (Linux, proc(5)).
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_mb(device: str) -> float:
    """Peak since :func:`reset_peak`, in MB; on the CPU the interpreter and its libraries count too."""
    if on_cuda(device):
        return torch.cuda.max_memory_allocated(device) / 1e6
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6
