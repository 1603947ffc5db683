"""deploy/: every overlay is built, validated against Kubernetes' own schemas, and held to what the pages promise."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

from defense_core import __version__
from pipelines import cli
from pipelines.node_pools import POOLS, parse_node_pools
from pipelines.resources import component_names
from pipelines.triggers.app import PATH as WEBHOOKS
from pipelines.triggers.watch import read_watch

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
OVERLAYS = ("gke", "eks", "bare-metal", "dev")
KUBERNETES = ("1.30", "1.37")
UNKNOWN_KINDS = ("ExternalSecret",)
SYSTEM, RUNS = "quarantine-system", "quarantine"

SECRETS = {
    "quarantine-webhook": {"secret"},
    "mlflow-worker": {"username", "password"},
    "mlflow-sweep": {"username", "password"},
    "s3-sweep": {"access-key", "secret-key"},
    "quarantine-queue": {"url"},
}
"""Every secret of the deployment and its keys; docs/operations.md has the same table."""

Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    return [each for each in yaml.safe_load_all(text) if each]


def plain_files() -> list[Path]:
    """Manifests that are whole by themselves: no kustomization, no patch."""
    patches = {"hooks.yaml", "sweep.yaml", "identities.yaml"}
    found = sorted(DEPLOY.rglob("*.yaml"))
    return [
        path
        for path in found
        if path.name not in ("kustomization.yaml", "watch.yaml", "pools.yaml")
        and (path.parent.name == "base" or path.name not in patches)
    ]


def kustomize(folder: Path) -> str:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed; the base files are validated one by one without it")
    built = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert built.returncode == 0, built.stderr
    assert "deprecated" not in built.stderr
    return built.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with the files that git ignores, made as docs/operations.md says."""
    copy = tmp_path_factory.mktemp("deploy") / "deploy"
    shutil.copytree(DEPLOY, copy)
    for name, keys in SECRETS.items():
        component = "queue-secret-from-file" if name == "quarantine-queue" else "secrets-from-files"
        values = copy / "components" / component / "values"
        values.mkdir(exist_ok=True)
        (values / f"{name}.env").write_text("".join(f"{key}=made-up\n" for key in sorted(keys)))
    return copy


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, tree: Path) -> list[Manifest]:
    return documents(kustomize(tree / "overlays" / request.param))


def of_kind(manifests: list[Manifest], kind: str, namespace: str | None = None) -> list[Manifest]:
    return [
        each
        for each in manifests
        if each["kind"] == kind and (namespace is None or each["metadata"].get("namespace") == namespace)
    ]


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    for each in manifests:
        if each["kind"] == "Deployment":
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]
        elif each["kind"] == "CronJob":
            yield each["metadata"]["name"], each["spec"]["jobTemplate"]["spec"]["template"]["spec"]


def validate(manifest: Manifest) -> None:
    if manifest["kind"] not in UNKNOWN_KINDS:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


# -- schemas ---------------------------------------------------------------------------


