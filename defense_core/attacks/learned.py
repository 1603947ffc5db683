"""Triggers with trained parameters: a safetensors file, named with its digest by the specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from defense_core.config import require
from defense_core.errors import ConfigError, CorruptArtifact, DigestMismatch, SourceNotFound
from defense_core.files import sha256_bytes, write_atomic
from defense_core.limits import LoadLimits
from defense_core.safetensors_file import parse_safetensors, safetensors_bytes

MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Learned:
    """What all learned triggers share.

    The file is read when the trigger is made, so that a wrong one is found before anything is computed with it.

    Attributes:
        path: the safetensors file. In a YAML specification it is relative to that specification.
        sha256: digest that the file must have, ``sha256:<hex>``.

    Raises:
        SourceNotFound: there is no such file.
        DigestMismatch: it has another digest.
        CorruptArtifact, UnsafeArtifact: it does not hold what the trigger needs, or is no safetensors file.
    """

    path: str
    sha256: str

    def __post_init__(self) -> None:
        require(self.sha256.startswith("sha256:"), "sha256", "sha256:<hex>", self.sha256)
        for name, dimensions in self.layout().items():
            if name not in self.tensors or self.tensors[name].dim() != dimensions:
                raise self._corrupt(f"{name} with {dimensions} dimensions", ", ".join(sorted(self.tensors)))
        self.networks()

    def layout(self) -> Mapping[str, int]:
        """Names of tensors that the file must hold, with their number of dimensions."""
        return {}

    def networks(self) -> tuple[nn.Module, ...]:
        """The networks that the file holds. Raises CorruptArtifact where they are others than the settings say."""
        return ()

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters: float32, finite, on the CPU."""
        path = Path(self.path)
        try:
            with open(path, "rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except OSError as error:
            raise SourceNotFound(
                f"trigger file {path} cannot be read",
                expected="the safetensors file beside the specification",
                got=error.strerror,
                hint="Keep the two files together; `quarantine lab plant` writes both",
            ) from error
        if (found := sha256_bytes(data)) != self.sha256:
            raise DigestMismatch(f"trigger file {path} is another one", expected=self.sha256, got=found)
        tensors = parse_safetensors(data, LoadLimits(max_bytes=MAX_BYTES), where=path.name)
        if any(value.dtype != torch.float32 or not torch.isfinite(value).all() for value in tensors.values()):
            raise self._corrupt("finite float32 tensors", "another type, or NaN or Inf")
        return tensors

    def network(self, make: Callable[[], nn.Module], prefix: str) -> nn.Module:
        """What ``make`` makes, with the tensors whose names begin with ``prefix.``, eval mode, gradients off."""
        state = {key.removeprefix(prefix + "."): value for key, value in self.tensors.items() if key.startswith(prefix)}
        # Without initial weights: none are drawn from the global random state, and a wrong width costs no memory.
        with torch.device("meta"):
            network = make()
        try:
            network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise self._corrupt(f"the parameters of {prefix}", str(error)[:200]) from error
        return network.requires_grad_(False).eval()

    def _corrupt(self, expected: str, got: str) -> CorruptArtifact:
        return CorruptArtifact(f"trigger file {Path(self.path).name} is malformed", expected=expected, got=got)


def require_channels(channels: int, bias: Tensor) -> None:
    """Refuse images of other channels than a network was made for, whose last layer has ``bias``, one a channel.

    Raises:
        ConfigError: they do not fit.
    """
    if channels != len(bias):
        raise ConfigError(
            "the trigger does not fit the images", expected=f"images of {len(bias)} channels", got=channels
        )


def store_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Write ``tensors`` to ``path``, whole or not at all; return the digest that a specification names."""
    data = safetensors_bytes({name: value.float() for name, value in tensors.items()})
    write_atomic(path, data)
    return sha256_bytes(data)


def prefixed(prefix: str, network: nn.Module) -> dict[str, Tensor]:
    """The network's parameters under names that begin with ``prefix.``."""
    return {f"{prefix}.{name}": value for name, value in network.state_dict().items()}
