"""Run the pipeline with every step in its container: ``python -m tests.images.container_worker REQUEST.json``.

kfp.local's DockerRunner lets the engine remove a container as soon as it has ended, and takes "no such container" for
success. Over podman that hides failures, so containers are removed here, after their exit code is known.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from docker.types import Ulimit
from kfp import local
from kfp.local import docker_task_handler


def run_container(client: Any, image: str, command: list[str], volumes: dict[str, Any], **arguments: Any) -> int:
    """What the DockerRunner calls; the container's own exit code, whatever happens."""
    _hand_over(Path(asked["root"]))
    # A lookup by the plain name would go to a registry; the image under test stands in for it.
    assert image.startswith("model-quarantine:"), image
    work = str(asked["work"])
    # Whatever else uses the engine's storage keeps it locked meanwhile.
    client.api.timeout = 600
    container = client.containers.create(
        image=asked["image"],
        command=command,
        volumes={**volumes, work: {"bind": work, "mode": "rw"}},
        **arguments,
    )
    try:
        container.start()
        for line in container.logs(stream=True, follow=True):
            sys.stdout.write(line.decode(errors="replace"))
        code = int(container.wait()["StatusCode"])
        state = client.api.inspect_container(container.id)
        record = {"code": code, "image": state["Image"], "user": state["Config"]["User"], "host": state["HostConfig"]}
        with open(Path(asked["root"]) / "containers.jsonl", "a", encoding="utf-8") as sink:
            sink.write(json.dumps(record) + "\n")
        return code
    finally:
        container.remove(force=True)


def _hand_over(root: Path) -> None:
    """Let the container's user write where kfp, on this side, has just made folders."""
    for path in [root, *root.rglob("*")]:
        if path.is_dir() and path.stat().st_uid == os.getuid():
            path.chmod(0o777)


def main() -> int:
    """Run; always 0 once kfp has come back, as the caller reads the run's records."""
    warnings.simplefilter("ignore")
    docker_task_handler.run_docker_container = run_container
    local.init(
        runner=local.DockerRunner(
            environment=asked["environment"],
            read_only=True,
            cap_drop=["ALL"],
            network_mode=asked["network"],
            # The service asks for more than an unprivileged machine may give.
            ulimits=[Ulimit(name=name, soft=4096, hard=4096) for name in ("nofile", "nproc")],
            tmpfs={"/tmp": "size=2g,mode=1777"},
        ),
        pipeline_root=asked["root"],
        workspace_root=asked["workspace"],
        raise_on_error=False,
    )
    from pipelines.quarantine import quarantine

    quarantine(**asked["arguments"])
    return 0


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    sys.exit(main())
