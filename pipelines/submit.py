"""Submit a pipeline to a cluster: its definition once per digest, a run once per name."""

from __future__ import annotations

import logging
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kfp_server_api import V2beta1PipelineVersionReference, V2beta1Run, V2beta1RuntimeConfig

from defense_core import __version__
from defense_core.config import canonical_json, digest, require
from defense_core.files import sha256_bytes
from pipelines.kfp_api import KfpClient
from pipelines.kfp_errors import AlreadyThere, AnswerLost, EndpointDenied, RunConflict
from pipelines.kfp_records import PipelineVersion, Run

MAX_NAME = 128
"""Longest name of a run or schedule, characters."""
DEFAULT_EXPERIMENT = "model-quarantine"
LOOKS_AFTER_A_LOST_ANSWER = 4

logger = logging.getLogger("quarantine")

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Package:
    """A compiled pipeline.

    Attributes:
        name: of the pipeline on the cluster.
        data: its intermediate representation, YAML.
    """

    name: str
    data: bytes = field(repr=False)

    @property
    def version_name(self) -> str:
        """``sha256-<hex>`` of ``data``: the same definition always is the same version."""
        return sha256_bytes(self.data).replace(":", "-")


@dataclass(frozen=True)
class RunRequest:
    """One run that is wanted, once.

    Attributes:
        name: the idempotency key; it is also the run's display name. 1 to 128 printable characters.
        version: the uploaded pipeline, from :func:`ensure_version`.
        parameters: pipeline parameters, JSON types.
        experiment: name of the experiment, created if need be. Names are unique within it.
        service_account: Kubernetes account that the pods run as; empty: the installation's own.
    """

    name: str
    version: PipelineVersion
    parameters: Mapping[str, Any]
    experiment: str = DEFAULT_EXPERIMENT
    service_account: str = ""

    def __post_init__(self) -> None:
        require_name(self.name, "run name")
        require_name(self.experiment, "experiment")

    @property
    def description(self) -> str:
        """What the run's description says; the digest shows which runs are the same request."""
        said = {"parameters": dict(self.parameters), "service_account": self.service_account}
        return f"Model Quarantine {__version__}, settings {digest(said)}"


@dataclass(frozen=True)
class SubmittedRun:
    """The one run of a request.

    Attributes:
        created: whether this call made it; ``False``: it was there, or an earlier call had made it.
        differences: which of the request's settings the run was not submitted with.
    """

    run: Run
    created: bool
    differences: tuple[str, ...] = ()

    @property
    def run_id(self) -> str:
        """The cluster's id of the run; also the name of its evidence folder."""
        return self.run.run_id


def require_name(name: str, what: str) -> None:
    """Raise ConfigError unless ``name`` can be a display name that a filter finds again."""
    usable = bool(re.fullmatch(r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]*[^\s\x00-\x1f\x7f])?", name))
    require(usable and len(name) <= MAX_NAME, what, f"1 to {MAX_NAME} printable characters", repr(name)[:160])


def ensure_version(client: KfpClient, package: Package) -> tuple[PipelineVersion, bool]:
    """The version that holds ``package``, and whether it was uploaded now; one that is there is used again.

    Raises:
        KfpError: the endpoint does not do it.
    """
    described = f"Model Quarantine {__version__}"
    pipeline_id = _ensure(
        lambda: client.find_pipeline(package.name) or None,
        lambda: client.create_pipeline(package.name, described),
    )[0]
    with tempfile.TemporaryDirectory(prefix="quarantine-upload-") as folder:
        path = Path(folder) / f"{package.name}.yaml"
        path.write_bytes(package.data)
        return _ensure(
            lambda: client.find_version(pipeline_id, package.version_name),
            lambda: client.upload_version(pipeline_id, package.version_name, path, described),
        )


def ensure_experiment(client: KfpClient, name: str) -> str:
    """The id of the experiment called ``name``, which is created if need be."""
    return _ensure(lambda: client.find_experiment(name) or None, lambda: client.create_experiment(name))[0]


