"""Checkpoints of purifications on the artifact store: ``<evidence>/.checkpoints/<work>/``.

They lie under the work's own name, not the run's: a pod that is started again finds them, and so does a new run
of the same work after the old one was lost with its node. Work of the same name ends with the same bytes, so two
runs of it that go on at the same time do not harm each other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from components._runtime.addresses import local_path, split_address
from defense_core.checkpoints import NO_CHECKPOINTS, Checkpoints
from defense_core.errors import ConfigError, QuarantineError, SourceNotFound

if TYPE_CHECKING:
    from components._runtime.s3_connection import S3Location, S3Settings
    from defense_core.stored_checkpoints import CheckpointFiles

FOLDER = ".checkpoints"
"""No run has a name that begins with a dot."""
INTERVAL_VARIABLE = "QUARANTINE_CHECKPOINT_S"
"""Seconds from one checkpoint to the next; 0 writes none and uses none."""
SECRET_VARIABLE = "QUARANTINE_CHECKPOINT_SECRET"  # noqa: S105 - the variable's name
"""What seals checkpoints, so that a writer of the store cannot put weights of their own there."""
DEFAULT_INTERVAL_S = 60.0
MAX_OBJECT_BYTES = 5 << 30
"""What S3 takes in one request."""

logger = logging.getLogger("quarantine")


@dataclass
class StepCheckpoints:
    """The checkpoints of one step, which does one piece of work.

    Attributes:
        root: of the evidence store, a path, ``file://…`` or ``s3://bucket/prefix``.
        interval_s: seconds from one to the next; 0: none.
        secret: seals them; empty: nothing does.
    """

    root: str
    interval_s: float = DEFAULT_INTERVAL_S
    secret: bytes = field(default=b"", repr=False)
    _files: CheckpointFiles | None = field(default=None, init=False)

    def of_work(self, key: str) -> Checkpoints:
        """Checkpoints of the work called ``key``; see :func:`defense_core.stored_checkpoints.work_key`.

        Raises:
            ConfigError: the store's address is not usable.
        """
        if not self.interval_s:
            return NO_CHECKPOINTS
        from defense_core.stored_checkpoints import StoredCheckpoints

        self._files = files_below(f"{self.root.rstrip('/')}/{FOLDER}/{key.removeprefix('sha256:')}")
        return StoredCheckpoints(self._files, key=key, interval_s=self.interval_s, secret=self.secret)

    def clear(self) -> None:
        """Remove them: the step has finished. A store that refuses is a line in the log; the step has its result."""
        if self._files is None:
            return
        try:
            self._files.clear()
        except QuarantineError as error:
            logger.warning("checkpoints were not removed, remove them by hand: %s", error)


def step_checkpoints(root: str, environment: Mapping[str, str] | None = None) -> StepCheckpoints:
    """Checkpoints below the evidence store ``root``, as the environment wants them.

    Raises:
        ConfigError: the interval is no number of seconds.
    """
    given = os.environ if environment is None else environment
    text = given.get(INTERVAL_VARIABLE) or str(DEFAULT_INTERVAL_S)
    try:
        interval_s = float(text)
    except ValueError:
        interval_s = -1.0
    if not 0 <= interval_s < float("inf"):
        raise ConfigError(f"{INTERVAL_VARIABLE} is malformed", expected="seconds, 0 or more", got=repr(text))
    return StepCheckpoints(root, interval_s, given.get(SECRET_VARIABLE, "").encode())


def files_below(address: str) -> CheckpointFiles:
    """The files of one piece of work in the folder or under the prefix ``address``. Raises ConfigError."""
    if split_address(address).scheme != "s3":
        from defense_core.stored_checkpoints import CheckpointFolder

        return CheckpointFolder(local_path(address))
    # boto3 is imported only where records lie in S3.
    from components._runtime.s3_connection import S3Settings, parse_s3_uri

    prefix = parse_s3_uri(f"{address}/")
    return _S3Files(prefix, S3Settings.from_environment())


@dataclass(frozen=True)
class _S3Files:
    """Objects under ``prefix``, whose key ends with a slash. S3 shows an object whole or not at all."""

    prefix: S3Location
    settings: S3Settings

    def read(self, name: str) -> bytes | None:
        from components._runtime.s3 import read_bytes

        try:
            return read_bytes(self._at(name), self.settings, max_bytes=MAX_OBJECT_BYTES)
        except SourceNotFound:
            return None

    def write(self, name: str, data: bytes) -> None:
        from components._runtime.s3 import upload_bytes

        upload_bytes(data, self._at(name), self.settings)

    def clear(self) -> None:
        from components._runtime.s3 import delete_objects

        delete_objects(self.prefix, self.settings)

    def _at(self, name: str) -> S3Location:
        from components._runtime.s3_connection import S3Location

        return S3Location(self.prefix.bucket, self.prefix.key + name)
