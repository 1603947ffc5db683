"""What every image file obeys, checked without building anything."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES = ROOT / "images"
DOCKERFILES = sorted(IMAGES.rglob("*Dockerfile*"))
FLAVOURS = ("cpu", "gpu", "hooks")


def instructions(path: Path) -> list[tuple[str, str]]:
    """(keyword, rest) of every instruction, continued lines joined, comments left out."""
    lines = [line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(line.split()[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def stages(path: Path) -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage; those before the first FROM under the empty name."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    for keyword, rest in instructions(path):
        if keyword == "FROM":
            stage = rest.split()[-1]
            found[stage] = []
        found[stage].append((keyword, rest))
    return found


def test_there_is_an_image_file_with_the_three_targets() -> None:
    assert DOCKERFILES == [IMAGES / "Dockerfile"]
    assert set(FLAVOURS) < set(stages(IMAGES / "Dockerfile"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_base_is_an_argument_and_nothing_else_is_fetched(path: Path) -> None:
    found = stages(path)
    assert [rest.partition("=")[0] for keyword, rest in found[""] if keyword == "ARG"] == ["BASE_IMAGE"]
    default = next(rest.partition("=")[2] for keyword, rest in found[""])
    assert re.fullmatch(r"[a-z]+:\d\S*", default), "a name with a version and without a registry"
    for stage, content in found.items():
        for keyword, rest in content:
            if keyword == "FROM":
                assert rest.split()[0] in {"${BASE_IMAGE}", *found}, stage
            assert keyword != "ADD"
            assert not re.search(r"https?://(?!127\.0\.0\.1)|\bcurl\b|\bwget\b|apt-get install", rest), stage


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_image_runs_as_a_numeric_user_without_an_entry_point(flavour: str) -> None:
    found = stages(IMAGES / "Dockerfile")
    assert found[flavour][0][1].split()[0] == "runtime"
    inherited = found["runtime"] + found[flavour]
    users = [rest for keyword, rest in inherited if keyword == "USER"]
    assert users, "no user"
    assert all(re.fullmatch(r"[1-9]\d*:[1-9]\d*", user) for user in users)
    assert not any(keyword == "ENTRYPOINT" for keyword, _ in inherited)
    copied = [rest for keyword, rest in inherited if keyword == "COPY"]
    assert copied == ["--from=build /opt/quarantine /opt/quarantine"], "the sources and the builder stay behind"


def test_only_hooks_has_a_health_check() -> None:
    found = stages(IMAGES / "Dockerfile")
    assert [stage for stage, content in found.items() if any(k == "HEALTHCHECK" for k, _ in content)] == ["hooks"]


def test_everything_that_pip_installs_is_constrained() -> None:
    runs = [rest for keyword, rest in instructions(IMAGES / "Dockerfile") if keyword == "RUN"]
    commands = [
        each for run in runs for each in run.split("&&") if re.search(r"\bpip (--python \S+ )?(install|wheel)\b", each)
    ]
    assert len(commands) == 4
    for command in commands:
        assert "--no-cache-dir" in command
        assert "--constraint constraints.txt" in command or "--no-deps" in command
    pinned = {
        re.split(r"[=@ ]", line)[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()
    }
    assert {"torch", "cyclonedx-bom", "setuptools"} <= pinned


def test_no_secret_and_no_machine_stands_in_an_image_file() -> None:
    for path in [*DOCKERFILES, IMAGES / "build.sh"]:
        text = path.read_text("utf-8")
        assert not re.search(r"(?i)(password|secret|token|api_?key|access_key)\w*\s*=\s*\S", text), path
        assert not re.search(r"(?:ENV|ARG)\s+\w*(?:PASSWORD|SECRET|TOKEN|KEY)", text), path
    # What is not named here never reaches the builder, so it cannot slip into a layer.
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[0] == "*"
    assert {line for line in ignored if line.startswith("!")} == {
        f"!{name}"
        for name in (
            "constraints.txt",
            "pyproject.toml",
            "README.md",
            "LICENSE",
            "defense_core",
            "components",
            "pipelines",
            "images/*.py",
        )
    }


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert hadolint is not None, "the extra dev installs it"
    for path in DOCKERFILES:
        done = subprocess.run(
            [hadolint, "--no-color", str(path)], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout


def test_the_hooks_image_leaves_out_what_only_steps_import() -> None:
    printed = {
        parts: subprocess.run(
            [sys.executable, str(IMAGES / "requirements.py"), parts],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.split("\n")[:-1]
        for parts in ("jobs", "hooks")
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert printed["jobs"] == project["dependencies"]
    names = {re.split(r"[^A-Za-z0-9._-]", each)[0] for each in printed["hooks"]}
    assert not names & {"torch", "torchvision", "mlflow", "onnx", "pyarrow"}
    assert {"mlflow-skinny", "kfp", "fastapi", "uvicorn", "sqlalchemy"} <= {name.lower() for name in names}


def test_requirements_of_an_unknown_kind_are_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(IMAGES / "requirements.py"), "gpu"],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "expected jobs or hooks" in done.stderr


def build(tmp_path: Path, *flavours: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run build.sh with a builder that only writes down how it was called."""
    calls = tmp_path / "calls"
    builder = tmp_path / "podman"
    builder.write_text(f'#!/bin/bash\nprintf "%s\\n" "$*" >> {calls}\n')
    builder.chmod(0o755)
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "BUILDER": str(builder), "SBOM_DIR": str(tmp_path)}
    done = subprocess.run(
        ["bash", str(IMAGES / "build.sh"), *flavours],
        check=False,
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, calls.read_text().splitlines() if calls.exists() else []


def test_the_build_script_builds_each_target_with_its_own_dependencies(tmp_path: Path) -> None:
    done, calls = build(tmp_path, BASE_IMAGE="python:3.11@sha256:" + "1" * 64, TAG="7", SSL_CERT_FILE="/ca.pem")
    assert done.returncode == 0, done.stderr
    builds = [call for call in calls if call.startswith("build ")]
    expected = [("cpu", "jobs", ""), ("gpu", "jobs", "-gpu"), ("hooks", "hooks", "-hooks")]
    for (flavour, parts, suffix), call in zip(expected, builds, strict=True):
        assert f"--target {flavour} --tag model-quarantine{suffix}:7 " in call
        assert f"FLAVOUR={flavour} --build-arg PARTS={parts} " in call
        assert "--format docker" in call
        assert "--volume /ca.pem:" in call
        assert "BASE_NAME=python:3.11 --build-arg BASE_DIGEST=sha256:111" in call


def test_the_build_script_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done, calls = build(tmp_path, "tpu")
    assert (done.returncode, calls) == (3, [])
    assert "expected cpu, gpu or hooks, got tpu" in done.stderr


@pytest.mark.parametrize(
    ("installed", "engine_runs", "expected"),
    [
        (("docker", "podman", "buildah"), True, "docker"),
        (("docker", "podman", "buildah"), False, "podman"),
        (("podman", "buildah"), False, "podman"),
        (("buildah",), False, "buildah"),
    ],
)
def test_the_first_builder_that_works_is_taken(
    tmp_path: Path, installed: tuple[str, ...], engine_runs: bool, expected: str
) -> None:
    programs = fake_builders(tmp_path, installed, engine_runs)
    done, calls = build(tmp_path, "cpu", PATH=str(programs), BUILDER="")
    assert done.returncode == 0, done.stderr
    assert {call.split()[0] for call in calls if " build " in call} == {expected}


def test_a_builder_that_is_asked_for_is_taken(tmp_path: Path) -> None:
    programs = fake_builders(tmp_path, ("docker", "podman", "buildah"), engine_runs=True)
    done, calls = build(tmp_path, "cpu", PATH=str(programs), BUILDER="podman")
    assert done.returncode == 0, done.stderr
    assert {call.split()[0] for call in calls} == {"podman"}


def fake_builders(tmp_path: Path, installed: tuple[str, ...], engine_runs: bool) -> Path:
    """A folder for PATH with nothing but what the script needs, and builders that write down their name and call."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("bash", "basename", "cat", "dirname", "git", "mkdir", "sed"):
        (folder / name).symlink_to(str(shutil.which(name)))
    for name in installed:
        ends = f'[ "$1" != info ] || exit {0 if engine_runs else 1}' if name == "docker" else ""
        (folder / name).write_text(f'#!/bin/bash\n{ends}\necho "{name} $*" >> {tmp_path / "calls"}\n')
        (folder / name).chmod(0o755)
    return folder
