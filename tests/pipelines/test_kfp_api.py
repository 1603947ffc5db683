"""The connection to a KFP API: every way in, and every way in which it can fail."""

from __future__ import annotations

import ipaddress
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from defense_core.errors import EXIT_UNKNOWN, EXIT_USAGE, ConfigError
from pipelines.dex_session import origin
from pipelines.kfp_api import KfpClient, connect
from pipelines.kfp_errors import (
    AnswerLost,
    EndpointDenied,
    EndpointUnreachable,
    EndpointUntrusted,
    LoginNeeded,
    NotKfpV2,
    NotOnCluster,
    ServerFailed,
)
from pipelines.kfp_settings import KfpSettings, settings_from
from tests.pipelines.kfp_server import openapi
from tests.pipelines.kfp_server.http_server import KfpServer

Settings = Callable[..., KfpSettings]
PASSWORD = "correct horse"


# -- the server itself ---------------------------------------------------------------------


def test_the_api_is_read_from_the_generated_client() -> None:
    names = {each.name for each in openapi.operations()}
    assert {"run_service_create_run", "upload_pipeline_version", "recurring_run_service_disable_recurring_run"} <= names
    assert len(names) >= 30
    found = openapi.find("POST", "/apis/v2beta1/recurringruns/abc:disable")
    assert found is not None
    assert found[0].name == "recurring_run_service_disable_recurring_run"
    assert found[1] == {"recurring_run_id": "abc"}
    listing = openapi.find("GET", "/apis/v2beta1/runs")
    assert listing is not None
    assert listing[0].query["page_size"] == "int"
    assert openapi.query_problems(listing[0], {"page_size": "x", "colour": "red"}) == [
        "query parameter page_size is no number: 'x'",
        "query parameter colour is not known",
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"display_name": "a", "colour": "red"}, "'colour' was unexpected"),
        ({"display_name": 7}, "7 is not of type 'string'"),
        ({"state": "DANCING"}, "'DANCING' is not one of"),
        ({"created_at": "yesterday"}, "'yesterday' is not a 'date-time'"),
        ({"runtime_config": {"parameters": []}}, "[] is not of type 'object'"),
        ({"run_details": {"task_details": [{"state": "NO"}]}}, "'NO' is not one of"),
    ],
)
def test_what_the_api_does_not_describe_is_a_violation(content: object, said: str) -> None:
    assert any(said in each for each in openapi.problems(content, "V2beta1Run"))


def test_a_wrong_request_is_refused_and_remembered() -> None:
    import requests

    with KfpServer() as server:
        answer = requests.post(f"{server.endpoint}/apis/v2beta1/runs", json={"colour": "red"}, timeout=10)
        missing = requests.get(f"{server.endpoint}/apis/v2beta1/colours", timeout=10)
    assert answer.status_code == 400
    assert missing.status_code == 404
    assert len(server.cluster.violations) == 2
    assert "'colour' was unexpected" in server.cluster.violations[0]


# -- settings ------------------------------------------------------------------------------