def submit_run(client: KfpClient, request: RunRequest) -> SubmittedRun:
    """Create the run of ``request`` unless it exists: however often this is called, one run is there.

    The KFP API has no idempotency key of its own. The key is the run's display name: it is looked up
    by a filter before a run is created. If the answer to the creation is lost, it is looked up
    again: a run that was created after all is found, and not created a second time. Should
    several processes submit one request at the same moment, each looks once more after creating, all agree on
    the earliest (the endpoint counts whole seconds; then the smallest id), and the others are removed.

    What is left: within such a second, a process may have been told a run that another then removes; asked again, it
    is told the one that stayed. And if a process dies after it has sent a creation which the endpoint carries out only
    after its successor has looked, created and looked again, two are there until the next call for this
    name removes the later one. A queue that gives a request to one worker at a time has only the second case.

    Args:
        client: from :func:`pipelines.kfp_api.connect`.
        request: what is wanted. A run of this name that was submitted with other settings is returned as it
            is, with the names of the settings in ``differences``; nothing is changed.

    Raises:
        EndpointUnreachable: nothing was sent, or (:class:`AnswerLost`) no run of this name is there
            yet though one may be on its way. Call again, later, with the same request.
        KfpError: the endpoint refuses.
    """
    experiment_id = ensure_experiment(client, request.experiment)
    present = client.find_runs(request.name, experiment_id)
    if present:
        return _submitted(_keep_earliest(client, present, request), request, created=False)
    try:
        created = client.create_run(_body(request, experiment_id))
    except AnswerLost as lost:
        return _submitted(_look_again(client, request, experiment_id, lost), request, created=True)
    # A list that does not show the new run yet must not hide it.
    found = {run.run_id: run for run in [*client.find_runs(request.name, experiment_id), created]}
    ordered = sorted(found.values(), key=lambda run: (run.created_at, run.run_id))
    kept = _keep_earliest(client, ordered, request)
    return _submitted(kept, request, created=kept.run_id == created.run_id)


def require_same(submitted: SubmittedRun) -> None:
    """Raise RunConflict where the run of this name was submitted with other settings."""
    if submitted.differences:
        raise RunConflict(
            f"a run called {submitted.run.name} is there with other settings",
            expected="the same settings, or another name",
            got="other " + ", ".join(submitted.differences),
            hint=f"Choose another --name; the present run is {submitted.run_id}",
        )


def same_parameters(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Equality of parameters, where the endpoint may give 0 back as 0.0."""
    return canonical_json(_plain(dict(one))) == canonical_json(_plain(dict(other)))


def _ensure(find: Callable[[], _Found | None], create: Callable[[], _Found]) -> tuple[_Found, bool]:
    """What ``find`` finds, or what is created; whether it was created now."""
    found = find()
    if found is not None:
        return found, False
    try:
        return create(), True
    except (AlreadyThere, AnswerLost):
        # Somebody else was faster, or it was carried out and only the answer is lost.
        found = find()
        if found is None:
            raise
        return found, False


def _body(request: RunRequest, experiment_id: str) -> V2beta1Run:
    return V2beta1Run(
        display_name=request.name,
        description=request.description,
        experiment_id=experiment_id,
        pipeline_version_reference=V2beta1PipelineVersionReference(
            pipeline_id=request.version.pipeline_id, pipeline_version_id=request.version.version_id
        ),
        runtime_config=V2beta1RuntimeConfig(parameters=dict(request.parameters)),
        service_account=request.service_account or None,
    )


def _look_again(client: KfpClient, request: RunRequest, experiment_id: str, lost: AnswerLost) -> Run:
    wait_s = client.settings.retry_wait_s
    for look in range(LOOKS_AFTER_A_LOST_ANSWER):
        if look:
            # The request may still be on its way through the endpoint.
            time.sleep(min(wait_s * 2 ** (look - 1), client.settings.retry_wait_max_s))
        found = client.find_runs(request.name, experiment_id)
        if found:
            logger.info("run %s was created, though the answer was lost", request.name)
            return _keep_earliest(client, found, request)
    raise lost


def _keep_earliest(client: KfpClient, runs: list[Run], request: RunRequest) -> Run:
    """The earliest run; later ones of the same request that still go on are removed."""
    kept, *later = runs
    for run in later:
        if run.description == request.description == kept.description and not run.finished:
            logger.warning("run %s was submitted twice; %s goes, %s stays", run.name, run.run_id, kept.run_id)
            try:
                client.delete_run(run.run_id)
            except EndpointDenied as error:
                # The one that stays is there all the same, and the next call for this name tries again.
                logger.warning("run %s could not be removed: %s", run.run_id, error)
    return kept


def _submitted(run: Run, request: RunRequest, *, created: bool) -> SubmittedRun:
    held = {
        "pipeline version": run.version.version_id == request.version.version_id,
        "parameters": same_parameters(run.parameters, request.parameters),
        "service account": not request.service_account or run.service_account == request.service_account,
    }
    return SubmittedRun(run, created, tuple(name for name, same in held.items() if not same))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
