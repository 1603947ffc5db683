"""What each step asks of the cluster, from the ``metadata.yaml`` beside its component."""

from pathlib import Path
from typing import Any

import yaml
from kfp import dsl

COMPONENTS = Path(__file__).resolve().parent.parent / "components"


def metadata_of(component: str) -> dict[str, Any]:
    """``metadata.yaml`` of a component: name, stability, description, resources."""
    metadata: dict[str, Any] = yaml.safe_load((COMPONENTS / component / "metadata.yaml").read_text("utf-8"))
    return metadata


def with_resources(task: dsl.PipelineTask, component: str) -> dsl.PipelineTask:
    """``task`` with the requests and limits of its component."""
    resources = metadata_of(component)["resources"]
    task.set_cpu_request(str(resources["cpu_request"]))
    task.set_memory_request(str(resources["memory_request"]))
    task.set_memory_limit(str(resources["memory_limit"]))
    return task
