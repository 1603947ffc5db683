"""The file of node pools: what is read, what is refused and how the refusal reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kfp.dsl.pipeline_task import PipelineTask

from components._runtime.image import IMAGE
from defense_core.errors import ConfigError
from pipelines.compile import ADMISSION_NAME, compiled_files, drift
from pipelines.node_pools import POOLS, parse_node_pools, read_node_pools
from pipelines.pod_settings import Retries, cpu_cores, memory_bytes
from pipelines.resources import component_names, metadata_of

CANARY = "canary-4d1e-secret"
S3 = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}


def artifacts(**changes: Any) -> dict[str, Any]:
    return {"secret": "artifacts", "grants": ["evidence store"], "environment": S3, **changes}


def step(name: str, /, **settings: Any) -> dict[str, Any]:
    return {"steps": {name: settings}}


def purify(**settings: Any) -> dict[str, Any]:
    return step("purify_model", **settings)


def account(name: str = "robot", *grants: str) -> dict[str, Any]:
    return {"name": name, "grants": list(grants)}


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "format"),
    ({"pools": {}}, "unknown key 'pools'"),
    ({"steps": []}, "steps is malformed"),
    ({"default": 3}, "default.*malformed"),
    (step("purify", timeout_s=1), "steps.purify is no step"),
    (purify(acelerator={"type": "nvidia.com/gpu"}), "unknown key 'acelerator'"),
    (purify(accelerator={"kind": "nvidia.com/gpu"}), "unknown key"),
    (purify(accelerator={"type": "NVIDIA_TESLA_K80"}), "accelerator.type"),
    (purify(accelerator={"type": "nvidia.com/gpu", "count": 1.5}), "count"),
    (purify(accelerator={"type": "nvidia.com/gpu", "count": -1}), "accelerator.count"),
    (purify(accelerator={"count": 1}), "lacks type"),
    (purify(node_selector={"spot": True}), "node_selector.spot"),
    (purify(node_selector={"no spaces here": "x"}), "node_selector"),
    (purify(node_selector={"a": "x" * 64}), "node_selector"),
    (purify(affinity=[{"match": []}]), "affinity.match"),
    (purify(affinity=[{"match": [{"key": "a", "operator": "in", "values": ["b"]}]}]), "operator"),
    (purify(affinity=[{"match": [{"key": "a", "operator": "In"}]}]), "at least one"),
    (purify(affinity=[{"match": [{"key": "a", "operator": "Exists", "values": ["b"]}]}]), "none with Exists"),
    (purify(affinity=[{"match": [{"key": "a", "operator": "Gt", "values": ["many"]}]}]), "one whole number"),
    (purify(affinity=[{"match": [{"key": "a", "operator": "Exists"}], "weight": 101}]), "affinity.weight"),
    (purify(tolerations=[{"operator": "Equal"}]), "tolerations.key"),
    (purify(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]), "tolerations.value"),
    (purify(tolerations=[{"key": "a", "effect": "NoSchedule", "toleration_seconds": 5}]), "toleration_seconds"),
    (purify(tolerations=[{"key": "a", "effect": "Never"}]), "effect"),
    (purify(cpu_request=2), "cpu_request"),
    (purify(cpu_request="two"), "no number of cores"),
    (purify(cpu_request="0"), "no number of cores"),
    (purify(cpu_request="8", cpu_limit="4"), "cpu_request is larger than cpu_limit"),
    (purify(cpu_request="1500m", cpu_limit="1.4"), "cpu_request is larger"),
    (purify(memory_request="1K"), "no amount of memory"),
    (purify(memory_request="1.5Gi"), "no amount of memory"),
    (purify(memory_request="16GB"), "no amount of memory"),
    (purify(memory_limit="2Gi"), "memory_request is larger than memory_limit.*got 4Gi"),
    (purify(memory_request="18G"), "memory_request is larger than memory_limit"),
    (purify(shared_memory="32Gi"), "shared_memory is larger"),
    (purify(timeout_s=-1), "timeout_s"),
    (purify(timeout_s=31 * 24 * 3600), "timeout_s"),
    (purify(timeout_s="1h"), "timeout_s"),
    (purify(retries={"count": 2}), "retries have no end"),
    (purify(retries={"count": 11}, timeout_s=1), "retries.count"),
    (purify(retries={"count": 1, "factor": 1.5}, timeout_s=1), "factor"),
    (purify(image="Model Quarantine"), "image"),
    (purify(image="quarantine@sha256:abc"), "image"),
    (purify(image_pull_secrets=["No Such Name"]), "image_pull_secrets"),
    (purify(priority_class="High!"), "priority_class"),
    (purify(priority_class="high"), "the file no namespace"),
    (purify(service_account=account()), "the file no namespace"),
    (purify(service_account="robot"), "service_account"),
    ({"namespace": "My Team"}, "namespace"),
    (purify(environment={"AWS_SECRET_ACCESS_KEY": CANARY}), "environment.AWS_SECRET_ACCESS_KEY is a secret"),
    (purify(environment={"MLFLOW_TRACKING_URI": f"http://me:{CANARY}@mlflow"}), "MLFLOW_TRACKING_URI is a secret"),
    (purify(environment={"NOTE": f"-----BEGIN PRIVATE KEY-----{CANARY}"}), "NOTE is a secret"),
    (purify(environment={"QUARANTINE_SIGNING_KEY": "/key"}), "is a secret"),
    (purify(environment={"QUARANTINE_ACCELERATOR": "nvidia.com/gpu=8"}), "set by others"),
    (purify(environment={"KFP_POD_NAME": "x"}), "set by others"),
    (purify(environment={"1ST": "x"}), "set by others"),
    (purify(environment={"PORT": 5000}), "PORT"),
    (purify(secrets=[artifacts(grants=[])]), "secrets.grants"),
    (purify(secrets=[artifacts(grants=["everything"])]), "grants of AWS|opens more"),
    (purify(secrets=[{"secret": "artifacts", "grants": ["evidence store"]}]), "environment, mount or both"),
    (
        purify(secrets=[artifacts(environment={"AWS_SECRET_ACCESS_KEY": f"{CANARY}/+="})]),
        "key of AWS_SECRET_ACCESS_KEY",
    ),
    (purify(secrets=[artifacts(mount="relative")]), "secrets.mount"),
    (purify(secrets=[artifacts(mount="/var/../etc")]), "secrets.mount"),
    (purify(secrets=[artifacts(mount="/tmp")]), "secrets.mount"),
    (purify(secrets=[artifacts(secret="a.b", mount="/var/run/a")]), "mounted secret"),
    (purify(secrets=[artifacts(secret="shared-memory", mount="/var/run/a")]), "mounted secret"),
    (purify(secrets=[artifacts(secret="kfp-launcher", mount="/var/run/a")]), "mounted secret"),
    (purify(secrets=[artifacts(paths={"A_FILE": "a"})]), "secrets.paths"),
    (purify(secrets=[artifacts(), artifacts(secret="other")]), "variable in environment and secrets"),
    (purify(environment={"A": "b"}, secrets=[artifacts(environment={"A": "c"})]), "variable in environment"),
    (purify(secrets=[artifacts(mount="/var/run/a"), artifacts(environment={}, mount="/var/run/b")]), "mounted secret"),
]


@pytest.mark.parametrize(("mapping", "message"), MALFORMED, ids=[str(each)[:70] for each, _ in MALFORMED])
def test_what_is_refused(mapping: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse_node_pools({"format": 1, **mapping})
    assert refused.value.expected
    assert refused.value.got
    assert CANARY not in str(refused.value)


MORE_THAN_IT_REACHES = [
    ("purify_model", "secrets", [artifacts(grants=["model source"])]),
    ("purify_model", "secrets", [{"secret": "m", "grants": ["MLflow tracking"], "environment": {"MLFLOW_X": "k"}}]),
    ("fetch_model", "secrets", [artifacts(grants=["MLflow registry"])]),
    ("evaluate_model", "secrets", [{"secret": "k", "grants": ["signing key"], "mount": "/var/run/k"}]),
    ("promote_model", "secrets", [{"secret": "k", "grants": ["signing key"], "mount": "/var/run/k"}]),
    ("sign_evidence", "secrets", [artifacts(grants=["MLflow registry"])]),
    ("report", "service_account", account("robot", "MLflow registry")),
    ("purify_model", "service_account", account("robot", "model source")),
]


@pytest.mark.parametrize(("name", "key", "value"), MORE_THAN_IT_REACHES)
def test_a_step_is_given_no_more_than_it_reaches(name: str, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="opens more than the step reaches") as refused:
        parse_node_pools({"format": 1, "namespace": "n", **step(name, **{key: value})})
    assert "rights among" in str(refused.value.expected)


def test_no_step_reaches_both_the_registry_and_the_key() -> None:
    reach = {name: set(metadata_of(name)["reaches"]) for name in component_names()}
    assert [name for name in reach if "MLflow registry" in reach[name]] == ["promote_model"]
    assert [name for name in reach if "signing key" in reach[name]] == ["attest_promotion", "sign_evidence"]
    assert [name for name in reach if "public key" in reach[name]] == ["promote_model", "reopen_release"]
    assert reach["purify_model"] == {"evidence store"}
    # So that a default can hold it for all.
    assert all("evidence store" in each for each in reach.values())


def test_the_docs_say_what_each_step_may_hold() -> None:
    table = {}
    for line in (POOLS.parent.parent / "docs" / "node-pools.md").read_text().splitlines():
        names, _, rights = line.strip("| ").partition(" | ")
        if re.fullmatch(r"`\w+`(, `\w+`)*", names) and "evidence store" in rights:
            table |= {name.strip("` "): set(rights.split(", ")) for name in names.split(",")}
    assert table == {name: set(metadata_of(name)["reaches"]) for name in component_names()}


def test_a_secret_of_the_default_is_held_against_every_step() -> None:
    with pytest.raises(ConfigError, match="opens more than the step reaches"):
        parse_node_pools({"format": 1, "default": {"secrets": [artifacts(grants=["model source"])]}})
    pools = parse_node_pools({"format": 1, "default": {"secrets": [artifacts()]}})
    assert {each.secret for each in pools.for_step("gate_promotion").secrets or ()} == {"artifacts"}


def test_a_variable_names_the_right_that_it_needs() -> None:
    wrong = {"secret": "m", "grants": ["evidence store"], "environment": {"MLFLOW_TRACKING_PASSWORD": "k"}}
    with pytest.raises(ConfigError, match="grants of MLFLOW_TRACKING_PASSWORD"):
        parse_node_pools({"format": 1, **purify(secrets=[wrong])})
    key = {"secret": "k", "grants": ["evidence store"], "mount": "/var/run/k", "paths": {"QUARANTINE_SIGNING_KEY": "k"}}
    with pytest.raises(ConfigError, match="grants of QUARANTINE_SIGNING_KEY"):
        parse_node_pools({"format": 1, **purify(secrets=[key])})
    trust = {**key, "paths": {"QUARANTINE_PUBLIC_KEY": "k"}}
    with pytest.raises(ConfigError, match="grants of QUARANTINE_PUBLIC_KEY"):
        parse_node_pools({"format": 1, **purify(secrets=[trust])})
    both = step("promote_model", secrets=[{**trust, "grants": ["public key"]}])
    assert parse_node_pools({"format": 1, **both}).for_step("promote_model").secrets


@pytest.mark.parametrize("key", ["secrets", "service_account"])
def test_one_name_opens_the_same_everywhere(key: str) -> None:
    less = [artifacts()] if key == "secrets" else account("artifacts", "evidence store")
    more = (
        [artifacts(grants=["evidence store", "model source"])]
        if key == "secrets"
        else account("artifacts", "evidence store", "model source")
    )
    with pytest.raises(ConfigError, match="opens other things in step purify_model than in step fetch_model"):
        parse_node_pools(
            {"format": 1, "namespace": "n", "steps": {"fetch_model": {key: more}, "purify_model": {key: less}}}
        )


def test_a_steps_setting_replaces_the_default_whole() -> None:
    pools = parse_node_pools(
        {
            "format": 1,
            "default": {"node_selector": {"a": "b"}, "timeout_s": 60, "memory_limit": "20Gi"},
            "steps": {"purify_model": {"node_selector": {"c": "d"}, "timeout_s": 0}},
        }
    )
    purify_pod, gate = pools.for_step("purify_model"), pools.for_step("gate_promotion")
    assert purify_pod.node_selector == {"c": "d"}
    assert (purify_pod.timeout_s, gate.timeout_s) == (0, 60)
    assert gate.node_selector == {"a": "b"}
    assert gate.memory_limit == "20Gi"
    assert gate.memory_request == metadata_of("gate_promotion")["resources"]["memory_request"]


def test_the_default_is_checked_against_each_step() -> None:
    with pytest.raises(ConfigError, match=r"step \w+: memory_request is larger than memory_limit"):
        parse_node_pools({"format": 1, "default": {"memory_limit": "1Gi"}})


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1), ("1Ki", 1024), ("16Gi", 16 * 2**30), ("3G", 3 * 10**9), ("2Pi", 2 * 2**50)]
)
def test_amounts_of_memory(text: str, value: int) -> None:
    assert memory_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("2", "2"), ("500m", "0.5"), ("0.25", "0.25"), ("1500m", "1.5")])
def test_numbers_of_cores(text: str, value: str) -> None:
    assert cpu_cores(text) == Decimal(value)


@settings(deadline=None)
@given(st.from_regex(r"[0-9.]{0,5}[mkKMGTPE]?i?B?", fullmatch=True) | st.text(max_size=6))
def test_a_quantity_is_read_or_refused_and_kfp_agrees(text: str) -> None:
    for read, check in ((memory_bytes, "_validate_memory_request_limit"), (cpu_cores, "_validate_cpu_request_limit")):
        try:
            amount = read(text)
        except ConfigError:
            continue
        assert amount > 0
        validate: Callable[[Any, str], str] = getattr(PipelineTask, check)
        validate(None, text)


@given(st.integers(0, 10), st.integers(0, 3600), st.integers(1, 10), st.integers(1, 10**6))
def test_the_end_of_retries_is_after_the_last_attempt(count: int, backoff: int, factor: int, timeout: int) -> None:
    longest = Retries(count, backoff, factor).longest_s(timeout)
    waited, wait = 0, backoff
    for _ in range(count):
        waited, wait = waited + timeout + wait, wait * factor
    assert longest == waited + timeout + 24 * 3600, "and a day in all to wait for nodes"
    assert Retries(count, backoff, factor, queue_s=0).longest_s(timeout) == waited + timeout


def test_files_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((POOLS / "gke.yaml").read_text())
    assert read_node_pools(str(path)) == read_node_pools("gke")
    path.write_text("format: 1\nformat: 1\n")
    with pytest.raises(ConfigError, match="repeated key format"):
        read_node_pools(str(path))
    path.write_text("[]")
    with pytest.raises(ConfigError, match="a mapping"):
        read_node_pools(str(path))
    path.write_text("format: 1\nsteps: {purify_model: {timeout: 3}}\n")
    with pytest.raises(ConfigError, match=r"steps\.purify_model: unknown key 'timeout'") as refused:
        read_node_pools(str(path))
    assert "timeout_s" in str(refused.value.hint)
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        read_node_pools(str(tmp_path / "gone.yaml"))


def test_the_shipped_files_name_images_of_this_version() -> None:
    version = IMAGE.partition(":")[2]
    for path in POOLS.glob("*.yaml"):
        content = yaml.safe_load(path.read_text())
        images = [each["image"] for each in content["steps"].values() if "image" in each]
        assert images
        assert {image.partition(":")[2] for image in images} == {version}


def test_only_what_needs_it_asks_for_an_admission_policy() -> None:
    assert ADMISSION_NAME in compiled_files(read_node_pools("gke"))
    assert ADMISSION_NAME not in compiled_files(read_node_pools("bare_metal"))


def test_drift_of_a_pools_golden_copy_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import compile as compiling

    only = {"gke": read_node_pools("gke")}
    monkeypatch.setattr(compiling, "golden_pools", lambda: only)
    assert drift() == []
    golden = tmp_path / "gke"
    golden.mkdir()
    for path in (compiling.GOLDEN / "gke").iterdir():
        (golden / path.name).write_text(path.read_text().replace("nvidia-l4", "nvidia-t4").replace("Never", "IfNeeded"))
    lines = "\n".join(drift(tmp_path))
    assert "nvidia-t4" in lines
    assert "-  reinvocationPolicy: IfNeeded" in lines
