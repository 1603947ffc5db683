"""The images, built and run for real: ``make test-images``. Needs podman and a base image, see docs/images.md.

Slow, and outside the ordinary suite: pytest is given this file by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components._runtime.embedded_s3 import embedded_s3
from components._runtime.outcome import outcome_of
from components._runtime.plan import Plan, RunSettings
from components._runtime.s3 import parse_s3_uri, upload_file
from components._runtime.signing_keys import TrustedSigner, existing_or_new_pair
from components._runtime.store import open_store
from components._runtime.verification import verify_release
from defense_core.files import sha256_file
from defense_core.verdict import Verdict
from pipelines import demo
from tests.images.podman import CONFINED, LIMITS, ROOT, SBOM_INSIDE, Image, base_image, build, docker_service, podman

USER = 65532
pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="session")
def sboms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("podman") is None:
        pytest.fail("podman is not installed: apt-get install podman runc", pytrace=False)
    if podman("image", "exists", base_image(), check=False).returncode:
        pytest.fail(f"there is no image {base_image()}: run `make image-base`", pytrace=False)
    return tmp_path_factory.mktemp("sboms")


@pytest.fixture(scope="session")
def cpu(sboms: Path) -> Iterator[Image]:
    image = _built("cpu", sboms)
    yield image
    image.remove()


@pytest.fixture(scope="session")
def hooks(sboms: Path) -> Iterator[Image]:
    image = _built("hooks", sboms)
    yield image
    image.remove()


def _built(flavour: str, sboms: Path) -> Image:
    image = build(flavour, sboms)
    size = image.inspect()["Size"]
    sys.stderr.write(f"\n{image.name}: {image.seconds:.0f} s, {size / 1e9:.2f} GB\n")
    return image


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo's backdoored digits model, clean set and test set."""
    folder = tmp_path_factory.mktemp("demo-inputs")
    files = demo.write_inputs(demo.make_inputs(0), folder)
    folder.chmod(0o755)
    return files


