"""What one step's pod may be given: resources, place, time, identity and secrets, checked field by field.

Only the values are checked here; how they fit together, and what a step may reach, is checked by
:mod:`pipelines.node_pools`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from defense_core.config import require
from defense_core.errors import ConfigError
from pipelines.pod_secrets import Secret, ServiceAccount, is_name

Effect = Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]
Operator = Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]

_PART = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_LABEL_KEY = re.compile(rf"({_PART}(\.{_PART})*/)?{_WORD}")
_LABEL_VALUE = re.compile(rf"({_WORD})?")
_EXTENDED = re.compile(rf"{_PART}(\.{_PART})*/{_WORD}")
# What KFP and Kubernetes both take: KFP knows no "k" and no fraction, Kubernetes knows no "K".
_MEMORY = re.compile(r"(?P<number>[1-9][0-9]*)(?P<unit>Ki|Mi|Gi|Ti|Pi|M|G|T|P)?")
_CPU = re.compile(r"(?P<number>[0-9]+(\.[0-9]{1,3})?|[0-9]+(?=m))(?P<milli>m)?")
_UNITS = {None: 1, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGTP", start=1)}
_IMAGE = re.compile(r"[a-z0-9][a-z0-9._:/-]*(@sha256:[0-9a-f]{64})?")
MAX_SECONDS = 30 * 24 * 3600


def memory_bytes(text: str) -> int:
    """Bytes in a quantity of memory such as ``8Gi``. Raises ConfigError."""
    found = _MEMORY.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"{text!r} is no amount of memory",
            expected="a whole number with Ki, Mi, Gi, Ti, Pi, M, G, T or P",
            got=repr(text),
            hint="Write 512Mi for half a gibibyte; K and k are not taken, because KFP and Kubernetes disagree on them",
        )
    return int(found["number"]) * _UNITS[found["unit"]]


def cpu_cores(text: str) -> Decimal:
    """Cores in a quantity of processor time such as ``2`` or ``500m``. Raises ConfigError."""
    found = _CPU.fullmatch(text)
    cores = Decimal(found["number"]) / (1000 if found["milli"] else 1) if found is not None else Decimal(0)
    if cores <= 0 or (found is not None and found["milli"] and "." in found["number"]):
        raise ConfigError(
            f"{text!r} is no number of cores",
            expected="a number with up to three decimals, or whole thousandths with m",
            got=repr(text),
            hint="Write '2' for two cores, 500m for half of one, in quotes where it is a bare number",
        )
    return cores


@dataclass(frozen=True)
class Accelerator:
    """Devices of one kind.

    Attributes:
        type: the resource's name on the node, such as ``nvidia.com/gpu``.
        count: how many; 0 asks for none, where the default asks for some.
    """

    type: str
    count: int = 1

    def __post_init__(self) -> None:
        require(bool(_EXTENDED.fullmatch(self.type)), "accelerator.type", "a name like nvidia.com/gpu", repr(self.type))
        require(0 <= self.count <= 64, "accelerator.count", "0 to 64", self.count)

    def __str__(self) -> str:
        return f"{self.type}={self.count}"


@dataclass(frozen=True)
class Requirement:
    """One condition on a node's label."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(bool(_LABEL_KEY.fullmatch(self.key)), "affinity.match.key", "a label's name", repr(self.key))
        if self.operator in ("Exists", "DoesNotExist"):
            require(not self.values, "affinity.match.values", f"none with {self.operator}", list(self.values))
        elif self.operator in ("Gt", "Lt"):
            whole = len(self.values) == 1 and self.values[0].isdecimal()
            require(whole, "affinity.match.values", f"one whole number with {self.operator}", list(self.values))
        else:
            require(bool(self.values), "affinity.match.values", f"at least one with {self.operator}", "none")
        check_label_values("affinity.match.values", self.values)


@dataclass(frozen=True)
class AffinityTerm:
    """Conditions that a node meets together.

    Attributes:
        match: all of them must hold.
        weight: 1 to 100 makes the term a wish; without it, a node must meet one of the terms that have none.
    """

    match: tuple[Requirement, ...]
    weight: int | None = None

    def __post_init__(self) -> None:
        require(bool(self.match), "affinity.match", "at least one condition", "none")
        require(self.weight is None or 1 <= self.weight <= 100, "affinity.weight", "1 to 100", self.weight)