def test_every_overlay_is_valid(overlay: list[Manifest]) -> None:
    assert len(overlay) > 30
    for manifest in overlay:
        validate(manifest)
    names = [(each["kind"], each["metadata"].get("namespace"), each["metadata"]["name"]) for each in overlay]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("path", plain_files(), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_is_valid_without_kubectl(path: Path) -> None:
    found = documents(path.read_text("utf-8"))
    assert found
    for manifest in found:
        validate(manifest)


def test_strict_validation_notices_a_misspelt_field(overlay: list[Manifest]) -> None:
    (deployment,) = of_kind(overlay, "Deployment")
    broken = {**deployment, "spec": {**deployment["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(broken)


# -- pod security ----------------------------------------------------------------------


def check_restricted(name: str, pod: Manifest) -> None:
    whole = pod["securityContext"]
    assert whole["runAsNonRoot"] is True, name
    assert whole["runAsUser"] == 65532, name
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}, name
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys(), name
    assert pod["automountServiceAccountToken"] is False, name
    assert pod["serviceAccountName"] != "default", name
    for volume in pod["volumes"]:
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret", "name"}
        assert volume.keys() <= allowed, volume
    for container in [*pod["containers"], *pod.get("initContainers", [])]:
        context = container["securityContext"]
        assert context["runAsNonRoot"] is True, container["name"]
        assert context["allowPrivilegeEscalation"] is False, container["name"]
        assert context["readOnlyRootFilesystem"] is True, container["name"]
        assert context["capabilities"] == {"drop": ["ALL"]}, container["name"]
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, container["name"]
        assert not context.get("privileged"), container["name"]
        assert all("hostPort" not in port for port in container.get("ports", []))
        assert "memory" in container["resources"]["limits"], container["name"]
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), container["name"]
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, container["name"]


def test_pods_satisfy_the_standard_restricted(overlay: list[Manifest]) -> None:
    found = dict(pods(overlay))
    assert set(found) == {"quarantine-hooks", "quarantine-sweep"}
    for name, pod in found.items():
        check_restricted(name, pod)


def test_base_pods_satisfy_it_without_kubectl() -> None:
    base = [each for path in plain_files() if path.parent.name == "base" for each in documents(path.read_text("utf-8"))]
    assert len(list(pods(base))) == 2
    for name, pod in pods(base):
        check_restricted(name, pod)


def test_namespaces_refuse_anything_less(overlay: list[Manifest]) -> None:
    namespaces = {each["metadata"]["name"]: each["metadata"]["labels"] for each in of_kind(overlay, "Namespace")}
    assert set(namespaces) == {SYSTEM, RUNS}
    for labels in namespaces.values():
        for mode in ("enforce", "audit", "warn"):
            assert labels[f"pod-security.kubernetes.io/{mode}"] == "restricted"
    used = {each["metadata"]["namespace"] for each in overlay if "namespace" in each["metadata"]}
    assert used == {SYSTEM, RUNS}


def test_no_namespace_loses_the_label_that_kubeflow_looks_for(overlay: list[Manifest]) -> None:
    """Kubeflow labels a profile's namespace ``kubeflow-profile`` there, once, and lets in nobody without it."""
    for each in of_kind(overlay, "Namespace"):
        assert "app.kubernetes.io/part-of" not in each["metadata"]["labels"], each["metadata"]["name"]


def test_each_namespace_has_a_quota_and_a_limit_range(overlay: list[Manifest]) -> None:
    for namespace in (SYSTEM, RUNS):
        assert of_kind(overlay, "ResourceQuota", namespace)
        assert of_kind(overlay, "LimitRange", namespace)


def test_a_budget_keeps_one_of_several_hooks_and_never_blocks_a_single_one(overlay: list[Manifest]) -> None:
    (deployment,) = of_kind(overlay, "Deployment")
    budgets = of_kind(overlay, "PodDisruptionBudget")
    assert len(budgets) == (1 if deployment["spec"]["replicas"] > 1 else 0)
    for budget in budgets:
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert budget["spec"]["minAvailable"] < deployment["spec"]["replicas"]


# -- references ------------------------------------------------------------------------


def secret_keys(manifests: list[Manifest]) -> dict[str, set[str]]:
    """What will be there: made from files, or by the External Secrets Operator."""
    found: dict[str, set[str]] = {}
    for each in of_kind(manifests, "Secret"):
        found[each["metadata"]["name"]] = set(each["data"])
    for each in of_kind(manifests, "ExternalSecret"):
        found[each["spec"]["target"]["name"]] = {row["secretKey"] for row in each["spec"]["data"]}
    return found


def generated(name: str, wanted: str) -> bool:
    """Whether ``name`` is ``wanted`` with the digest that kustomize adds."""
    return re.fullmatch(re.escape(wanted) + r"(-[a-z0-9]{10})?", name) is not None


def test_everything_that_a_pod_names_is_there(overlay: list[Manifest]) -> None:
    check_references(overlay)


def check_references(overlay: list[Manifest]) -> None:
    names = {kind: {each["metadata"]["name"] for each in of_kind(overlay, kind, SYSTEM)} for kind in
             ("ServiceAccount", "ConfigMap", "PersistentVolumeClaim")}  # fmt: skip
    secrets = secret_keys(overlay)
    used: dict[str, set[str]] = {}
    for _, pod in pods(overlay):
        assert pod["serviceAccountName"] in names["ServiceAccount"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for volume in volumes.values():
            if "configMap" in volume:
                assert volume["configMap"]["name"] in names["ConfigMap"]
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in names["PersistentVolumeClaim"]
            if "secret" in volume:
                used.setdefault(volume["secret"]["secretName"], set()).add("secret")
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys()
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in names["ConfigMap"]
            for variable in container.get("env", []):
                assert ("value" in variable) != ("valueFrom" in variable), variable
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    used.setdefault(reference["name"], set()).add(reference["key"])
    assert used
    for name, keys in used.items():
        (documented,) = [each for each in SECRETS if generated(name, each)]
        assert keys <= SECRETS[documented]
        assert name in secrets, f"{name} is made by nothing"
        assert keys <= secrets[name]
    claimed = {volume["persistentVolumeClaim"]["claimName"] for _, pod in pods(overlay) for volume in pod["volumes"]
               if "persistentVolumeClaim" in volume}  # fmt: skip
    assert claimed == names["PersistentVolumeClaim"], "a claim that nobody mounts costs and holds nothing"


def test_every_secret_is_documented_and_none_has_its_value_here() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    for name, keys in SECRETS.items():
        assert f"`{name}`" in page
        assert all(f"`{key}`" in page for key in keys), name
    for path in DEPLOY.rglob("*"):
        if path.is_file() and "values" not in path.parts:
            text = path.read_text("utf-8")
            assert not re.search(r"^kind: Secret$|stringData|BEGIN .*KEY|AKIA[0-9A-Z]{16}", text, re.MULTILINE), path
    for component in ("secrets-from-files", "queue-secret-from-file"):
        assert "/values/" in (DEPLOY / "components" / component / ".gitignore").read_text("utf-8")


@pytest.mark.parametrize(("name", "pools"), [("gke", "gke"), ("eks", "eks"), ("bare-metal", "bare_metal")])
def test_accounts_and_priorities_that_the_node_pools_name_are_there(tree: Path, name: str, pools: str) -> None:
    manifests = documents(kustomize(tree / "overlays" / name))
    file = yaml.safe_load((ROOT / "pipelines" / "pools" / f"{pools}.yaml").read_text("utf-8"))
    steps = [file["default"], *file["steps"].values()]
    accounts = {file["run_service_account"]} | {
        each["service_account"]["name"] for each in steps if "service_account" in each
    }
    assert accounts <= {each["metadata"]["name"] for each in of_kind(manifests, "ServiceAccount", RUNS)}
    assert file.get("namespace", RUNS) == RUNS
    priorities = {each["priority_class"] for each in steps if "priority_class" in each}
    assert priorities <= {each["metadata"]["name"] for each in of_kind(manifests, "PriorityClass")}
    assert (DEPLOY / "overlays" / name / "pools.yaml").read_text("utf-8") == (POOLS / f"{pools}.yaml").read_text(
        "utf-8"
    )


def test_the_worker_reads_the_node_pools_beside_the_watch_file(overlay: list[Manifest]) -> None:
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(overlay, "ConfigMap", SYSTEM)}
    pod = dict(pods(overlay))["quarantine-hooks"]
    (worker,) = [each for each in pod["containers"] if each["name"] == "worker"]
    settings = maps[worker["envFrom"][0]["configMapRef"]["name"]]
    named = PurePosixPath(settings["QUARANTINE_NODE_POOLS"])
    (mount,) = [each["name"] for each in worker["volumeMounts"] if each["mountPath"] == str(named.parent)]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount]
    file = maps[volume["configMap"]["name"]]
    assert "watch.yaml" in file
    found = parse_node_pools(yaml.safe_load(file[named.name]))
    assert settings.get("KFP_NAMESPACE", "") in ("", found.namespace or RUNS)
    for step in component_names():
        pod_settings = found.for_step(step)
        assert {"AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI"} <= (pod_settings.environment or {}).keys(), step
        account = () if pod_settings.service_account is None else pod_settings.service_account.grants
        granted = {*account, *(grant for each in pod_settings.secrets or () for grant in each.grants)}
        assert "evidence store" in granted, step


def test_the_base_has_the_pools_that_its_settings_name() -> None:
    shipped = (POOLS / "bare_metal.yaml").read_text("utf-8")
    assert (DEPLOY / "base" / "pools.yaml").read_text("utf-8") == shipped


def test_rights_are_bound_to_accounts_that_are_there_and_never_to_all(overlay: list[Manifest]) -> None:
    accounts = {
        (each["metadata"]["namespace"], each["metadata"]["name"]) for each in of_kind(overlay, "ServiceAccount")
    }
    roles = {each["metadata"]["name"] for each in of_kind(overlay, "Role", RUNS)}
    assert not of_kind(overlay, "ClusterRole")
    assert not of_kind(overlay, "ClusterRoleBinding")
    for binding in of_kind(overlay, "RoleBinding"):
        assert binding["roleRef"]["name"] in roles
        for subject in binding["subjects"]:
            assert (subject["namespace"], subject["name"]) in accounts
    for role in of_kind(overlay, "Role"):
        for rule in role["rules"]:
            assert "secrets" not in rule["resources"]
            assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}


