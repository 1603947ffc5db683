"""Secrets and identities of a step's pod: named, never written out, and each with the rights that it carries.

A right is one of the things that components reach, in the words of their ``metadata.yaml``
(``evidence store``, ``MLflow registry``, ``signing key``…). A step may be given a right only if it reaches that thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from defense_core.config import require
from defense_core.errors import ConfigError

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_VOLUME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FILE = re.compile(r"[-._a-zA-Z0-9]+")
_TELLS_A_SECRET = re.compile(r"(?i)secret|passw|token|credential|private|signing|access_?key|api_?key|cookie")
_SECRET_VALUE = re.compile(r"://[^/@\s]+@|-----BEGIN|\b(AKIA|ASIA)[0-9A-Z]{16}\b|(?i:x-amz-signature=)")
# Names that this project, KFP or Argo set in the same container.
_RESERVED = re.compile(r"(KFP|ARGO)_.*|QUARANTINE_(ACCELERATOR|SERVICE_ACCOUNT(_ASKED)?)")

SHARED_MEMORY_VOLUME = "shared-memory"
_TAKEN_VOLUMES = re.compile(r"kfp-.*|(gcs|s3|minio|dot-(local|cache|config))-scratch|custom-ca|" + SHARED_MEMORY_VOLUME)

SIGNING, TRUST = "signing key", "public key"
STORAGE = frozenset({"model source", "evidence store", "MLflow tracking", "MLflow registry"})
MLFLOW = frozenset({"model source", "MLflow tracking", "MLflow registry"})
_RIGHTS_OF_VARIABLE = (
    (re.compile(r"QUARANTINE_SIGNING_.*"), frozenset({SIGNING})),
    # No secret, but whoever writes it says whose signature promotion lets pass.
    (re.compile(r"QUARANTINE_(PUBLIC_KEY|CERTIFICATE_CHAIN|SIGNER)"), frozenset({TRUST})),
    (re.compile(r"MLFLOW_.*"), MLFLOW),
    (re.compile(r"AWS_.*"), STORAGE),
)


@dataclass(frozen=True)
class ServiceAccount:
    """The Kubernetes identity of a pod.

    Attributes:
        name: of the service account.
        grants: what it opens by itself (IRSA, workload identity); empty where it opens nothing.
    """

    name: str
    grants: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(is_name(self.name), "service_account.name", "a service account's name", repr(self.name))
        _check_distinct("service_account.grants", self.grants)


@dataclass(frozen=True)
class Secret:
    """A Kubernetes secret, as variables, as files, or both.

    Attributes:
        secret: its name; never a value.
        grants: what it opens.
        environment: variable → key of the secret.
        mount: folder that every key becomes a file in; empty: no files.
        paths: variable → file in ``mount``, for settings that want a path.
    """

    secret: str
    grants: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    mount: str = ""
    paths: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(is_name(self.secret), "secrets.secret", "the name of a Kubernetes secret", repr(self.secret))
        require(bool(self.grants), "secrets.grants", "what the secret opens, at least one thing", "nothing")
        require(bool(self.environment or self.mount), "secrets", "environment, mount or both", "neither")
        require(bool(self.mount) or not self.paths, "secrets.paths", "a mount that they lie in", "no mount")
        _check_distinct("secrets.grants", self.grants)
        for variable, entry in (*self.environment.items(), *self.paths.items()):
            # Not shown: who writes the secret's value here instead of its key must not find it in a log.
            require(bool(_FILE.fullmatch(entry)), f"key of {variable}", "letters, digits, '-', '_', '.'", "others")
            _check_variable(variable)
            for pattern, rights in _RIGHTS_OF_VARIABLE:
                if pattern.fullmatch(variable):
                    wanted = "one of " + ", ".join(sorted(rights))
                    require(bool(rights & set(self.grants)), f"grants of {variable}", wanted, ", ".join(self.grants))
        if self.mount:
            self._check_mount()

    def _check_mount(self) -> None:
        path = PurePosixPath(self.mount)
        plain = path.is_absolute() and str(path) == self.mount and ".." not in path.parts and len(path.parts) > 2
        require(plain, "secrets.mount", "an absolute folder below another one", repr(self.mount))
        # KFP calls the volume as the secret is called, and a volume's name knows no dots.
        free = _VOLUME.fullmatch(self.secret) and len(self.secret) < 64 and not _TAKEN_VOLUMES.fullmatch(self.secret)
        require(bool(free), "secrets.secret", "a mounted secret's name without dots, of up to 63", repr(self.secret))


def is_name(text: str) -> bool:
    """Whether Kubernetes takes ``text`` as an object's name."""
    return len(text) <= 253 and bool(_NAME.fullmatch(text))


def check_plain_environment(environment: Mapping[str, str]) -> None:
    """Refuse variables that are or look like secrets: they would stand in the compiled pipeline for all to read.

    Raises:
        ConfigError: without the value.
    """
    for variable, value in environment.items():
        _check_variable(variable)
        if _TELLS_A_SECRET.search(variable) or _SECRET_VALUE.search(value):
            raise ConfigError(
                f"environment.{variable} is a secret",
                expected="a variable that anybody who can read the pipeline may see",
                got="a name or a value as credentials have them",
                hint="Put it into a Kubernetes secret and name that under secrets",
            )


def check_disjoint(secrets: tuple[Secret, ...], plain: Mapping[str, str]) -> None:
    """Raise ConfigError where two sources set one variable, or two secrets one folder or volume."""
    variables = [*plain, *(name for each in secrets for name in (*each.environment, *each.paths))]
    mounted = [each for each in secrets if each.mount]
    for what, names in (
        ("variable", variables),
        ("mount", [each.mount for each in mounted]),
        ("mounted secret", [each.secret for each in mounted]),
    ):
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, f"{what} in environment and secrets", "each once", ", ".join(repeated))


def _check_variable(name: str) -> None:
    free = _VARIABLE.fullmatch(name) and not _RESERVED.fullmatch(name)
    require(bool(free), "environment", "names of variables that are not set by others", repr(name))


def _check_distinct(where: str, values: tuple[str, ...]) -> None:
    require(len(set(values)) == len(values), where, "each once", ", ".join(values))
