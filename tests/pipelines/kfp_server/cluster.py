"""What the server knows: pipelines, experiments, runs and schedules in memory, with the API's rules for them."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import yaml

from tests.pipelines.kfp_server.modes import Modes, Refused
from tests.pipelines.kfp_server.openapi import problems

DEFAULT_ACCOUNT = "pipeline-runner"
KINDS = {
    "pipelines": "pipeline_id",
    "pipeline_versions": "pipeline_version_id",
    "experiments": "experiment_id",
    "runs": "run_id",
    "recurring_runs": "recurring_run_id",
}


class Cluster:
    """The API's state; one lock, every request is one transaction."""

    def __init__(self) -> None:
        self.modes = Modes()
        self.records: dict[str, dict[str, dict[str, Any]]] = {kind: {} for kind in KINDS}
        self.deleted_runs: list[dict[str, Any]] = []
        self.deletions: list[Mapping[str, str]] = []
        self.violations: list[str] = []
        self.requests: list[str] = []
        self.most_enabled: dict[str, int] = {}
        self.on_run: Callable[[dict[str, Any]], None] = lambda run: None
        self._reads: dict[str, int] = {}
        self._names: dict[tuple[str, str], list[str]] = {}
        self.lock = threading.RLock()

    def report(self) -> dict[str, Any]:
        """Every run that was created, for whoever counts them."""
        with self.lock:
            runs = [(run, False) for run in self.records["runs"].values()] + [(run, True) for run in self.deleted_runs]
            return {
                "created": len(runs),
                "present": len(self.records["runs"]),
                "violations": list(self.violations),
                "runs": [
                    {**{key: run[key] for key in ("run_id", "display_name", "created_at")}, "deleted": deleted}
                    for run, deleted in runs
                ],
            }

    def answer(self, name: str, path: Mapping[str, str], query: Mapping[str, str], body: Any) -> Any:
        """Carry out the operation called ``name``. Raises Refused."""
        with self.lock:
            self.requests.append(name)
            method = getattr(self, f"_{name}", None)
            if method is None:
                raise Refused(501, 12, f"{name} is not served")
            return method(path, query, body)

    # -- health ------------------------------------------------------------------------

    def _healthz_service_get_healthz(self, path: Any, query: Any, body: Any) -> Any:
        return {"multi_user": self.modes.multi_user, "pipeline_store": "database"}

    # -- pipelines ---------------------------------------------------------------------

    def _pipeline_service_create_pipeline(self, path: Any, query: Any, body: Any) -> Any:
        name = body.get("name") or body.get("display_name")
        if not name:
            raise Refused(400, 3, "The pipeline's name is empty")
        self._new_name("pipelines", name, namespace=body.get("namespace", ""))
        return self._add("pipelines", {**body, "name": name, "display_name": body.get("display_name") or name})

    def _pipeline_service_list_pipelines(self, path: Any, query: Any, body: Any) -> Any:
        return self._page("pipelines", query, self._in_namespace(query))

    def _pipeline_service_list_pipeline_versions(self, path: Any, query: Any, body: Any) -> Any:
        self._get("pipelines", path["pipeline_id"])
        return self._page("pipeline_versions", query, lambda each: each["pipeline_id"] == path["pipeline_id"])

    def _upload_pipeline_version(self, path: Any, query: Any, body: bytes) -> Any:
        pipeline = self._get("pipelines", query.get("pipelineid", ""))
        try:
            specs = list(yaml.safe_load_all(body))
        except yaml.YAMLError as error:
            raise Refused(400, 3, f"the pipeline is no YAML: {error}") from error
        if not specs or not isinstance(specs[0], dict) or "pipelineInfo" not in specs[0]:
            raise Refused(400, 3, "the file holds no pipeline")
        name = query.get("name", "")
        if not name or len(name) > 127:
            raise Refused(400, 3, "The version's name is empty or too long")
        taken = [each for each in self.records["pipeline_versions"].values() if each["name"] == name]
        if any(each["pipeline_id"] == pipeline["pipeline_id"] for each in taken):
            raise Refused(409, 6, f"The name {name} already exists")
        spec = {"pipeline_spec": specs[0], "platform_spec": specs[1]} if len(specs) > 1 else specs[0]
        return self._add(
            "pipeline_versions",
            {
                "pipeline_id": pipeline["pipeline_id"],
                "name": name,
                "display_name": query.get("display_name") or name,
                "description": query.get("description", ""),
                "pipeline_spec": spec,
            },
        )

    # -- experiments -------------------------------------------------------------------

    def _experiment_service_create_experiment(self, path: Any, query: Any, body: Any) -> Any:
        if not body.get("display_name"):
            raise Refused(400, 3, "The experiment's name is empty")
        self._new_name("experiments", body["display_name"], namespace=body.get("namespace", ""))
        return self._add("experiments", {**body, "storage_state": "AVAILABLE"})

    def _experiment_service_list_experiments(self, path: Any, query: Any, body: Any) -> Any:
        return self._page("experiments", query, self._in_namespace(query))

    # -- runs --------------------------------------------------------------------------

    def _run_service_create_run(self, path: Any, query: Any, body: Any) -> Any:
        if not body.get("display_name"):
            raise Refused(400, 3, "The run name is empty. Please specify a valid name")
        self._get("experiments", body.get("experiment_id", ""))
        version = self._version(body.get("pipeline_version_reference"))
        self._check_parameters(version, body)
        state = self.modes.states[0]
        run = self._add(
            "runs",
            {
                **body,
                "service_account": body.get("service_account") or DEFAULT_ACCOUNT,
                "state": state,
                "storage_state": "AVAILABLE",
                "state_history": [{"update_time": _now(), "state": state}],
            },
        )
        self.on_run(run)
        return run

    def _run_service_list_runs(self, path: Any, query: Any, body: Any) -> Any:
        if self.modes.multi_user and not query.get("namespace") and not query.get("experiment_id"):
            raise Refused(400, 3, "A run cannot have an empty namespace in multi-user mode")
        wanted = query.get("experiment_id", "")
        return self._page("runs", query, lambda each: not wanted or each["experiment_id"] == wanted)

    def _run_service_get_run(self, path: Any, query: Any, body: Any) -> Any:
        run = self._get("runs", path["run_id"])
        reads = self._reads[run["run_id"]] = self._reads.get(run["run_id"], 0) + 1
        states = self.modes.states
        run["state"] = states[min(reads, len(states) - 1)]
        run["run_details"] = {"task_details": self._tasks(run)}
        if run["state"] == "FAILED":
            run["error"] = {"code": 2, "message": "a task failed"}
        return run

    def _run_service_delete_run(self, path: Any, query: Any, body: Any) -> Any:
        run = self._get("runs", path["run_id"])
        self.deleted_runs.append(run)
        self._drop("runs", run)
        return {}

    def _run_service_terminate_run(self, path: Any, query: Any, body: Any) -> Any:
        self._get("runs", path["run_id"])["state"] = "CANCELED"
        return {}

    def _tasks(self, run: Mapping[str, Any]) -> list[dict[str, Any]]:
        last = len(self.modes.tasks) - 1
        details = []
        for place, name in enumerate(self.modes.tasks):
            state = run["state"]
            if state == "FAILED" and place < last:
                state = "SUCCEEDED"
            elif state == "RUNNING" and place:
                state = "PENDING"
            task = {"run_id": run["run_id"], "task_id": f"{name}-{place}", "display_name": name, "state": state}
            task["create_time"] = run["created_at"]
            if state == "FAILED":
                task["error"] = {"code": 2, "message": "exit code 1"}
            details.append(task)
        return details

    # -- recurring runs ----------------------------------------------------------------

    def _recurring_run_service_create_recurring_run(self, path: Any, query: Any, body: Any) -> Any:
        if not body.get("display_name"):
            raise Refused(400, 3, "The recurring run's name is empty")
        if not 1 <= int(body.get("max_concurrency", "0")) <= 10:
            raise Refused(400, 3, "The max concurrency of the recurring run is out of range (1-10)")
        fields = len(body.get("trigger", {}).get("cron_schedule", {}).get("cron", "").split())
        if not 5 <= fields <= 6:
            raise Refused(400, 3, f"Schedule cron is not a supported format: Expected 5 to 6 fields, found {fields}")
        self._get("experiments", body.get("experiment_id", ""))
        self._check_parameters(self._version(body.get("pipeline_version_reference")), body)
        enabled = body.get("mode") != "DISABLE"
        answer = self._add(
            "recurring_runs",
            {
                **body,
                "service_account": body.get("service_account") or DEFAULT_ACCOUNT,
                "status": "ENABLED" if enabled else "DISABLED",
                "updated_at": _now(),
            },
        )
        self._count_enabled(body["display_name"])
        return answer

    def _recurring_run_service_list_recurring_runs(self, path: Any, query: Any, body: Any) -> Any:
        return self._page("recurring_runs", query, lambda each: True)

    def _recurring_run_service_enable_recurring_run(self, path: Any, query: Any, body: Any) -> Any:
        return self._switch(path, enabled=True)

    def _recurring_run_service_disable_recurring_run(self, path: Any, query: Any, body: Any) -> Any:
        return self._switch(path, enabled=False)

    def _recurring_run_service_delete_recurring_run(self, path: Any, query: Any, body: Any) -> Any:
        self._drop("recurring_runs", self._get("recurring_runs", path["recurring_run_id"]))
        self.deletions.append(dict(query))
        return {}

    def _switch(self, path: Mapping[str, str], *, enabled: bool) -> Any:
        found = self._get("recurring_runs", path["recurring_run_id"])
        found["mode"] = "ENABLE" if enabled else "DISABLE"
        found["status"] = "ENABLED" if enabled else "DISABLED"
        self._count_enabled(found["display_name"])
        return {}

    def _count_enabled(self, name: str) -> None:
        same = [each for each in self.records["recurring_runs"].values() if each["display_name"] == name]
        enabled = sum(each["status"] == "ENABLED" for each in same)
        self.most_enabled[name] = max(enabled, self.most_enabled.get(name, 0))

    # -- records -----------------------------------------------------------------------

    def _add(self, kind: str, record: dict[str, Any]) -> dict[str, Any]:
        key = str(uuid.uuid4())
        record = {**record, KINDS[kind]: key, "created_at": _now()}
        self.records[kind][key] = record
        self._names.setdefault((kind, record["display_name"]), []).append(key)
        return record

    def _drop(self, kind: str, record: Mapping[str, Any]) -> None:
        key = record[KINDS[kind]]
        del self.records[kind][key]
        self._names[kind, record["display_name"]].remove(key)

    def _get(self, kind: str, key: str) -> dict[str, Any]:
        if key not in self.records[kind]:
            raise Refused(404, 5, f"{kind} {key} not found")
        return self.records[kind][key]

    def _new_name(self, kind: str, name: str, *, namespace: str) -> None:
        if self.modes.multi_user and not namespace and kind == "experiments":
            raise Refused(400, 3, "In multi-user mode, experiment namespace cannot be empty")
        if len(name) > 128:
            raise Refused(400, 3, "The name is longer than 128 characters")
        if any(each.get("namespace", "") == namespace for each in self._called(kind, name)):
            raise Refused(409, 6, f"The name {name} already exists")

    def _called(self, kind: str, name: str) -> list[dict[str, Any]]:
        return [self.records[kind][key] for key in self._names.get((kind, name), [])]

    def _in_namespace(self, query: Mapping[str, str]) -> Callable[[Mapping[str, Any]], bool]:
        wanted = query.get("namespace", "")
        return lambda each: not self.modes.multi_user or each.get("namespace", "") == wanted

    def _version(self, reference: Mapping[str, str] | None) -> dict[str, Any]:
        if not reference:
            raise Refused(400, 3, "no pipeline version")
        return self._get("pipeline_versions", reference.get("pipeline_version_id", ""))

    def _check_parameters(self, version: Mapping[str, Any], body: Mapping[str, Any]) -> None:
        spec = version["pipeline_spec"].get("pipeline_spec", version["pipeline_spec"])
        known = spec.get("root", {}).get("inputDefinitions", {}).get("parameters", {})
        given = body.get("runtime_config", {}).get("parameters", {})
        if set(given) - set(known):
            raise Refused(400, 3, f"parameter(s) not found in the pipeline: {sorted(set(given) - set(known))}")
        needed = {name for name, each in known.items() if "defaultValue" not in each and not each.get("isOptional")}
        if needed - set(given):
            raise Refused(400, 3, f"parameter(s) missing: {sorted(needed - set(given))}")

    def _page(self, kind: str, query: Mapping[str, str], keep: Callable[[Mapping[str, Any]], bool]) -> dict[str, Any]:
        found = [each for each in self._filtered(kind, query.get("filter", "")) if keep(each)]
        start = int(query.get("page_token") or 0)
        size = min(int(query.get("page_size") or 20), self.modes.page_size)
        # The published API writes this one name in another way.
        key = "recurringRuns" if kind == "recurring_runs" else kind
        page: dict[str, Any] = {key: found[start : start + size], "total_size": len(found)}
        if start + size < len(found):
            page["next_page_token"] = str(start + size)
        return page

    def _filtered(self, kind: str, text: str) -> list[dict[str, Any]]:
        if not text:
            return list(self.records[kind].values())
        try:
            content = json.loads(text)
        except ValueError as error:
            raise Refused(400, 3, f"the filter is no JSON: {error}") from error
        wrong = problems(content, "V2beta1Filter")
        if wrong:
            raise Refused(400, 3, "the filter is malformed: " + "; ".join(wrong))
        predicates = content.get("predicates", [])
        if len(predicates) != 1 or predicates[0]["key"] != "display_name" or predicates[0]["operation"] != "EQUALS":
            raise Refused(501, 12, "only display_name EQUALS is served")
        return self._called(kind, predicates[0]["string_value"])


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
