"""Pods that KFP's backend (as of release 2.17) makes of a compiled pipeline, as far as this project's settings go.

Written after its sources: ``argocompiler/container.go`` (the template), ``driver/driver.go`` (resources and variables)
and ``driver/k8s.go`` (what the platform document adds). A setting that is not known here is an error, so that nothing
of the compiled pipeline can get lost between here and the cluster without notice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import cel
import yaml

KNOWN = {
    "secretAsVolume", "secretAsEnv", "nodeSelector", "podMetadata", "imagePullSecret", "fieldPathAsEnv", "tolerations",
    "activeDeadlineSeconds", "emptyDirMounts", "nodeAffinity", "securityContext",
}  # fmt: skip
SCRATCH = ("kfp-launcher", "gcs-scratch", "s3-scratch", "minio-scratch", "dot-local-scratch", "dot-cache-scratch")
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def pods(compiled: bytes, *, namespace: str, run_account: str) -> dict[str, dict[str, Any]]:
    """A pod for each task of the pipeline, by the task's name, as Argo asks the cluster for it."""
    spec, *platform = list(yaml.safe_load_all(compiled))
    extra = platform[0]["platforms"]["kubernetes"]["deploymentSpec"]["executors"] if platform else {}
    made = {}
    for name, executor in _tasks(spec):
        container = spec["deploymentSpec"]["executors"][executor]["container"]
        made[name] = _pod(name, container, extra.get(executor, {}), namespace, run_account)
    return made


def admitted(pod: dict[str, Any], policies: bytes) -> dict[str, Any]:
    """``pod`` after the mutating policies among ``policies``; AssertionError where a validating one refuses it."""
    documents = list(yaml.safe_load_all(policies)) if policies else []
    for each in documents:
        if each["kind"] == "MutatingAdmissionPolicy" and _matches(each, pod):
            for mutation in each["spec"]["mutations"]:
                pod = _patched(pod, _evaluated(mutation["jsonPatch"]["expression"], each, pod))
    for each in documents:
        if each["kind"] == "ValidatingAdmissionPolicy" and _matches(each, pod):
            for validation in each["spec"]["validations"]:
                assert _evaluated(validation["expression"], each, pod) is True, validation["message"]
    return pod


def only(kind: str, policies: bytes) -> bytes:
    """The policies of one kind, Mutating or Validating: a cluster that has not the other."""
    documents = [each for each in yaml.safe_load_all(policies) if each["kind"].startswith(kind)]
    return yaml.safe_dump_all(documents).encode()