def test_the_worker_may_remove_runs_and_nothing_else(overlay: list[Manifest]) -> None:
    (role,) = [each for each in of_kind(overlay, "Role", RUNS) if each["metadata"]["name"] == "quarantine-submit"]
    removing = [rule["resources"] for rule in role["rules"] if "delete" in rule["verbs"]]
    assert removing == [["runs"]]


# -- network ---------------------------------------------------------------------------

PORTS = {53, 80, 443, 988, 5000, 5432, 6443, 8080, 8887, 8888, 9000}
"""DNS, metadata and S3, Kubernetes API, MLflow, PostgreSQL, KFP, MinIO."""


def test_nothing_leaves_but_to_s3_mlflow_and_kfp(overlay: list[Manifest]) -> None:
    for namespace in (SYSTEM, RUNS):
        policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(overlay, "NetworkPolicy", namespace)}
        assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        assert {"dns", "mlflow", "s3", "kfp"} <= policies.keys()
        for name, spec in policies.items():
            for rule in spec.get("egress", []):
                assert rule.get("to"), f"{name} opens every address"
                assert {port["port"] for port in rule["ports"]} <= PORTS, name
                for peer in rule["to"]:
                    anywhere = peer.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
                    assert not anywhere or (name == "s3" and [port["port"] for port in rule["ports"]] == [443])
                    assert not anywhere or "169.254.0.0/16" in peer["ipBlock"]["except"]
            for rule in spec.get("ingress", []):
                assert rule.get("from"), f"{name} lets everybody in"
    assert not [each for each in of_kind(overlay, "NetworkPolicy", RUNS) if "ingress" in each["spec"]]


