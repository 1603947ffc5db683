"""Where the Kubeflow Pipelines endpoint is, and who asks: from options first, then from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from defense_core.config import require
from defense_core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

VARIABLES = {
    "endpoint": "KFP_ENDPOINT",
    "namespace": "KFP_NAMESPACE",
    "ca_file": "KFP_CA_FILE",
    "kube_context": "KFP_KUBE_CONTEXT",
    "token_file": "KFP_TOKEN_FILE",
    "token": "KFP_TOKEN",
    "dex_username": "KFP_DEX_USERNAME",
    "dex_password": "KFP_DEX_PASSWORD",
    "dex_password_file": "KFP_DEX_PASSWORD_FILE",
}
"""Setting by setting, the variable that gives it where no option does."""
_WAYS_IN = (("token", "token_file"), ("kube_context",), ("dex_username", "dex_password", "dex_password_file"))


@dataclass(frozen=True)
class KfpSettings:
    """How to reach a KFP v2 API and as whom. At most one of token, token file, kube context and dex login.

    Attributes:
        endpoint: ``https://host[:port][/path]``; empty only with ``kube_context``.
        namespace: of experiments and runs, on a multi-user installation; empty on a single-user one.
        ca_file: PEM file of the authorities that are trusted; empty: the well-known ones.
        token: bearer token.
        token_file: file that holds it; read anew for every request, because the kubelet renews it.
        kube_context: context of the kube configuration (``KUBECONFIG``); the API server is the way in.
        kube_namespace: where Kubeflow Pipelines is installed; only for ``kube_context``.
        dex_username, dex_password: for the login form of dex.
        connect_timeout_s, read_timeout_s: of one request, seconds.
        attempts: of a request that changes nothing; others are made once.
        retry_wait_s, retry_wait_max_s: first and longest wait between attempts, seconds.
    """

    endpoint: str = ""
    namespace: str = ""
    ca_file: str = ""
    token: str = field(default="", repr=False)
    token_file: str = ""
    kube_context: str = ""
    kube_namespace: str = "kubeflow"
    dex_username: str = ""
    dex_password: str = field(default="", repr=False)
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 30.0
    attempts: int = 4
    retry_wait_s: float = 0.5
    retry_wait_max_s: float = 8.0

    def __post_init__(self) -> None:
        if not self.endpoint and not self.kube_context:
            raise ConfigError(
                "no Kubeflow Pipelines endpoint",
                expected="--endpoint, KFP_ENDPOINT or --kube-context",
                got="none of them",
                hint="Name the address of the KFP API, for example https://kubeflow.example.com/pipeline",
            )
        if self.endpoint:
            _require_address(self.endpoint)
        # A header with anything else fails with a message that quotes it.
        usable = not self.token or bool(re.fullmatch(r"[!-~]+", self.token))
        require(usable, "token", "one word of ASCII characters", "something else")
        ways = [bool(self.token), bool(self.token_file), bool(self.kube_context), bool(self.dex_username)]
        require(sum(ways) <= 1, "authentication", "one of token, token file, kube context and dex login", sum(ways))
        require(not (self.endpoint and self.kube_context), "endpoint", "none with a kube context", self.endpoint)
        require(bool(self.dex_username) == bool(self.dex_password), "dex login", "a user name and a password", "one")
        parts = urlsplit(self.endpoint)
        secure = not self.dex_username or parts.scheme == "https" or parts.hostname in LOOPBACK
        require(secure, "dex login", "https, because a password is sent", parts.scheme)
        for name in ("ca_file", "token_file"):
            path = getattr(self, name)
            require(not path or Path(path).is_file(), name, "a file that can be read", repr(path))
        for name in ("connect_timeout_s", "read_timeout_s", "attempts"):
            require(getattr(self, name) > 0, name, "more than 0", getattr(self, name))


def settings_from(options: Mapping[str, str], environment: Mapping[str, str] | None = None) -> KfpSettings:
    """Settings from options, and from :data:`VARIABLES` for what no option gives.

    An option that says who asks (token file, kube context, dex user) puts away what the environment
    says about it, so that a variable left over in a shell cannot contradict the command.

    Raises:
        ConfigError: no endpoint, two ways to log in, a malformed address, a file that is not there.
    """
    variables = os.environ if environment is None else environment
    given = {name: value for name, value in options.items() if value}
    chosen = next((way for way in _WAYS_IN if any(name in given for name in way)), None)
    usable = set(VARIABLES)
    for way in _WAYS_IN:
        if chosen is not None and way is not chosen:
            usable -= set(way)
    if "kube_context" in given:
        usable.discard("endpoint")
    for name in sorted(usable - set(given)):
        if variables.get(VARIABLES[name]):
            given[name] = variables[VARIABLES[name]]
    if "token" in given:
        given["token"] = given["token"].strip()  # a secret that was made from a file ends with a line break
    # One secret may be given as a file and as a value; the file wins, it is the one that is renewed.
    if "token_file" in given:
        given.pop("token", None)
    password_file = given.pop("dex_password_file", "")
    if password_file:
        given["dex_password"] = _secret(password_file)
    return KfpSettings(**given)  # type: ignore[arg-type]  # every value is a string here


def _secret(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", expected="a file that holds a password", got=error) from error


def _require_address(endpoint: str) -> None:
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError("the endpoint is malformed", expected="https://host[:port][/path]", got=repr(endpoint)[:80])
    # The address itself is not shown: it holds a secret.
    require("@" not in parts.netloc, "endpoint", "no user or password in the address", "some")
    require(not parts.query and not parts.fragment, "endpoint", "no ? and no #", repr(endpoint))