def test_settings_come_from_options_first_and_then_from_the_environment(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("abc\n")
    environment = {"KFP_ENDPOINT": "https://one", "KFP_NAMESPACE": "team", "KFP_TOKEN": "secret"}
    assert settings_from({}, environment).token == "secret"
    assert settings_from({}, {**environment, "KFP_TOKEN": "secret\n"}).token == "secret"
    assert settings_from({"endpoint": "https://two"}, environment).endpoint == "https://two"
    chosen = settings_from({"token_file": str(token)}, environment)
    assert (chosen.token, chosen.token_file, chosen.namespace) == ("", str(token), "team")
    context = settings_from({"kube_context": "prod"}, environment)
    assert (context.endpoint, context.token) == ("", "")
    password = tmp_path / "password"
    password.write_text(PASSWORD + "\n")
    dex = settings_from({"dex_username": "me", "dex_password_file": str(password)}, environment)
    assert (dex.dex_password, dex.token) == (PASSWORD, "")
    assert PASSWORD not in repr(dex)
    assert "secret" not in repr(settings_from({}, environment))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no Kubeflow Pipelines endpoint"),
        ({"endpoint": "kubeflow.example.com"}, "the endpoint is malformed"),
        ({"endpoint": "https://host:99999"}, "the endpoint is malformed"),
        ({"endpoint": "https://me:pw@host"}, "no user or password"),
        ({"endpoint": "https://host?x=1"}, "no ?"),
        ({"endpoint": "https://host", "token": "a", "dex_username": "b", "dex_password": "c"}, "authentication"),
        ({"endpoint": "https://host", "token": "pw\n"}, "token is out of range"),
        ({"endpoint": "https://host", "token": "pw ü"}, "token is out of range"),
        ({"endpoint": "https://host", "kube_context": "c"}, "endpoint is out of range"),
        ({"endpoint": "https://host", "dex_username": "b"}, "dex login"),
        ({"endpoint": "http://host", "dex_username": "b", "dex_password": "c"}, "https, because a password is sent"),
        ({"endpoint": "https://host", "token_file": "/nowhere"}, "token_file"),
        ({"endpoint": "https://host", "read_timeout_s": 0}, "read_timeout_s"),
    ],
)
def test_bad_settings_are_refused_before_any_request(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")) as error:
        KfpSettings(**given)  # type: ignore[arg-type]
    assert "pw" not in str(error.value)


def test_a_password_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        settings_from({"endpoint": "https://h", "dex_username": "a", "dex_password_file": str(tmp_path / "no")}, {})


# -- token ---------------------------------------------------------------------------------


def test_a_token_opens_and_its_lack_is_said(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.cluster.modes.token = "t0ken"
    assert not connect(kfp_settings(token="t0ken")).health().multi_user
    for wrong in ({}, {"token": "other-t0ken-value"}):
        with pytest.raises(LoginNeeded, match="not logged in") as error:
            connect(kfp_settings(**wrong))
        assert error.value.exit_code == EXIT_USAGE
        assert "401" in str(error.value)
        assert "other-t0ken-value" not in str(error.value)
    assert kfp.cluster.requests == ["healthz_service_get_healthz"] * 2


def test_a_token_file_is_read_anew_for_every_request(kfp: KfpServer, kfp_settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    kfp.cluster.modes.token = "first"
    client = connect(kfp_settings(token_file=str(file)))
    kfp.cluster.modes.token = "second"
    with pytest.raises(LoginNeeded):
        client.health()
    file.write_text("second\n")
    client.health()
    file.write_text("two words")
    with pytest.raises(ConfigError, match="holds no token"):
        client.health()
    file.unlink()
    with pytest.raises(ConfigError, match="cannot read the token"):
        client.health()


def test_forbidden_is_not_tried_again(kfp: KfpServer, kfp_client: KfpClient) -> None:
    kfp.cluster.modes.forbidden = True
    with pytest.raises(EndpointDenied, match="not allowed") as error:
        kfp_client.find_pipeline("a")
    assert not isinstance(error.value, LoginNeeded)
    assert "--namespace" in str(error.value)


# -- kube context --------------------------------------------------------------------------


def kube_configuration(folder: Path, endpoint: str, token: str) -> Path:
    path = folder / "kubeconfig"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": endpoint}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "prod", "context": {"cluster": "c", "user": "u"}}],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_kube_context_goes_through_the_api_server(
    kfp: KfpServer, kfp_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kfp.cluster.modes.token = "kube-token"
    monkeypatch.setenv("KUBECONFIG", str(kube_configuration(tmp_path, kfp.endpoint, "kube-token")))
    client = connect(kfp_settings(kube_context="prod"))
    assert client.create_experiment("e") == client.find_experiment("e")
    with pytest.raises(ConfigError, match="kube context other is not usable"):
        connect(kfp_settings(kube_context="other"))
    (tmp_path / "kubeconfig").write_text("clusters: [")
    with pytest.raises(ConfigError, match="kube context prod is not usable"):
        connect(kfp_settings(kube_context="prod"))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="kube context prod is not usable"):
        connect(kfp_settings(kube_context="prod"))


# -- dex -----------------------------------------------------------------------------------


def test_a_dex_session_is_made_by_the_login_form_and_again_when_it_ends(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.cluster.modes.dex = ("me@example.com", PASSWORD)
    client = connect(kfp_settings(dex_username="me@example.com", dex_password=PASSWORD))
    assert client.find_experiment("none") == ""
    assert kfp.dex.logins == 1
    kfp.dex.sessions.clear()
    made = client.create_experiment("e")
    assert kfp.dex.logins == 2
    assert client.find_experiment("e") == made
    assert kfp.dex.logins == 2


def test_a_wrong_password_is_sent_once(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.cluster.modes.dex = ("me@example.com", PASSWORD)
    with pytest.raises(EndpointDenied, match=r"dex refuses the login of me@example\.com") as error:
        connect(kfp_settings(dex_username="me@example.com", dex_password="wrong one"))
    assert "wrong one" not in str(error.value)
    assert kfp.dex.logins == 0


def test_the_password_goes_to_no_other_host(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.cluster.modes.dex, kfp.cluster.modes.dex_elsewhere = ("me", PASSWORD), True
    with pytest.raises(EndpointDenied, match="the login leads to another host"):
        connect(kfp_settings(dex_username="me", dex_password=PASSWORD))


def test_without_credentials_a_redirect_to_the_login_is_said(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.cluster.modes.dex = ("me", PASSWORD)
    with pytest.raises(LoginNeeded, match="a redirect to a login page"):
        connect(kfp_settings())


@pytest.mark.parametrize(
    ("endpoint", "led_to", "same"),
    [
        ("https://kf.example.com:443", "https://kf.example.com/dex/auth", True),
        ("https://KF.example.com", "https://kf.example.com:443/dex/auth", True),
        ("https://kf.example.com:8443", "https://kf.example.com/dex/auth", False),
        ("https://kf.example.com", "http://kf.example.com/dex/auth", False),
        ("https://kf.example.com", "https://kf.example.com@elsewhere/dex/auth", False),
        ("https://kf.example.com", "https://kf.example.com:port/dex/auth", False),
        ("https://kf.example.com", "https://[kf.example.com/dex/auth", False),
    ],
)
def test_the_usual_port_is_no_other_host(endpoint: str, led_to: str, same: bool) -> None:
    assert (origin(endpoint) == origin(led_to)) is same


def test_dex_credentials_where_no_login_is_needed(kfp: KfpServer, kfp_settings: Settings) -> None:
    connect(kfp_settings(dex_username="me", dex_password=PASSWORD))
    assert kfp.dex.logins == 0


def test_a_page_that_is_no_login(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.cluster.modes.speaks = "html"
    with pytest.raises(NotKfpV2, match="there is no login form"):
        connect(kfp_settings(dex_username="me", dex_password=PASSWORD))


def test_dex_where_nothing_listens(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.stop()
    with pytest.raises(EndpointUnreachable, match="log in at"):
        connect(kfp_settings(dex_username="me", dex_password=PASSWORD))


# -- not there, not ready, not KFP ---------------------------------------------------------


def test_an_endpoint_that_refuses_connections(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.stop()
    with pytest.raises(EndpointUnreachable, match="is not reachable") as error:
        connect(kfp_settings())
    assert error.value.exit_code == EXIT_UNKNOWN
    assert not isinstance(error.value, AnswerLost)
    assert kfp.endpoint in str(error.value)
    assert "object at 0x" not in str(error.value)


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(EndpointUnreachable):
        connect(KfpSettings(endpoint="http://no-such-host.invalid", attempts=1))


def test_reads_are_repeated_until_the_endpoint_is_back(kfp: KfpServer, kfp_client: KfpClient) -> None:
    kfp.cluster.modes.fail = {"experiment_service_list_experiments": 3}
    assert kfp_client.find_experiment("e") == ""
    kfp.cluster.modes.fail = {"experiment_service_list_experiments": 4}
    with pytest.raises(ServerFailed, match="503 the database does not answer"):
        kfp_client.find_experiment("e")
    kfp.stop()
    back = threading.Timer(0.05, kfp.start)
    back.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            kfp_client.find_experiment("e")
            break
        except EndpointUnreachable:
            continue
    back.join()
    assert kfp_client.find_experiment("e") == ""


def test_a_creation_is_made_once(kfp: KfpServer, kfp_client: KfpClient) -> None:
    kfp.cluster.modes.fail = {"experiment_service_create_experiment": 1}
    with pytest.raises(ServerFailed):
        kfp_client.create_experiment("e")
    assert kfp.cluster.modes.fail == {"experiment_service_create_experiment": 0}
    assert kfp_client.find_experiment("e") == ""


def test_an_endpoint_that_is_down(kfp: KfpServer, kfp_client: KfpClient) -> None:
    kfp.cluster.modes.down = True
    with pytest.raises(ServerFailed, match="503") as error:
        kfp_client.health()
    assert error.value.exit_code == EXIT_UNKNOWN


def test_an_answer_that_takes_too_long_may_have_been_carried_out(kfp: KfpServer, kfp_settings: Settings) -> None:
    client = connect(kfp_settings(read_timeout_s=0.2, attempts=2))
    kfp.cluster.modes.delay_s = 1.0
    with pytest.raises(AnswerLost, match=r"gave no answer: create experiment e: expected an answer within 0.2 s"):
        client.create_experiment("e")
    kfp.cluster.modes.delay_s = 0.0
    assert client.find_experiment("e")


def test_a_server_that_never_answers() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        started = time.monotonic()
        with pytest.raises(AnswerLost):
            connect(KfpSettings(endpoint=endpoint, read_timeout_s=0.2, attempts=2, retry_wait_s=0.01))
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(("speaks", "said"), [("v1", "does not know the KFP v2 API"), ("html", "is not JSON")])
def test_something_else_answers(kfp: KfpServer, kfp_settings: Settings, speaks: str, said: str) -> None:
    kfp.cluster.modes.speaks = speaks
    with pytest.raises(NotKfpV2, match=said) as error:
        connect(kfp_settings())
    assert error.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("field", [("created_at", "yesterday"), ("run_details", {"task_details": 7})])
def test_an_answer_of_another_shape_is_not_guessed_at(
    kfp: KfpServer, kfp_client: KfpClient, monkeypatch: pytest.MonkeyPatch, field: tuple[str, object]
) -> None:
    monkeypatch.setattr(openapi, "problems", lambda value, kind: [])
    run = kfp.cluster._add("runs", {"display_name": "r", "experiment_id": "e", "state": "PENDING"})
    monkeypatch.setattr(kfp.cluster, "_run_service_get_run", lambda *_: {**run, field[0]: field[1]})
    with pytest.raises(NotKfpV2, match="is not understood"):
        kfp_client.get_run(run["run_id"])


@pytest.mark.parametrize("answer", [None, {}, {"display_name": "r"}])
def test_an_answer_without_an_id_is_no_run(
    kfp: KfpServer, kfp_client: KfpClient, monkeypatch: pytest.MonkeyPatch, answer: object
) -> None:
    monkeypatch.setattr(openapi, "problems", lambda value, kind: [])
    monkeypatch.setattr(kfp.cluster, "_run_service_get_run", lambda *_: answer)
    with pytest.raises(NotKfpV2):
        kfp_client.get_run("x")


def test_a_state_of_a_later_version_is_not_final(
    kfp: KfpServer, kfp_client: KfpClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openapi, "problems", lambda value, kind: [])
    run = kfp.cluster._add("runs", {"display_name": "r", "experiment_id": "e", "state": "PENDING"})
    kfp.cluster.modes.states = ("PENDING", "DANCING")
    found = kfp_client.get_run(run["run_id"])
    assert (found.state, found.finished) == ("DANCING", False)


def test_what_is_not_there(kfp_client: KfpClient) -> None:
    with pytest.raises(NotOnCluster, match="read run nothing: not found"):
        kfp_client.get_run("nothing")
    kfp_client.delete_run("nothing")
    kfp_client.delete_schedule("nothing")


def test_several_users_need_a_namespace(kfp: KfpServer, kfp_settings: Settings) -> None:
    kfp.cluster.modes.multi_user = True
    with pytest.raises(ConfigError, match="serves several users"):
        connect(kfp_settings())
    ours, theirs = connect(kfp_settings(namespace="ours")), connect(kfp_settings(namespace="theirs"))
    assert ours.create_experiment("e") != theirs.create_experiment("e")
    assert ours.find_experiment("e") != theirs.find_experiment("e")


def test_every_page_is_read(kfp: KfpServer, kfp_client: KfpClient) -> None:
    kfp.cluster.modes.page_size = 3
    experiment = kfp_client.create_experiment("e")
    for place in range(10):
        kfp.cluster._add("runs", {"display_name": "same", "experiment_id": experiment, "description": str(place)})
    kfp.cluster._add("runs", {"display_name": "same", "experiment_id": "another"})
    found = kfp_client.find_runs("same", experiment)
    assert {run.description for run in found} == {str(place) for place in range(10)}


# -- TLS -----------------------------------------------------------------------------------


def own_certificate(folder: Path) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kfp")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


def test_a_certificate_that_is_not_trusted_and_one_that_is(tmp_path: Path) -> None:
    certificate = own_certificate(tmp_path)
    with KfpServer(certificate=certificate) as server:
        assert server.endpoint.startswith("https://")
        for way in ({}, {"dex_username": "me", "dex_password": PASSWORD}):
            with pytest.raises(EndpointUntrusted, match="--ca-file") as error:
                connect(KfpSettings(endpoint=server.endpoint, attempts=1, **way))  # type: ignore[arg-type]
            assert error.value.exit_code == EXIT_USAGE
        trusted = KfpSettings(endpoint=server.endpoint, ca_file=str(certificate[0]))
        assert connect(trusted).find_experiment("e") == ""
        other = server.endpoint.replace("127.0.0.1", "localhost")
        with pytest.raises(EndpointUntrusted):
            connect(KfpSettings(endpoint=other, ca_file=str(certificate[0]), attempts=1))