def test_only_whom_it_serves_reaches_a_service(overlay: list[Manifest]) -> None:
    system = {
        each["metadata"]["name"]: each["spec"]["podSelector"] for each in of_kind(overlay, "NetworkPolicy", SYSTEM)
    }
    assert system["kfp"] == {"matchLabels": {"app.kubernetes.io/name": "quarantine-hooks"}}
    assert system["s3"] == {"matchLabels": {"app.kubernetes.io/name": "quarantine-sweep"}}
    (mlflow,) = [each for each in of_kind(overlay, "NetworkPolicy", RUNS) if each["metadata"]["name"] == "mlflow"]
    (steps,) = mlflow["spec"]["podSelector"]["matchExpressions"]
    components = {path.parent.name for path in (ROOT / "components").glob("*/metadata.yaml")}
    assert {value.replace("-", "_") for value in steps["values"]} <= components
    assert steps["key"] == "model-quarantine/step"


def test_an_mlflow_outside_the_cluster_reaches_the_hook_and_nothing_else_of_it(tree: Path) -> None:
    built = documents(kustomize(tree / "overlays" / "eks"))
    (ingress,) = of_kind(built, "Ingress")
    (service,) = of_kind(built, "Service", SYSTEM)
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == (WEBHOOKS, "Exact")
    backend = path["backend"]["service"]
    assert backend["name"] == service["metadata"]["name"]
    assert backend["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    (allowed,) = [each for each in of_kind(built, "NetworkPolicy", SYSTEM) if each["metadata"]["name"] == "webhooks"]
    assert all("ipBlock" in peer for peer in allowed["spec"]["ingress"][0]["from"])


def test_kubeflow_can_be_told_to_let_the_worker_in(tree: Path) -> None:
    built = built_with(tree, "kubeflow-access")
    (added,) = of_kind(built, "NetworkPolicy", "kubeflow")
    (leaving,) = [each for each in of_kind(built, "NetworkPolicy", SYSTEM) if each["metadata"]["name"] == "kfp"]
    (rule,), (way,) = added["spec"]["ingress"], leaving["spec"]["egress"]
    assert rule["ports"] == way["ports"]
    (peer,), (target,) = rule["from"], way["to"]
    assert peer["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": SYSTEM}}
    assert peer["podSelector"] == leaving["spec"]["podSelector"]
    assert target["podSelector"] == added["spec"]["podSelector"]
    assert added["spec"]["policyTypes"] == ["Ingress"]


