"""A connection to a Kubeflow Pipelines v2 API: authentication, and the calls that this project makes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kfp_server_api as api
import urllib3

from defense_core.errors import ConfigError
from pipelines import kfp_records as records
from pipelines.dex_session import log_in
from pipelines.kfp_calls import call, reading
from pipelines.kfp_errors import LoginNeeded, NotKfpV2, NotOnCluster
from pipelines.kfp_settings import KfpSettings

PAGE_SIZE = 100
"""Records of one answer; there may be thousands of runs."""
_PROXY = "/api/v1/namespaces/{}/services/ml-pipeline:http/proxy"


@dataclass(frozen=True)
class Health:
    """What the endpoint says about itself."""

    multi_user: bool
    pipeline_store: str


class KfpClient:
    """The KFP API as one account; may be shared by threads.

    Every call raises :class:`~pipelines.kfp_errors.KfpError`. Calls that read are repeated while the endpoint
    is unreachable; calls that create or change are made once, because their answer may be all that was lost.
    """

    def __init__(self, settings: KfpSettings) -> None:
        self.settings = settings
        self._client = api.ApiClient(_configuration(settings))
        self._runs = api.RunServiceApi(self._client)
        self._schedules = api.RecurringRunServiceApi(self._client)
        self._experiments = api.ExperimentServiceApi(self._client)
        self._pipelines = api.PipelineServiceApi(self._client)
        self._uploads = api.PipelineUploadServiceApi(self._client)
        self._healthz = api.HealthzServiceApi(self._client)
        if settings.dex_username:
            self._client.cookie = log_in(settings)

    def health(self) -> Health:
        """Ask whether this is a KFP v2 endpoint that answers, and whether it needs a namespace.

        Raises:
            ConfigError: it serves several users, and no namespace is given.
        """
        answer = self._read(self._healthz.healthz_service_get_healthz_with_http_info, "ask for its health")
        found = Health(bool(answer.multi_user), answer.pipeline_store or "")
        if found.multi_user and not self.settings.namespace:
            raise ConfigError(
                "the endpoint serves several users",
                expected="--namespace or KFP_NAMESPACE",
                got="none",
                hint="Name the profile's namespace that the runs belong to",
            )
        return found

    # -- pipelines ---------------------------------------------------------------------

    def find_pipeline(self, name: str) -> str:
        """The id of the pipeline called ``name``; empty where there is none."""
        found = self._named(self._pipelines.pipeline_service_list_pipelines_with_http_info, "pipelines", name)
        return next((records.required(each.pipeline_id, "pipeline_id") for each in found), "")

    def create_pipeline(self, name: str, description: str) -> str:
        """The id of a new pipeline without versions. Raises AlreadyThere."""
        body = api.V2beta1Pipeline(name=name, display_name=name, description=description, **self._own_namespace())
        function = self._pipelines.pipeline_service_create_pipeline_with_http_info
        return records.required(self._change(function, f"create pipeline {name}", body).pipeline_id, "pipeline_id")

    def find_version(self, pipeline_id: str, name: str) -> records.PipelineVersion | None:
        """The version called ``name``; ``None`` where there is none."""
        function = self._pipelines.pipeline_service_list_pipeline_versions_with_http_info
        found = self._named(function, "pipeline_versions", name, pipeline_id, namespaced=False)
        return next((records.version_of(each) for each in found), None)

    def upload_version(self, pipeline_id: str, name: str, package: Path, description: str) -> records.PipelineVersion:
        """Upload ``package``, a compiled pipeline, as the version ``name``. Raises AlreadyThere."""
        answer = self._change(
            self._uploads.upload_pipeline_version_with_http_info,
            f"upload pipeline version {name}",
            str(package),
            name=name,
            display_name=name,
            pipelineid=pipeline_id,
            description=description,
        )
        return records.version_of(answer)

    # -- experiments -------------------------------------------------------------------

    def find_experiment(self, name: str) -> str:
        """The id of the experiment called ``name``; empty where there is none."""
        found = self._named(self._experiments.experiment_service_list_experiments_with_http_info, "experiments", name)
        return next((records.required(each.experiment_id, "experiment_id") for each in found), "")

    def create_experiment(self, name: str) -> str:
        """The id of a new experiment. Raises AlreadyThere."""
        body = api.V2beta1Experiment(display_name=name, **self._own_namespace())
        function = self._experiments.experiment_service_create_experiment_with_http_info
        return records.required(
            self._change(function, f"create experiment {name}", body).experiment_id, "experiment_id"
        )

    # -- runs --------------------------------------------------------------------------

    def find_runs(self, name: str, experiment_id: str) -> list[records.Run]:
        """Every run called ``name`` in the experiment, the earliest first."""
        function = self._runs.run_service_list_runs_with_http_info
        found = self._named(function, "runs", name, experiment_id=experiment_id, namespaced=False)
        return sorted((records.run_of(each) for each in found), key=lambda run: (run.created_at, run.run_id))

    def create_run(self, body: api.V2beta1Run) -> records.Run:
        """Create one run, without looking for another; see :func:`pipelines.submit.submit_run`."""
        function = self._runs.run_service_create_run_with_http_info
        return records.run_of(self._change(function, f"create run {body.display_name}", body))

    def get_run(self, run_id: str) -> records.Run:
        """The run with the state of its tasks. Raises NotOnCluster."""
        return records.run_of(self._read(self._runs.run_service_get_run_with_http_info, f"read run {run_id}", run_id))

    def delete_run(self, run_id: str) -> None:
        """Stop the run and remove it; one that is not there is no error."""
        try:
            self._read(self._runs.run_service_delete_run_with_http_info, f"delete run {run_id}", run_id)
        except NotOnCluster:
            return

    # -- schedules ---------------------------------------------------------------------

    def schedules(self, name: str = "") -> list[records.Schedule]:
        """Every schedule, or those called ``name``; the earliest first."""
        function = self._schedules.recurring_run_service_list_recurring_runs_with_http_info
        found = (records.schedule_of(each) for each in self._named(function, "recurring_runs", name))
        return sorted(found, key=lambda each: (each.created_at, each.schedule_id))

    def create_schedule(self, body: api.V2beta1RecurringRun) -> records.Schedule:
        """Create one schedule, without looking for another; see :func:`pipelines.schedule.apply_schedule`."""
        function = self._schedules.recurring_run_service_create_recurring_run_with_http_info
        return records.schedule_of(self._change(function, f"create schedule {body.display_name}", body))

    def enable_schedule(self, schedule_id: str, *, enabled: bool) -> None:
        """Let it start runs, or stop it from starting any. Raises NotOnCluster."""
        verb = "enable" if enabled else "disable"
        function = getattr(self._schedules, f"recurring_run_service_{verb}_recurring_run_with_http_info")
        self._read(function, f"{verb} schedule {schedule_id}", schedule_id)

    def delete_schedule(self, schedule_id: str) -> None:
        """Remove it; the runs that it started go on. One that is not there is no error."""
        function = self._schedules.recurring_run_service_delete_recurring_run_with_http_info
        try:
            # Kubernetes would otherwise remove what the schedule owns, and that is every run it has started.
            self._read(function, f"delete schedule {schedule_id}", schedule_id, propagation_policy="ORPHAN")
        except NotOnCluster:
            return

    # -- how ---------------------------------------------------------------------------

    def _own_namespace(self) -> dict[str, str]:
        return {"namespace": self.settings.namespace} if self.settings.namespace else {}

    def _named(
        self,
        function: Callable[..., Any],
        what: str,
        name: str,
        /,
        *arguments: str,
        namespaced: bool = True,
        **query: str,
    ) -> Iterator[Any]:
        """Every record called ``name`` (empty: every record), page by page."""
        if name:
            query["filter"] = _filter(name)
        if namespaced:
            query |= self._own_namespace()
        token = ""
        while True:
            page = self._read(
                function, f"list {what} {name}".strip(), *arguments, page_size=PAGE_SIZE, page_token=token, **query
            )
            for each in getattr(page, what) or []:
                # An old server may not know the filter; a foreign name must never pass for the own one.
                if not name or name in (each.display_name, getattr(each, "name", None)):
                    yield each
            if not page.next_page_token:
                return
            if page.next_page_token == token:
                raise NotKfpV2(f"listing {what} does not end", expected="another page", got="the same page")
            token = page.next_page_token

    def _read(self, function: Callable[..., Any], what: str, /, *arguments: Any, **query: Any) -> Any:
        return self._logged_in(reading, function, what, *arguments, **query)

    def _change(self, function: Callable[..., Any], what: str, /, *arguments: Any, **query: Any) -> Any:
        return self._logged_in(call, function, what, *arguments, **query)

    def _logged_in(
        self, way: Callable[..., Any], function: Callable[..., Any], what: str, /, *arguments: Any, **query: Any
    ) -> Any:
        try:
            return way(function, self.settings, what, *arguments, **query)
        except LoginNeeded:
            if not self.settings.dex_username:
                raise
        # A dex session ends after a day; the request was refused unread, so it may be made again.
        self._client.cookie = log_in(self.settings)
        return way(function, self.settings, what, *arguments, **query)


def connect(settings: KfpSettings) -> KfpClient:
    """A client whose endpoint answered, speaks the v2 API and has the namespace it needs."""
    client = KfpClient(settings)
    client.health()
    return client


def _filter(name: str) -> str:
    return json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "string_value": name}]})


def _configuration(settings: KfpSettings) -> api.Configuration:
    configuration = api.Configuration()
    configuration.host = settings.endpoint.rstrip("/")
    # A redirect leads to a login page, and must not be followed with a token; attempts are counted in kfp_calls.
    configuration.retries = urllib3.Retry(0, redirect=0, raise_on_redirect=False, raise_on_status=False)
    if settings.ca_file:
        configuration.ssl_ca_cert = settings.ca_file
    if settings.kube_context:
        _load_context(configuration, settings)
    elif settings.token_file:
        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.api_key["authorization"] = _token(settings.token_file)
        configuration.refresh_api_key_hook = lambda each: each.api_key.update(authorization=_token(settings.token_file))
    elif settings.token:
        configuration.api_key_prefix["authorization"] = "Bearer"
        configuration.api_key["authorization"] = settings.token
    return configuration


def _token(path: str) -> str:
    try:
        token = Path(path).read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the token in {path}", expected="a file with a token", got=error) from error
    if not token or len(token.split()) != 1:
        raise ConfigError(f"{path} holds no token", expected="one token", got=f"{len(token.split())} words")
    return token


def _load_context(configuration: api.Configuration, settings: KfpSettings) -> None:
    """The API server, its authority and this account, as kubectl would use them; then its proxy to the service."""
    import yaml
    from kubernetes import config

    try:
        config.load_kube_config(
            # kubernetes reads the variable only once, when it is imported.
            config_file=os.environ.get("KUBECONFIG") or None,
            context=settings.kube_context,
            client_configuration=configuration,
            persist_config=False,
        )
    except (config.ConfigException, OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"kube context {settings.kube_context} is not usable",
            expected="a context of the kube configuration",
            got=str(error)[:200],
            hint="See kubectl config get-contexts; KUBECONFIG names the file",
        ) from error
    configuration.host = configuration.host.rstrip("/") + _PROXY.format(settings.kube_namespace)
