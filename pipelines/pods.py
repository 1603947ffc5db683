"""Node pools on KFP tasks: what KFP and kfp-kubernetes can say in the compiled pipeline.

What they cannot say, a step's service account and priority class, becomes annotations of its pod, which the
admission policy of :mod:`pipelines.admission` turns into fields.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from kfp import dsl, kubernetes

from components._runtime.evidence import IMAGE_DIGEST_VARIABLE
from components._runtime.pod import ACCELERATOR_VARIABLE, ACCOUNT_VARIABLE, ASKED_ACCOUNT_VARIABLE
from pipelines.admission import ACCOUNT_ANNOTATION, PRIORITY_ANNOTATION, STEP_LABEL
from pipelines.node_pools import FORMAT, NodePools
from pipelines.pod_secrets import SHARED_MEMORY_VOLUME, Secret
from pipelines.pod_settings import PodSettings

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where PyTorch looks for it; the pod's own

# KFP runs a pipeline's function while it compiles it, and hands it nothing but the pipeline's parameters.
_POOLS: ContextVar[NodePools | None] = ContextVar("node_pools", default=None)


@contextmanager
def compiled_for(pools: NodePools | None) -> Iterator[None]:
    """Inside the block, pipelines that are defined get the pods of ``pools``."""
    token = _POOLS.set(pools)
    try:
        yield
    finally:
        _POOLS.reset(token)


def configure(task: dsl.PipelineTask, component: str) -> dsl.PipelineTask:
    """``task`` with the pod of its component. Without node pools: the requests and limits of its metadata, no more."""
    pools = _POOLS.get()
    settings = (pools or NodePools(FORMAT)).for_step(component)
    _set_resources(task, settings)
    if pools is not None:
        _place(task, settings)
        _bound(task, settings)
        _identify(task, settings, component)
        _hand_over(task, settings)
    return task


def _set_resources(task: dsl.PipelineTask, settings: PodSettings) -> None:
    for value, apply in (
        (settings.cpu_request, task.set_cpu_request),
        (settings.cpu_limit, task.set_cpu_limit),
        (settings.memory_request, task.set_memory_request),
        (settings.memory_limit, task.set_memory_limit),
    ):
        if value is not None:
            apply(value)
    if settings.accelerator is not None and settings.accelerator.count:
        task.set_accelerator_type(settings.accelerator.type)
        task.set_accelerator_limit(settings.accelerator.count)
        # Evidence then says what the step was given as well as what it ran on.
        task.set_env_variable(ACCELERATOR_VARIABLE, str(settings.accelerator))
    if settings.shared_memory is not None:
        kubernetes.empty_dir_mount(
            task, SHARED_MEMORY_VOLUME, SHARED_MEMORY, medium="Memory", size_limit=settings.shared_memory
        )


def _place(task: dsl.PipelineTask, settings: PodSettings) -> None:
    # Never add_node_selector_json beside it: the backend then drops these labels.
    for key, value in (settings.node_selector or {}).items():
        kubernetes.add_node_selector(task, key, value)
    for term in settings.affinity or ():
        match = [{"key": each.key, "operator": each.operator, "values": list(each.values)} for each in term.match]
        kubernetes.add_node_affinity(task, match_expressions=match, weight=term.weight)
    for each in settings.tolerations or ():
        kubernetes.add_toleration(
            task,
            key=each.key or None,
            operator=each.operator,
            value=each.value or None,
            effect=each.effect,
            toleration_seconds=each.toleration_seconds,
        )


def _bound(task: dsl.PipelineTask, settings: PodSettings) -> None:
    if settings.timeout_s:
        kubernetes.set_timeout(task, settings.timeout_s)
    retries = settings.retries
    if retries is not None and retries.count and settings.timeout_s:
        # Argo counts backoff_max_duration from the first start of the step, not per wait: with KFP's default of an
        # hour, a step that is preempted in its second hour would not be started again.
        task.set_retry(
            retries.count,
            backoff_duration=f"{retries.backoff_s}s",
            backoff_factor=float(retries.factor),
            backoff_max_duration=f"{retries.longest_s(settings.timeout_s)}s",
        )


def _identify(task: dsl.PipelineTask, settings: PodSettings, component: str) -> None:
    kubernetes.add_pod_label(task, STEP_LABEL, component.replace("_", "-"))
    if settings.service_account is not None:
        kubernetes.add_pod_annotation(task, ACCOUNT_ANNOTATION, settings.service_account.name)
        task.set_env_variable(ASKED_ACCOUNT_VARIABLE, settings.service_account.name)
        kubernetes.use_field_path_as_env(task, ACCOUNT_VARIABLE, "spec.serviceAccountName")
    if settings.priority_class is not None:
        kubernetes.add_pod_annotation(task, PRIORITY_ANNOTATION, settings.priority_class)
    if settings.run_as_non_root is not False:
        kubernetes.set_security_context(task, run_as_non_root=True)
    if settings.image is not None:
        task.set_container_image(settings.image)
        _, _, digest = settings.image.partition("@")
        if digest:
            task.set_env_variable(IMAGE_DIGEST_VARIABLE, digest)
    if settings.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(settings.image_pull_secrets))


def _hand_over(task: dsl.PipelineTask, settings: PodSettings) -> None:
    for name, value in (settings.environment or {}).items():
        task.set_env_variable(name, value)
    for secret in settings.secrets or ():
        _hand_over_secret(task, secret)


def _hand_over_secret(task: dsl.PipelineTask, secret: Secret) -> None:
    # One call a variable: kfp-kubernetes maps key → variable, and one key may fill two variables.
    for variable, key in secret.environment.items():
        kubernetes.use_secret_as_env(task, secret.secret, {key: variable})
    if secret.mount:
        kubernetes.use_secret_as_volume(task, secret.secret, secret.mount)
    for variable, file in secret.paths.items():
        task.set_env_variable(variable, f"{secret.mount}/{file}")
