"""The webhook's secrets, from the environment and from files that may change while the hook runs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from defense_core.errors import ConfigError

VARIABLES = ("QUARANTINE_HOOK_SECRET", "QUARANTINE_HOOK_SECRET_PREVIOUS")
MIN_SECRET_BYTES = 16
RELOAD_S = 1.0


class Secrets:
    """All secrets that count now. Calling it reads a changed file again, at most once a second.

    Args:
        fixed: secrets that do not change.
        files: one secret each, white space around it dropped. An empty file counts as none, so that a
            second file may stand ready for the next rotation.

    Raises:
        ConfigError: no secret at all, or one that is short enough to be guessed.
    """

    def __init__(
        self, fixed: Sequence[str] = (), files: Sequence[Path] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._fixed = tuple(_checked(each, "the environment") for each in fixed)
        self._files = tuple(files)
        self._clock = clock
        self._read: dict[Path, tuple[tuple[int, int, int], bytes]] = {}
        self._checked_at = clock()
        self._current = self._gather()
        if not self._current:
            raise ConfigError(
                "the hook has no secret",
                expected=f"{VARIABLES[0]}, or a file that --secret-file names",
                got="none",
                hint="Give the hook the secret that the webhook was registered with",
            )

    @classmethod
    def from_environment(cls, files: Sequence[Path] = (), environment: Mapping[str, str] | None = None) -> Secrets:
        """Secrets of ``QUARANTINE_HOOK_SECRET``, ``QUARANTINE_HOOK_SECRET_PREVIOUS`` and ``files``."""
        values = os.environ if environment is None else environment
        return cls([values[name] for name in VARIABLES if values.get(name)], files)

    def __call__(self) -> Sequence[bytes]:
        """The secrets, each at least 16 bytes; never none."""
        if self._files and self._clock() - self._checked_at >= RELOAD_S:
            self._checked_at = self._clock()
            # A rotation that takes the last secret away is a mistake of the moment: the known ones go on counting.
            self._current = self._gather() or self._current
        return self._current

    def _gather(self) -> tuple[bytes, ...]:
        found = (*self._fixed, *(secret for path in self._files if (secret := self._secret(path))))
        return tuple(dict.fromkeys(found))

    def _secret(self, path: Path) -> bytes:
        try:
            status = path.stat()
            stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
            known = self._read.get(path)
            if known is None or known[0] != stamp:
                text = path.read_text("utf-8").strip()
                known = self._read[path] = (stamp, _checked(text, str(path)) if text else b"")
        except (OSError, UnicodeDecodeError, ConfigError) as error:
            if path in self._read:
                return self._read[path][1]  # half-way through being replaced
            raise ConfigError(
                f"secret file {path} is not usable",
                expected=f"a readable file with one secret of at least {MIN_SECRET_BYTES} bytes",
                got=error.strerror if isinstance(error, OSError) else type(error).__name__,
            ) from None
        return known[1]


def _checked(text: str, where: str) -> bytes:
    secret = text.encode()
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(
            f"the hook's secret in {where} is too short",
            expected=f"at least {MIN_SECRET_BYTES} bytes",
            got=f"{len(secret)} bytes",
            hint="Make one with: openssl rand -hex 32",
        )
    return secret