# -- what runs -------------------------------------------------------------------------


def options_of(words: list[str]) -> set[str]:
    command: Any = get_command(cli.app)
    for word in words:
        command = command.commands[word]
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def test_commands_and_their_options_exist(overlay: list[Manifest]) -> None:
    for _, pod in pods(overlay):
        for container in pod["containers"]:
            program, *rest = container["args"]
            assert program == "quarantine"
            words = [each for each in rest if re.fullmatch(r"[a-z]+", each)]
            given = {each.partition("=")[0] for each in rest if each.startswith("--")}
            assert given <= options_of(words), container["name"]
            assert container["image"].endswith(f"model-quarantine-hooks:{__version__}")


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_watch_files_are_usable(folder: str) -> None:
    watch = read_watch(DEPLOY / folder / "watch.yaml")
    assert [rule.register for rule in watch.rules] == ["quarantined"]


def built_with(tree: Path, *components: str) -> list[Manifest]:
    """The overlay bare-metal with further ``components``."""
    asking = tree / "overlays" / "asking"
    asking.mkdir()
    wanted = ", ".join(f"../../components/{each}" for each in components)
    (asking / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources: [../bare-metal]\ncomponents: [{wanted}]\n"
    )
    built = documents(kustomize(asking))
    shutil.rmtree(asking)
    for manifest in built:
        validate(manifest)
    return built


def sweep_with(tree: Path, component: str) -> Manifest:
    """The sweep's pod where an overlay takes ``component``."""
    return dict(pods(built_with(tree, component)))["quarantine-sweep"]


@pytest.mark.parametrize("component", ["verify", "verify-chain"])
def test_a_sweep_that_downloads_whole_versions_has_the_night_and_the_day(tree: Path, component: str) -> None:
    (cron,) = of_kind(built_with(tree, component), "CronJob")
    assert 43200 <= cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 86400


def test_the_queue_in_postgresql_goes_with_secrets_from_files(tree: Path) -> None:
    built = built_with(tree, "postgresql", "queue-secret-from-file")
    check_references(built)
    addresses = [
        variable["valueFrom"]["secretKeyRef"]["name"]
        for _, pod in pods(built)
        for container in pod["containers"]
        for variable in container["env"]
        if variable["name"] == "QUARANTINE_QUEUE"
    ]
    assert len(addresses) == 3
    assert all(generated(each, "quarantine-queue") for each in addresses)