def _tasks(spec: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for dag in [spec["root"], *spec["components"].values()]:
        for name, task in dag.get("dag", {}).get("tasks", {}).items():
            label = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if label:
                yield name, label


def _pod(name: str, container: dict[str, Any], extra: dict[str, Any], namespace: str, account: str) -> dict[str, Any]:
    assert set(extra) <= KNOWN, f"the renderer does not know {set(extra) - KNOWN}"
    metadata = extra.get("podMetadata", {})
    volumes = [{"name": each, "emptyDir": {}} for each in (*SCRATCH, "var-run-argo")]
    main = _main(container, extra)
    volumes += [
        {"name": each["secretName"], "secret": {"secretName": each["secretName"], "optional": each["optional"]}}
        for each in extra.get("secretAsVolume", [])
    ]
    volumes += [
        {"name": each["volumeName"], "emptyDir": {"medium": each["medium"], "sizeLimit": each["sizeLimit"]}}
        for each in extra.get("emptyDirMounts", [])
    ]
    system = {"image": "system", "securityContext": {**RESTRICTED, "runAsNonRoot": True}}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "serviceAccountName": account,
        # What the Priority plugin has filled in before any policy sees the pod.
        "priority": 0,
        "preemptionPolicy": "PreemptLowerPriority",
        "securityContext": {"seccompProfile": {"type": "RuntimeDefault"}},
        "initContainers": [{"name": each, **system} for each in ("init", "kfp-launcher")],
        "containers": [{"name": "wait", **system}, main],
        "volumes": volumes,
    }
    if "nodeSelector" in extra:
        # The backend reads the JSON form first and then does not look at the labels.
        selector = extra["nodeSelector"]
        spec["nodeSelector"] = selector.get("nodeSelectorJson") or selector["labels"]
    if "tolerations" in extra:
        spec["tolerations"] = [_numbers(each, "tolerationSeconds") for each in extra["tolerations"]]
    if "imagePullSecret" in extra:
        spec["imagePullSecrets"] = [{"name": each["secretName"]} for each in extra["imagePullSecret"]]
    if "activeDeadlineSeconds" in extra:
        spec["activeDeadlineSeconds"] = int(extra["activeDeadlineSeconds"])
    if "nodeAffinity" in extra:
        spec["affinity"] = {"nodeAffinity": _affinity(extra["nodeAffinity"])}
    labels = {"workflows.argoproj.io/workflow": "model-quarantine-x", **metadata.get("labels", {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": {"workflows.argoproj.io/node-name": name, **metadata.get("annotations", {})},
        },
        "spec": spec,
    }


def _main(container: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    environment = [{"name": "KFP_POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]
    environment += [{"name": each["name"], "value": each["value"]} for each in container.get("env", [])]
    for each in extra.get("secretAsEnv", []):
        for key in each["keyToEnv"]:
            reference = {"name": each["secretName"], "key": key["secretKey"], "optional": each["optional"]}
            environment.append({"name": key["envVar"], "valueFrom": {"secretKeyRef": reference}})
    for each in extra.get("fieldPathAsEnv", []):
        environment.append({"name": each["name"], "valueFrom": {"fieldRef": {"fieldPath": each["fieldPath"]}}})
    mounts = [{"name": "kfp-launcher", "mountPath": "/kfp-launcher"}]
    mounts += [{"name": each["secretName"], "mountPath": each["mountPath"]} for each in extra.get("secretAsVolume", [])]
    mounts += [{"name": each["volumeName"], "mountPath": each["mountPath"]} for each in extra.get("emptyDirMounts", [])]
    return {
        "name": "main",
        "image": container["image"],
        "command": ["/kfp-launcher/launch", "--", *container["command"]],
        "args": container["args"],
        "env": environment,
        "resources": _resources(container.get("resources", {})),
        "volumeMounts": mounts,
        "securityContext": {**RESTRICTED, **extra.get("securityContext", {})},
    }


def _resources(asked: dict[str, Any]) -> dict[str, Any]:
    limits = {"cpu": asked.get("resourceCpuLimit"), "memory": asked.get("resourceMemoryLimit")}
    requests = {"cpu": asked.get("resourceCpuRequest"), "memory": asked.get("resourceMemoryRequest")}
    accelerator = asked.get("accelerator")
    if accelerator:
        limits[accelerator["resourceType"]] = accelerator["resourceCount"]
    return {
        "limits": {name: value for name, value in limits.items() if value},
        "requests": {name: value for name, value in requests.items() if value},
    }


def _affinity(terms: list[dict[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for each in terms:
        assert set(each) <= {"matchExpressions", "weight"}
        preference = {"matchExpressions": each["matchExpressions"]}
        if "weight" in each:
            made.setdefault("preferredDuringSchedulingIgnoredDuringExecution", []).append(
                {"weight": each["weight"], "preference": preference}
            )
        else:
            required = made.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {"nodeSelectorTerms": []})
            required["nodeSelectorTerms"].append(preference)
    return made


def _numbers(mapping: dict[str, Any], *names: str) -> dict[str, Any]:
    # Protocol buffers write 64-bit numbers as text.
    return {key: int(value) if key in names else value for key, value in mapping.items()}


def _matches(policy: dict[str, Any], pod: dict[str, Any]) -> bool:
    (wanted,) = policy["spec"]["matchConstraints"]["objectSelector"]["matchExpressions"]
    assert wanted["operator"] == "Exists"
    return wanted["key"] in pod["metadata"]["labels"]


def _evaluated(expression: str, policy: dict[str, Any], pod: dict[str, Any]) -> Any:
    variables = {
        each["name"]: cel.evaluate(each["expression"], {"object": pod}) for each in policy["spec"]["variables"]
    }
    # JSONPatch{op: …} is a type that only an API server knows; a map with the same fields stands for it.
    plain = re.sub(r"JSONPatch\{op: ", '{"op": ', expression).replace(", path: ", ', "path": ')
    plain = plain.replace(", value: ", ', "value": ')
    return cel.evaluate(plain, {"object": pod, "variables": variables})


def _patched(pod: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    spec = dict(pod["spec"])
    for each in patch:
        field = each["path"].removeprefix("/spec/")
        if each["op"] == "add":
            spec[field] = each["value"]
        else:
            del spec[field]
    return {**pod, "spec": spec}
