"""Admission policies for what no KFP release can say of one step: its service account and its priority class.

Two built-in policies of Kubernetes, bound to one namespace. The mutating one (``v1`` since Kubernetes 1.36) copies
the annotations of a step's pod into its fields. The validating one (since 1.30) refuses a step's pod whose fields are
not what its annotations say, so that a cluster without the first runs nothing with other rights than were meant.
"""

from __future__ import annotations

from typing import Any

import yaml

from pipelines.node_pools import NodePools
from pipelines.resources import component_names

STEP_LABEL = "model-quarantine/step"
ACCOUNT_ANNOTATION = "model-quarantine/service-account"
PRIORITY_ANNOTATION = "model-quarantine/priority-class"

_API = "admissionregistration.k8s.io/v1"
_HEADER = "# Compiled by `quarantine compile --node-pools`; apply it before the first run. See docs/node-pools.md.\n"


def admission_policies(pools: NodePools) -> bytes:
    """The manifests as YAML; empty where no step names a service account or a priority class."""
    steps = [pools.for_step(name) for name in component_names()]
    if all(each.service_account is None and each.priority_class is None for each in steps):
        return b""
    name = f"model-quarantine-{pools.namespace}"
    documents = [
        _policy("Mutating", name, _mutation()),
        _binding("Mutating", name, pools.namespace, {}),
        _policy("Validating", name, _validation()),
        _binding("Validating", name, pools.namespace, {"validationActions": ["Deny"]}),
    ]
    return (_HEADER + yaml.safe_dump_all(documents, sort_keys=False, width=110)).encode()


def _policy(kind: str, name: str, judged: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": _API,
        "kind": f"{kind}AdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "objectSelector": {"matchExpressions": [{"key": STEP_LABEL, "operator": "Exists"}]},
                "resourceRules": [
                    {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
                ],
            },
            "variables": [
                {"name": "account", "expression": _annotation(ACCOUNT_ANNOTATION)},
                {"name": "priority", "expression": _annotation(PRIORITY_ANNOTATION)},
                {"name": "runsAs", "expression": _field("serviceAccountName")},
                {"name": "ranksAs", "expression": _field("priorityClassName")},
            ],
            **judged,
        },
    }


def _binding(kind: str, name: str, namespace: str, further: dict[str, Any]) -> dict[str, Any]:
    selector = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    return {
        "apiVersion": _API,
        "kind": f"{kind}AdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "matchResources": {"namespaceSelector": selector}, **further},
    }


def _mutation() -> dict[str, Any]:
    # The Priority plugin has filled in the number of the class that the pod came with, and refuses a pod whose number
    # and class differ. Without a number it fills in that of the new class, when it runs again after this policy. A
    # second call of this policy would come after that and must change nothing: hence Never, and the comparison.
    expression = (
        'variables.account == "" || variables.account == variables.runsAs ? [] : '
        '[JSONPatch{op: "add", path: "/spec/serviceAccountName", value: variables.account}]'
    )
    priority = (
        'variables.priority == "" || variables.priority == variables.ranksAs ? [] : '
        '[JSONPatch{op: "add", path: "/spec/priorityClassName", value: variables.priority}]'
        ' + (has(object.spec.priority) ? [JSONPatch{op: "remove", path: "/spec/priority"}] : [])'
        ' + (has(object.spec.preemptionPolicy) ? [JSONPatch{op: "remove", path: "/spec/preemptionPolicy"}] : [])'
    )
    return {
        "reinvocationPolicy": "Never",
        "mutations": [
            {"patchType": "JSONPatch", "jsonPatch": {"expression": expression}},
            {"patchType": "JSONPatch", "jsonPatch": {"expression": priority}},
        ],
    }


def _validation() -> dict[str, Any]:
    advice = "apply the mutating policy model-quarantine too (Kubernetes 1.36 or later)"
    return {
        "validations": [
            {
                "expression": 'variables.account == "" || variables.account == variables.runsAs',
                "message": f"the step's pod does not run as the service account of its node pool: {advice}",
            },
            {
                "expression": 'variables.priority == "" || variables.priority == variables.ranksAs',
                "message": f"the step's pod does not have the priority class of its node pool: {advice}",
            },
        ]
    }


def _annotation(key: str) -> str:
    return (
        f'has(object.metadata.annotations) && "{key}" in object.metadata.annotations'
        f' ? object.metadata.annotations["{key}"] : ""'
    )


def _field(name: str) -> str:
    return f'has(object.spec.{name}) ? object.spec.{name} : ""'