def test_the_hook_takes_two_secrets_while_one_is_changed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pod = dict(pods(built_with(tree, "rotate-webhook")))["quarantine-hooks"]
    (hook,) = [each for each in pod["containers"] if each["name"] == "hook"]
    (files,) = [each["value"] for each in hook["env"] if each["name"] == "QUARANTINE_HOOK_SECRET_FILE"]
    folders = {mount["mountPath"]: mount["name"] for mount in hook["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    command: Any = get_command(cli.app)
    monkeypatch.setenv("QUARANTINE_HOOK_SECRET_FILE", files)
    named = command.commands["hooks"].commands["serve"].make_context("serve", []).params["secret_file"]
    secrets = [volumes[folders[str(path.parent)]]["secret"]["secretName"] for path in named]
    assert generated(secrets[0], "quarantine-webhook")
    assert secrets[1] == "quarantine-webhook-next"
    assert {path.name for path in named} == {"secret"}


def test_the_sweep_moves_aliases_only_where_that_was_asked_for(tree: Path, overlay: list[Manifest]) -> None:
    (sweep,) = [pod["containers"][0] for name, pod in pods(overlay) if name == "quarantine-sweep"]
    assert "--enforce" not in sweep["args"]
    enforcing = sweep_with(tree, "enforce")["containers"][0]
    assert enforcing["args"][-2:] == ["--enforce", "--journal=/var/lib/quarantine-sweep/journal.jsonl"]
    mounted = {mount["mountPath"] for mount in enforcing["volumeMounts"]}
    assert "/var/lib/quarantine-sweep" in mounted


@pytest.mark.parametrize(
    ("component", "option", "file"),
    [("verify", "--public-key", "signing.pub"), ("verify-chain", "--certificate-chain", "root.crt")],
)
def test_the_sweep_checks_signatures_where_it_is_told_whose(tree: Path, component: str, option: str, file: str) -> None:
    pod = sweep_with(tree, component)
    (container,) = pod["containers"]
    assert option in options_of(["sweep"])
    (given,) = [each for each in container["args"] if each.startswith(f"{option}=")]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert given == f"{option}={mounts['trust']['mountPath']}/{file}"
    assert mounts["trust"]["readOnly"]
    assert volumes["trust"]["configMap"]["name"] == "quarantine-trust"
    assert volumes["tmp"]["emptyDir"] == {"sizeLimit": "16Gi"}, "a version is downloaded whole"
    assert len(volumes) == len(pod["volumes"])


def test_no_probe_but_readiness_asks_the_queue(overlay: list[Manifest]) -> None:
    for container in dict(pods(overlay))["quarantine-hooks"]["containers"]:
        for probe in ("livenessProbe", "startupProbe"):
            assert container.get(probe, {}).get("httpGet", {}).get("path", "/healthz") == "/healthz", container["name"]
        assert "livenessProbe" in container


def test_a_sweep_that_ended_is_not_repeated(overlay: list[Manifest]) -> None:
    """Each attempt would hand over ``--max-enqueued`` pieces of work again."""
    (cron,) = of_kind(overlay, "CronJob")
    arguments = dict(pods(overlay))["quarantine-sweep"]["containers"][0]["args"]
    unknown = int(arguments[arguments.index("--exit-unknown") + 1])
    (rule,) = cron["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert {3, unknown} <= set(rule["onExitCodes"]["values"])
    assert unknown not in {0, 1, 2}, "2 is a registry that does not answer"
    assert 2 not in rule["onExitCodes"]["values"]


def test_a_nightly_sweep_submits_again_every_night(overlay: list[Manifest]) -> None:
    (cron,) = of_kind(overlay, "CronJob")
    assert re.fullmatch(r"\d+ \d+ \* \* \*", cron["spec"]["schedule"])
    arguments = dict(pods(overlay))["quarantine-sweep"]["containers"][0]["args"]
    hours = float(arguments[arguments.index("--reopen-after-h") + 1])
    assert hours < 24, "work is submitted minutes after the sweep of its night"


def test_a_sweep_on_the_queues_volume_runs_where_the_hook_runs(overlay: list[Manifest]) -> None:
    (cron,) = of_kind(overlay, "CronJob")
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    shares = any(volume["name"] == "queue" for volume in pod["volumes"])
    assert shares == ("affinity" in pod)
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    (deployment,) = of_kind(overlay, "Deployment")
    assert (deployment["spec"]["strategy"]["type"] == "Recreate") == shares
