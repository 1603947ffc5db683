"""Pods that come out of the compiled pipeline: valid, restricted, where and as whom the node pools say."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import pytest
import yaml

from pipelines.compile import ADMISSION_NAME, FILE_NAME, GOLDEN, compile_pipeline, compiled_files
from pipelines.node_pools import NodePools, parse_node_pools, read_node_pools
from tests.pipelines.kfp_driver import RESTRICTED, admitted, only, pods

POOLS = ("gke", "eks", "bare_metal")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
VERSIONS = ("1.30", "1.37")


@pytest.fixture(scope="module", params=POOLS)
def golden(request: pytest.FixtureRequest) -> tuple[NodePools, bytes, bytes]:
    """Pools, compiled pipeline and admission policies, from the golden copies that ``make check`` compares."""
    folder = GOLDEN / request.param
    policies = folder / ADMISSION_NAME
    compiled = (folder / FILE_NAME).read_bytes()
    return read_node_pools(request.param), compiled, policies.read_bytes() if policies.exists() else b""


def rendered(pools: NodePools, compiled: bytes, policies: bytes) -> dict[str, dict[str, Any]]:
    made = pods(compiled, namespace=pools.namespace or "quarantine", run_account=pools.run_service_account)
    return {name: admitted(pod, policies) for name, pod in made.items()}


def main_of(pod: dict[str, Any]) -> dict[str, Any]:
    (main,) = [each for each in pod["spec"]["containers"] if each["name"] == "main"]
    return main


def compiled_pods(mapping: dict[str, Any]) -> dict[str, dict[str, Any]]:
    pools = parse_node_pools({"format": 1, **mapping})
    files = compiled_files(pools)
    return rendered(pools, files[FILE_NAME], files.get(ADMISSION_NAME, b""))


def test_every_pod_is_valid(golden: tuple[NodePools, bytes, bytes]) -> None:
    made = rendered(*golden)
    assert len(made) >= 10
    for pod in made.values():
        for version in VERSIONS:
            kubernetes_validate.validate(pod, version, strict=True)
        resources = main_of(pod)["resources"]
        for value in (*resources["limits"].values(), *resources["requests"].values()):
            assert QUANTITY.fullmatch(value)
        names = [each["name"] for each in pod["spec"]["volumes"]]
        assert len(set(names)) == len(names)
        variables = [each["name"] for each in main_of(pod)["env"]]
        assert len(set(variables)) == len(variables)


def test_a_pod_that_is_not_valid_is_noticed(golden: tuple[NodePools, bytes, bytes]) -> None:
    pod = next(iter(rendered(*golden).values()))
    wrong = {**pod, "spec": {**pod["spec"], "nodeSelectors": {}}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[-1], strict=True)


def test_the_policies_are_valid(golden: tuple[NodePools, bytes, bytes]) -> None:
    _, _, policies = golden
    documents = list(yaml.safe_load_all(policies)) if policies else []
    for each in documents:
        kubernetes_validate.validate(each, "1.37", strict=True)
        if each["kind"].startswith("Validating"):
            kubernetes_validate.validate(each, "1.30", strict=True)


def test_every_container_fits_pod_security_restricted(golden: tuple[NodePools, bytes, bytes]) -> None:
    for pod in rendered(*golden).values():
        for container in (*pod["spec"]["initContainers"], *pod["spec"]["containers"]):
            assert container["securityContext"] == {**RESTRICTED, "runAsNonRoot": True}


def test_the_gpu_steps_get_what_the_file_says(golden: tuple[NodePools, bytes, bytes]) -> None:
    pools, *_ = golden
    made = rendered(*golden)
    settings = pools.for_step("purify_model")
    purify = made["purify-model"]
    main = main_of(purify)
    assert settings.accelerator is not None
    assert main["resources"]["limits"][settings.accelerator.type] == str(settings.accelerator.count)
    assert main["resources"]["limits"]["memory"] == settings.memory_limit
    assert {"name": "QUARANTINE_ACCELERATOR", "value": str(settings.accelerator)} in main["env"]
    assert purify["spec"]["tolerations"][0]["key"] == (settings.tolerations or ())[0].key
    assert purify["spec"]["activeDeadlineSeconds"] == settings.timeout_s
    assert purify["spec"].get("nodeSelector", {}) == dict(settings.node_selector or {})
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in main["volumeMounts"]
    assert main["image"] == settings.image
    assert purify["spec"].get("priorityClassName") == settings.priority_class
    gate = main_of(made["gate-promotion"])
    assert not [name for name in gate["resources"]["limits"] if "/" in name]
    assert "QUARANTINE_ACCELERATOR" not in [each["name"] for each in gate["env"]]


def test_only_those_steps_hold_what_they_reach(golden: tuple[NodePools, bytes, bytes]) -> None:
    made = rendered(*golden)
    held: dict[str, set[str]] = {}
    for name, pod in made.items():
        held[name] = {each["secret"]["secretName"] for each in pod["spec"]["volumes"] if "secret" in each}
        references = [each["valueFrom"].get("secretKeyRef") for each in main_of(pod)["env"] if "valueFrom" in each]
        held[name] |= {each["name"] for each in references if each}
    assert [name for name in held if "quarantine-signing" in held[name]] == ["attest-promotion", "sign-evidence"]
    assert [name for name in held if "quarantine-trust" in held[name]] == ["promote-model"]
    assert [name for name in held if "mlflow-registry" in held[name]] == ["promote-model"]
    for name in ("scan-backdoor", "purify-model", "evaluate-model", "export-onnx", "select-model", "gate-promotion"):
        assert held[name] == held["select-model"]
        assert len(held[name]) <= 1
    for each in made.values():
        for variable in main_of(each)["env"]:
            if variable["name"].startswith(("AWS_ACCESS", "AWS_SECRET", "MLFLOW_TRACKING_P", "MLFLOW_TRACKING_TOKEN")):
                assert "value" not in variable


def test_retries_outlive_every_attempt(golden: tuple[NodePools, bytes, bytes]) -> None:
    pools, compiled, _ = golden
    spec = next(iter(yaml.safe_load_all(compiled)))
    (task,) = [
        dag["dag"]["tasks"]["purify-model"]
        for dag in spec["components"].values()
        if "purify-model" in dag.get("dag", {}).get("tasks", {})
    ]
    settings = pools.for_step("purify_model")
    assert settings.retries is not None
    assert task["retryPolicy"]["maxRetryCount"] == settings.retries.count
    longest = int(task["retryPolicy"]["backoffMaxDuration"].removesuffix("s"))
    assert longest >= (settings.retries.count + 1) * (settings.timeout_s or 0)


@pytest.mark.parametrize("name", ["gke", "eks"])
def test_each_step_runs_as_its_own_account(name: str) -> None:
    pools = read_node_pools(name)
    files = compiled_files(pools)
    made = pods(files[FILE_NAME], namespace=pools.namespace, run_account=pools.run_service_account)
    promote = made["promote-model"]
    assert promote["spec"]["serviceAccountName"] == "quarantine-run"
    after = admitted(promote, files[ADMISSION_NAME])
    assert after["spec"]["serviceAccountName"] == "quarantine-promote"
    purify = admitted(made["purify-model"], files[ADMISSION_NAME])
    assert purify["spec"]["priorityClassName"] == "quarantine-gpu"
    # The number of the class that the pod came with would contradict the new class.
    assert "priority" not in purify["spec"]
    assert admitted(purify, only("Mutating", files[ADMISSION_NAME])) == purify
    with pytest.raises(AssertionError, match="service account of its node pool"):
        admitted(promote, only("Validating", files[ADMISSION_NAME]))
    with pytest.raises(AssertionError, match=r"service account|priority class"):
        admitted(made["purify-model"], only("Validating", files[ADMISSION_NAME]))
    driver = {**promote, "metadata": {**promote["metadata"], "labels": {}}}
    assert admitted(driver, files[ADMISSION_NAME]) == driver


def test_the_policies_reach_one_namespace_only() -> None:
    documents = list(yaml.safe_load_all(compiled_files(read_node_pools("eks"))[ADMISSION_NAME]))
    bindings = [each for each in documents if each["kind"].endswith("Binding")]
    assert len(bindings) == 2
    for each in bindings:
        selector = each["spec"]["matchResources"]["namespaceSelector"]["matchLabels"]
        assert selector == {"kubernetes.io/metadata.name": "quarantine"}


def test_node_labels_are_never_given_as_json(golden: tuple[NodePools, bytes, bytes]) -> None:
    # add_node_selector_json beside add_node_selector: the backend takes the one and drops the other.
    _, compiled, _ = golden
    for word in (b"nodeSelectorJson", b"nodeAffinityJson", b"tolerationJson"):
        assert word not in compiled


def test_settings_that_a_file_may_leave_out() -> None:
    made = compiled_pods(
        {
            "default": {"node_selector": {"a": "b"}, "accelerator": {"type": "amd.com/gpu"}, "run_as_non_root": False},
            "steps": {
                "select_model": {"node_selector": {}, "accelerator": {"type": "amd.com/gpu", "count": 0}},
                "gate_promotion": {"image": "registry/quarantine@sha256:" + "a" * 64},
                "promote_model": {
                    "tolerations": [{"operator": "Exists", "effect": "NoExecute", "toleration_seconds": 60}]
                },
            },
        }
    )
    assert made["purify-model"]["spec"]["nodeSelector"] == {"a": "b"}
    assert main_of(made["purify-model"])["resources"]["limits"]["amd.com/gpu"] == "1"
    assert "nodeSelector" not in made["select-model"]["spec"]
    assert "amd.com/gpu" not in main_of(made["select-model"])["resources"]["limits"]
    assert main_of(made["select-model"])["securityContext"] == RESTRICTED
    digest = {"name": "QUARANTINE_IMAGE_DIGEST", "value": "sha256:" + "a" * 64}
    assert digest in main_of(made["gate-promotion"])["env"]
    (toleration,) = made["promote-model"]["spec"]["tolerations"]
    assert toleration == {"operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    for pod in made.values():
        kubernetes_validate.validate(pod, VERSIONS[-1], strict=True)


def test_without_node_pools_nothing_is_added() -> None:
    assert compile_pipeline() == (GOLDEN / FILE_NAME).read_bytes()
    assert b"platforms:" not in compile_pipeline()
    # Pools end with the compilation that they were for.
    compile_pipeline(read_node_pools("gke"))
    assert compile_pipeline() == (GOLDEN / FILE_NAME).read_bytes()