@dataclass(frozen=True)
class Toleration:
    """A taint that the pod puts up with."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Effect | None = None
    toleration_seconds: int | None = None

    def __post_init__(self) -> None:
        named = bool(_LABEL_KEY.fullmatch(self.key)) or (not self.key and self.operator == "Exists")
        require(named, "tolerations.key", "a taint's name (none only with Exists)", repr(self.key))
        require(self.operator == "Equal" or not self.value, "tolerations.value", "none with Exists", repr(self.value))
        check_label_values("tolerations.value", (self.value,))
        timed = self.toleration_seconds is None or self.effect == "NoExecute"
        require(timed, "tolerations.toleration_seconds", "none but with NoExecute", self.toleration_seconds)


@dataclass(frozen=True)
class Retries:
    """Further attempts after a failure.

    Attributes:
        count: how many.
        backoff_s: wait before the first.
        factor: by which each wait is longer than the one before; a whole number, because Argo takes no other.
        queue_s: how long all attempts together may wait for a node.
    """

    count: int
    backoff_s: int = 30
    factor: int = 2
    queue_s: int = 24 * 3600

    def __post_init__(self) -> None:
        require(0 <= self.count <= 10, "retries.count", "0 to 10", self.count)
        require(0 <= self.backoff_s <= 3600, "retries.backoff_s", "0 to 3600", self.backoff_s)
        require(1 <= self.factor <= 10, "retries.factor", "1 to 10", self.factor)
        require(0 <= self.queue_s <= MAX_SECONDS, "retries.queue_s", f"0 to {MAX_SECONDS}", self.queue_s)

    def longest_s(self, timeout_s: int) -> int:
        """Time that all attempts, the waits between them and those for a node can take."""
        waits = sum(self.backoff_s * int(self.factor**attempt) for attempt in range(self.count))
        return (self.count + 1) * timeout_s + waits + self.queue_s


@dataclass(frozen=True)
class PodSettings:
    """What a step's pod is given; ``None`` leaves the field to the default.

    Attributes:
        image: that the step runs in, where it is not the pipeline's own; ``name@sha256:…`` goes into evidence.
        accelerator, node_selector, affinity, tolerations: where the pod runs.
        cpu_request, cpu_limit, memory_request, memory_limit, shared_memory: quantities.
        timeout_s: of one attempt, from its start on a node; 0: none.
        retries: need a timeout.
        service_account, priority_class: set by the admission policy that is compiled beside the pipeline.
        image_pull_secrets: names.
        environment: variables that are no secrets.
        secrets: see :class:`pipelines.pod_secrets.Secret`.
        run_as_non_root: whether the cluster refuses an image that runs as root; true by default.
    """

    image: str | None = None
    accelerator: Accelerator | None = None
    node_selector: Mapping[str, str] | None = None
    affinity: tuple[AffinityTerm, ...] | None = None
    tolerations: tuple[Toleration, ...] | None = None
    cpu_request: str | None = None
    cpu_limit: str | None = None
    memory_request: str | None = None
    memory_limit: str | None = None
    shared_memory: str | None = None
    timeout_s: int | None = None
    retries: Retries | None = None
    service_account: ServiceAccount | None = None
    image_pull_secrets: tuple[str, ...] | None = None
    priority_class: str | None = None
    environment: Mapping[str, str] | None = None
    secrets: tuple[Secret, ...] | None = None
    run_as_non_root: bool | None = None

    def __post_init__(self) -> None:
        for text in filter(None, (self.cpu_request, self.cpu_limit)):
            cpu_cores(text)
        for text in filter(None, (self.memory_request, self.memory_limit, self.shared_memory)):
            memory_bytes(text)
        named = self.image is None or bool(_IMAGE.fullmatch(self.image))
        require(named, "image", "a name, with a tag or with @sha256: and 64 digits", repr(self.image))
        fits = self.timeout_s is None or 0 <= self.timeout_s <= MAX_SECONDS
        require(fits, "timeout_s", f"0 (none) to {MAX_SECONDS}", self.timeout_s)
        for name in (self.priority_class or "none", *(self.image_pull_secrets or ())):
            require(is_name(name), "priority_class and image_pull_secrets", "names of Kubernetes objects", repr(name))
        for key in self.node_selector or {}:
            require(bool(_LABEL_KEY.fullmatch(key)), "node_selector", "names of labels", repr(key))
        check_label_values("node_selector", tuple((self.node_selector or {}).values()))


def check_label_values(field: str, values: tuple[str, ...]) -> None:
    """Raise ConfigError where one cannot be a label's value."""
    for value in values:
        require(bool(_LABEL_VALUE.fullmatch(value)), field, "at most 63 letters, digits, '-', '_' and '.'", repr(value))
