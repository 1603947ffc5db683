"""Reading pickle-bearing files in a child process that may do nothing else."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors
import torch

from defense_core.errors import (
    CorruptArtifact,
    LoadTimeout,
    QuarantineError,
    StateDictMismatch,
    StorageError,
    UnsafeArtifact,
)
from defense_core.limits import LoadLimits
from defense_core.safetensors_file import read_safetensors

_WORKER = Path(__file__).with_name("pickle_worker.py")
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
_CANNOT_START = 70
_FORBIDDEN = 71


def read_isolated(path: Path, limits: LoadLimits) -> dict[str, torch.Tensor]:
    """Tensors of a ``torch.save`` file that passed the static check.

    The child loads with ``weights_only=True`` under limits of memory, processor time and file size,
    and without this process's environment; it hands over plain safetensors.

    Raises:
        UnsafeArtifact, CorruptArtifact, StateDictMismatch, LoadTimeout, StorageError.
    """
    sites = {str(Path(package.__file__).parents[1]) for package in (torch, safetensors) if package.__file__}
    cpu_s = str(math.ceil(limits.timeout_s) + 1)
    with tempfile.TemporaryDirectory(prefix="quarantine-") as folder:
        target = Path(folder) / "weights.safetensors"
        command = [sys.executable, "-I", "-W", "ignore", str(_WORKER), str(path.resolve()), str(target)]
        command += [str(limits.max_bytes), cpu_s, *sorted(sites)]
        try:
            child = subprocess.run(
                command,
                env=_ENVIRONMENT,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=limits.timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise _too_slow(path, limits) from error
        _check(path, limits, child)
        return read_safetensors(target, limits, where=path.name)


def _check(path: Path, limits: LoadLimits, child: subprocess.CompletedProcess[bytes]) -> None:
    if child.returncode in (-signal.SIGXCPU, -signal.SIGKILL) and not child.stdout:
        raise _too_slow(path, limits)
    if child.returncode == _FORBIDDEN:
        raise UnsafeArtifact(
            f"{path.name} tried to start a program or open a connection while it was read",
            expected="plain tensors",
            got="a forbidden operation; the reader was stopped before it",
        )
    lines = child.stderr.decode(errors="replace").strip().splitlines()
    if child.returncode == _CANNOT_START:
        raise QuarantineError(
            "the isolated reader cannot start",
            expected="torch and safetensors importable by this interpreter",
            got=lines[-1] if lines else "no message",
            hint="Install both into the environment itself, not through PYTHONPATH",
        )
    if child.returncode != 0:
        raise CorruptArtifact(
            f"{path.name} cannot be read",
            expected="a file by torch.save",
            got=f"reader status {child.returncode}" + (f": {lines[-1]}" if lines else ""),
        )
    report = json.loads(child.stdout)
    kind, got = report["error"], report.get("got")
    if kind is None:
        return
    if kind in ("unsafe", "memory"):
        raise UnsafeArtifact(f"{path.name} was refused by the isolated reader", expected="plain tensors", got=got)
    if kind == "mismatch":
        raise StateDictMismatch(
            f"{path.name} holds no single state dict",
            expected="names to tensors, optionally under state_dict, model_state_dict, model or net",
            got=got,
            hint="Save model.state_dict()",
        )
    if kind == "storage":
        raise StorageError("cannot write to the temporary folder", expected="free space for the weights", got=got)
    raise CorruptArtifact(
        f"{path.name} is damaged",
        expected="a complete file by torch.save",
        got=got,
        hint="Fetch the file again and compare its digest",
    )


def _too_slow(path: Path, limits: LoadLimits) -> LoadTimeout:
    return LoadTimeout(
        f"reading {path.name} took too long",
        expected=f"at most {limits.timeout_s:g} s",
        got="no result in that time",
        hint="Raise timeout_s if the file is large and its origin is trusted",
    )
