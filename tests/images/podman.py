"""Podman as the container tests use it: images, containers, and the service that speaks Docker's API."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
BASE_VARIABLE = "QUARANTINE_TEST_BASE_IMAGE"
"""Environment variable: the local base image that `make image-base` made, or one of the machine's own."""
IMAGES_VARIABLE = "QUARANTINE_TEST_IMAGES"
"""Environment variable: ``keep`` leaves the images of this run, ``reuse`` tests those; for work on the tests."""
DEFAULT_BASE = "localhost/model-quarantine-base:bookworm"
NAME = "localhost/model-quarantine-test"
SBOM_INSIDE = "/opt/quarantine/share/image.cdx.json"
# Defaults of a container engine ask for more than an unprivileged machine may give.
LIMITS = ("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096")
CONFINED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")


def podman(*arguments: str, check: bool = True, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run podman; what it printed is in the error where it fails."""
    done = subprocess.run(
        ["podman", *arguments], check=False, capture_output=True, text=True, errors="replace", timeout=timeout_s
    )
    if check and done.returncode:
        raise AssertionError(
            f"podman {' '.join(arguments)}: {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return done


def base_image() -> str:
    """The base that images are built on here."""
    return os.environ.get(BASE_VARIABLE, DEFAULT_BASE)


@dataclass(frozen=True)
class Image:
    """A built image.

    Attributes:
        name: with tag.
        sbom: the copy that the build left outside.
        seconds: that building took.
    """

    name: str
    sbom: Path
    seconds: float

    def inspect(self) -> dict[str, Any]:
        """What podman knows about it."""
        found: dict[str, Any] = json.loads(podman("image", "inspect", self.name).stdout)[0]
        return found

    def remove(self) -> None:
        """Delete it, unless the environment says that it is needed again."""
        if not os.environ.get(IMAGES_VARIABLE):
            podman("image", "rm", "--force", self.name)

    def run(self, *command: str, options: Sequence[str] = (), check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``command`` confined: read-only root, no capability, no network, the image's own user."""
        return podman(
            "run", "--rm", "--pull=never", *LIMITS, *CONFINED, *options, self.name, *command, check=check, timeout_s=900
        )


def build(flavour: str, folder: Path) -> Image:
    """Build by images/build.sh, as `make images` does."""
    started = time.monotonic()
    suffix = "" if flavour == "cpu" else f"-{flavour}"
    sbom = folder / f"{flavour}.cdx.json"
    if os.environ.get(IMAGES_VARIABLE) == "reuse":
        image = Image(f"{NAME}{suffix}:test", sbom, 0.0)
        sbom.write_text(image.run("cat", SBOM_INSIDE).stdout)
        return image
    variables = {"BUILDER": "podman", "BASE_IMAGE": base_image(), "NAME": NAME, "TAG": "test", "SBOM_DIR": str(folder)}
    # Without root or a bridge the build's own network cannot be had; the host's can. Layers would fill the disk.
    further = f"--network host --pull-never --layers=false {' '.join(LIMITS)} {os.environ.get('BUILD_OPTIONS', '')}"
    with open(folder / f"{flavour}.log", "w") as log:
        done = subprocess.run(
            ["bash", str(ROOT / "images" / "build.sh"), flavour],
            check=False,
            env={**os.environ, **variables, "BUILD_OPTIONS": further},
            stdout=log,
            stderr=subprocess.STDOUT,
            timeout=3600,
        )
    assert done.returncode == 0, (folder / f"{flavour}.log").read_text()[-4000:]
    return Image(f"{NAME}{suffix}:test", sbom, time.monotonic() - started)


@contextmanager
def docker_service(folder: Path) -> Iterator[str]:
    """Podman's service on a socket in ``folder``; the address for DOCKER_HOST."""
    socket = folder / "podman.sock"
    address = f"unix://{socket}"
    with (
        open(folder / "service.log", "w") as log,
        subprocess.Popen(
            ["podman", "system", "service", "--time", "0", address], stdout=log, stderr=subprocess.STDOUT
        ) as service,
    ):
        try:
            deadline = time.monotonic() + 30
            while not socket.exists():
                assert service.poll() is None, (folder / "service.log").read_text()
                assert time.monotonic() < deadline, "podman's service does not start"
                time.sleep(0.1)
            yield address
        finally:
            service.terminate()