@pytest.mark.parametrize("flavour", ["cpu", "hooks"])
def test_an_image_is_what_its_labels_say(flavour: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(flavour)
    config = image.inspect()["Config"]
    labels = config["Labels"]
    assert config["User"] == f"{USER}:{USER}"
    assert not config.get("Entrypoint")
    assert labels["org.opencontainers.image.version"] in (ROOT / "defense_core" / "__init__.py").read_text()
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert labels["org.opencontainers.image.revision"]
    assert labels["org.opencontainers.image.base.name"] == base_image()
    assert ("Healthcheck" in json.dumps(image.inspect())) == (flavour == "hooks")


@pytest.mark.parametrize("flavour", ["cpu", "hooks"])
def test_nothing_inside_builds_installs_or_writes(flavour: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(flavour)
    script = f"""
set -u
test "$(id -u)" = {USER} || echo "runs as $(id -u)"
for tool in gcc cc g++ make ld pip pip3 git curl wget apt-get-source; do command -v $tool; done
for module in pip ensurepip; do python3 -c "import $module" 2>/dev/null && echo "module $module"; done
for place in / /opt/quarantine /usr /etc /var/tmp /home; do
  ( : > $place/written ) 2>/dev/null && echo "writes $place"
done
find / -xdev -perm /6000 -type f -writable 2>/dev/null
: > /tmp/written || echo "cannot write /tmp"
grep -q '^CapEff:.*0000000000000000$' /proc/self/status || echo "has capabilities"
true
"""
    # podman lays memory over /var/tmp and /run as well; Kubernetes does not.
    options = ["--read-only-tmpfs=false", "--tmpfs", "/tmp:size=64m,mode=1777"]
    assert image.run("sh", "-c", script, options=options).stdout == ""
    said = image.run("quarantine", "--version", options=options).stdout.strip()
    assert said == image.inspect()["Config"]["Labels"]["org.opencontainers.image.version"]


@pytest.mark.parametrize("flavour", ["cpu", "hooks"])
def test_the_sbom_lists_what_is_installed(flavour: str, request: pytest.FixtureRequest) -> None:
    image: Image = request.getfixturevalue(flavour)
    assert image.run("cat", SBOM_INSIDE).stdout == image.sbom.read_text()
    document = json.loads(image.sbom.read_text())
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    listed = {(each["name"].lower(), each["version"]) for each in document["components"]}
    script = (
        "from importlib import metadata as m; import json;"
        "print(json.dumps([(d.metadata['Name'].lower(), d.version) for d in m.distributions()]))"
    )
    installed = {(name, version) for name, version in json.loads(image.run("python3", "-c", script).stdout)}
    own = {each for each in installed if each[0] == "model-quarantine"}
    assert own
    assert installed - own == listed - own
    names = {name for name, _ in listed}
    assert ("torch" in names) == (flavour == "cpu")
    assert "triton" not in names
    pinned = {
        _canonical(name): version
        for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().split())
    }
    assert {name: version for name, version in listed - own if pinned.get(_canonical(name)) != version} == {}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_purification_runs_confined(cpu: Image, inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    command = ["quarantine", "purify", "--model", "/in/model.pt", "--clean", "/in/clean.npz", "--out", "/out/purified"]
    command += ["--method", "tsbd", "--architecture", demo.ARCHITECTURE, "--input-size", "1,8,8", "--mean", "0.3"]
    command += ["--std", "0.35", "--device", "cpu", "--json", "--architecture-args", json.dumps(demo.ARGUMENTS)]
    options = [
        *("--read-only-tmpfs=false", "--tmpfs", "/tmp:size=1g,mode=1777", "--env", "OMP_NUM_THREADS=1"),
        *("--volume", f"{inputs[0].parent}:/in:ro", "--volume", f"{out}:/out"),
    ]
    done = cpu.run(*command, options=options)
    result = json.loads(done.stdout)
    bundle = out / "purified"
    assert (bundle / "model.safetensors").stat().st_uid == USER
    bundled = json.loads((bundle / "bundle.json").read_text())
    assert bundled["files"]["model.safetensors"] == sha256_file(bundle / "model.safetensors")
    assert result
    assert sha256_file(bundle / "model.safetensors") != sha256_file(inputs[0])
    assert json.loads((bundle / "result.json").read_text())


def test_the_hook_answers_confined_and_its_health_check_sees_it(hooks: Image, tmp_path: Path) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    queue.chmod(0o777)
    started = podman(
        *(
            "run",
            "--detach",
            "--pull=never",
            *LIMITS,
            *CONFINED,
            "--read-only-tmpfs=false",
            "--tmpfs",
            "/tmp:size=64m,mode=1777",
        ),
        *("--volume", f"{queue}:/queue", "--env", "QUARANTINE_QUEUE=sqlite:////queue/queue.db"),
        *("--env", "QUARANTINE_HOOK_SECRET=only-for-this-test-0123456789abcdef", hooks.name),
    ).stdout.strip()
    try:
        for _ in range(60):
            if podman("healthcheck", "run", started, check=False).returncode == 0:
                break
            time.sleep(1)
        else:
            pytest.fail(podman("logs", started, check=False).stderr)
        script = (
            "import urllib.request as r, urllib.error as e\n"
            "for path in ('/healthz', '/readyz', '/metrics'):\n"
            "    print(path, r.urlopen('http://127.0.0.1:8080' + path, timeout=5).status)\n"
        )
        said = podman("exec", started, "python3", "-c", script).stdout.split("\n")[:-1]
        assert said == ["/healthz 200", "/readyz 200", "/metrics 200"]
        assert (queue / "queue.db").stat().st_uid == USER
        podman("stop", "--time", "20", started)
        state = json.loads(podman("inspect", started).stdout)[0]["State"]
        assert state["ExitCode"] == 0, "SIGTERM ends it gracefully"
    finally:
        podman("rm", "--force", started)


def run_in_containers(
    image: Image, work: Path, plan: Plan, *, network: str, environment: dict[str, str]
) -> tuple[Any, list[dict[str, Any]], str]:
    """Run the pipeline by kfp.local's DockerRunner: its records, one mapping a container, and the log."""
    root = work / "artifacts"
    root.mkdir(parents=True)
    for folder in (work, root):
        folder.chmod(0o777)
    settings = RunSettings(evidence=str(work / "evidence"), model_name="digits", alias="champion", name="containers")
    variables = {"MLFLOW_TRACKING_URI": f"sqlite:///{work}/mlflow.db", "OMP_NUM_THREADS": "1", **environment}
    variables["QUARANTINE_IMAGE_DIGEST"] = image.inspect()["Digest"]
    request = work / "request.json"
    request.write_text(
        json.dumps(
            {
                "root": str(root),
                "workspace": str(root / "workspace"),
                "work": str(work),
                "image": image.name,
                "network": network,
                "environment": variables,
                "arguments": {**plan.arguments(), "run": settings.to_json()},
            }
        )
    )
    log = work / "pipeline.log"
    with docker_service(work) as address, open(log, "w") as sink:
        subprocess.run(
            [sys.executable, "-m", "tests.images.container_worker", str(request)],
            check=True,
            cwd=ROOT,
            env={**os.environ, "DOCKER_HOST": address},
            stdout=sink,
            stderr=subprocess.STDOUT,
            timeout=2400,
        )
    lines = (root / "containers.jsonl").read_text().splitlines()
    return open_store(settings.evidence, "containers").records(), [json.loads(line) for line in lines], log.read_text()


def test_the_whole_demo_runs_with_every_step_in_its_container(cpu: Image, inputs: list[Path], tmp_path: Path) -> None:
    keys = existing_or_new_pair(tmp_path / "work" / "keys")
    for path in (tmp_path, tmp_path / "work", keys.private.parent):
        path.chmod(0o755)
    # The step runs as another user than the one who made the key.
    keys.private.chmod(0o644)
    with embedded_s3(demo.BUCKET) as s3:
        for path in inputs:
            upload_file(path, parse_s3_uri(f"s3://{demo.BUCKET}/digits/{path.name}"), s3)
        environment = {
            name: value for name, value in os.environ.items() if name.startswith("AWS_") and "CA" not in name
        }
        environment |= {"QUARANTINE_SIGNING_KEY": str(keys.private), "QUARANTINE_PUBLIC_KEY": str(keys.public)}
        records, containers, log = run_in_containers(
            cpu, tmp_path / "work", demo.make_plan(0), network="host", environment=environment
        )
    outcome = outcome_of(records)
    assert (outcome.decision, outcome.failed_step) == ("allow", ""), log[-1500:]
    assert {each["code"] for each in containers} == {0}
    assert len(containers) == log.count("Executing task") > len(records.evidence) >= 12, "one container for each step"
    for each in containers:
        assert each["user"] == f"{USER}:{USER}"
        assert each["host"]["ReadonlyRootfs"]
    digest = cpu.inspect()["Digest"]
    assert {each["environment"]["image"] for each in records.evidence.values()} == {digest}
    (release,) = (path.parent for path in (tmp_path / "work" / "artifacts").rglob("release/MLmodel"))
    assert verify_release(release, TrustedSigner(public_key=keys.public)).verdict is Verdict.PASS
    (bom,) = release.rglob("ml-bom.cdx.json")
    (reference,) = json.loads(bom.read_text())["externalReferences"]
    assert reference["url"] == f"file://{SBOM_INSIDE}"
    assert f"sha256:{reference['hashes'][0]['content']}" == sha256_file(cpu.sbom)


def test_a_step_that_fails_in_its_container_fails_the_run(cpu: Image, inputs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "work" / "inputs"
    shutil.copytree(inputs[0].parent, folder)
    tmp_path.chmod(0o755)
    plan = demo.make_plan(0)
    missing = Plan(
        **{
            **{name: getattr(plan, name) for name in ("policy", "spec", "probes", "methods", "seed")},
            "model": str(folder / "gone.pt"),
            "clean": str(folder / "clean.npz"),
            "test": str(folder / "test.npz"),
        }
    )
    records, containers, log = run_in_containers(cpu, tmp_path / "work", missing, network="none", environment={})
    outcome = outcome_of(records)
    assert (outcome.decision, outcome.failed_step) == ("none", "fetch"), log[-1500:]
    assert [each["code"] == 0 for each in containers] == [False, True], "fetch fails, the report is written"
