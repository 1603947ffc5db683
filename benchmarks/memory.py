"""Peak memory of a stretch of a process: resident on the CPU, allocated on a GPU."""

from __future__ import annotations

from pathlib import Path

import torch


def reset_peak(device: str) -> None:
    """Begin a new stretch."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # 5: set the peak to what is resident now (Linux, proc(5)).
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_mb(device: str) -> float:
    """Peak since :func:`reset_peak`, in MB; on the CPU the interpreter and its libraries count too."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024 / 1e6
