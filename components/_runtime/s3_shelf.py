"""Records of a run under a prefix in S3. New records use the server's put-if-absent."""

from __future__ import annotations

from dataclasses import dataclass

from components._runtime.s3 import list_keys, read_bytes, upload_bytes
from components._runtime.s3_connection import S3Location, S3Settings, parse_s3_uri


@dataclass(frozen=True)
class S3Shelf:
    """Small objects under ``prefix``, whose key ends with a slash."""

    prefix: S3Location
    settings: S3Settings

    @classmethod
    def open(cls, root: str, run: str) -> S3Shelf:
        """The shelf ``<root>/<run>/``. Raises ConfigError if ``root`` is no ``s3://bucket/prefix``."""
        return cls(parse_s3_uri(f"{root.rstrip('/')}/{run}/"), S3Settings.from_environment())

    def put_new(self, name: str, data: bytes) -> bool:
        """Write unless ``name`` is there; whether it was written."""
        return upload_bytes(data, self._at(name), self.settings, only_if_absent=True)

    def put(self, name: str, data: bytes) -> None:
        """Write over whatever is there."""
        upload_bytes(data, self._at(name), self.settings)

    def get(self, name: str) -> bytes:
        """The content of ``name``."""
        return read_bytes(self._at(name), self.settings)

    def names(self) -> list[str]:
        """Every name, sorted."""
        keys = list_keys(self.prefix, self.settings)
        return sorted(key.removeprefix(self.prefix.key) for key in keys if "/" not in key.removeprefix(self.prefix.key))

    def _at(self, name: str) -> S3Location:
        return S3Location(self.prefix.bucket, self.prefix.key + name)
