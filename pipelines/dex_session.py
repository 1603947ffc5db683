"""A session of Kubeflow's login, made through dex's login form as a browser would make it.

The password goes only to the endpoint's own origin: a redirect elsewhere ends the attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import requests

from pipelines.kfp_errors import AnswerLost, EndpointDenied, EndpointUnreachable, EndpointUntrusted, KfpError, NotKfpV2
from pipelines.kfp_settings import KfpSettings

MAX_STEPS = 12
"""Pages and redirects of one login; a loop has more."""


def log_in(settings: KfpSettings) -> str:
    """The ``Cookie`` header of a new session; empty where the endpoint asks for no login.

    Raises:
        EndpointDenied: the user name or password is refused, or the login leads to another host.
        NotKfpV2: there is no login form that is understood.
        EndpointUnreachable, AnswerLost, EndpointUntrusted: as for every request.
    """
    with requests.Session() as session:
        # Proxies and .netrc of the environment would send the password elsewhere.
        session.trust_env = False
        session.verify = settings.ca_file or True
        _Login(session, settings).run()
        return "; ".join(f"{cookie.name}={cookie.value}" for cookie in session.cookies)


class _Login:
    def __init__(self, session: requests.Session, settings: KfpSettings) -> None:
        self._session = session
        self._settings = settings
        self._home = settings.endpoint.rstrip("/") + "/apis/v2beta1/healthz"
        self._origin = origin(settings.endpoint)
        self._sent = False

    def run(self) -> None:
        """Follow redirects and forms until the API answers."""
        answer = self._ask("GET", self._home)
        for _ in range(MAX_STEPS):
            if answer.is_redirect:
                answer = self._ask("GET", _joined(answer.url, answer.headers["Location"]))
                continue
            if _is_json(answer) and answer.ok:
                return
            answer = self._next_page(answer)
        raise NotKfpV2(
            f"the login at {self._origin} does not end",
            expected=f"a session after at most {MAX_STEPS} pages",
            got=f"{urlsplit(answer.url).path} again",
            hint="Use a token: --token-file",
        )

    def _next_page(self, answer: requests.Response) -> requests.Response:
        path = urlsplit(answer.url).path
        form = _Form.of(answer.text)
        if {"login", "password"} <= set(form.fields):
            return self._send_password(answer, form)
        if "approval" in form.fields:
            return self._ask("POST", _joined(answer.url, form.action), {**form.fields, "approval": "approve"})
        if path.endswith("/dex/auth"):
            # The page that lists the ways to log in; dex's own passwords are the connector "local".
            parts = urlsplit(answer.url)
            return self._ask("GET", parts._replace(path=parts.path + "/local").geturl())
        if "oauth2/start" in answer.text or path.endswith("/oauth2/sign_in"):
            return self._ask("GET", _joined(answer.url, "/oauth2/start?rd=" + urlsplit(self._home).path))
        if answer.status_code in (401, 403):
            raise EndpointDenied(
                "the login is refused", expected="a dex session", got=f"{answer.status_code} at {path}"
            )
        raise NotKfpV2(
            f"there is no login form at {path}",
            expected="dex's login form, or the KFP v2 API",
            got=f"{answer.status_code}, a page without the fields login and password",
            hint="Use a token: --token-file",
        )

    def _send_password(self, answer: requests.Response, form: _Form) -> requests.Response:
        if self._sent:
            raise EndpointDenied(
                f"dex refuses the login of {self._settings.dex_username}",
                expected="a user name and a password that dex knows",
                got="the login form again",
                hint="Check --dex-username and the password",
            )
        self._sent = True
        filled = {**form.fields, "login": self._settings.dex_username, "password": self._settings.dex_password}
        return self._ask("POST", _joined(answer.url, form.action), filled)

    def _ask(self, method: str, url: str, fields: Mapping[str, str] | None = None) -> requests.Response:
        if origin(url) != self._origin:
            raise EndpointDenied(
                "the login leads to another host",
                expected=self._origin,
                got=origin(url),
                hint="A password is sent to the endpoint's own host only; use a token: --token-file",
            )
        timeouts = (self._settings.connect_timeout_s, self._settings.read_timeout_s)
        try:
            # Redirects are followed by hand: each is checked first.
            return self._session.request(method, url, data=fields, timeout=timeouts, allow_redirects=False)
        except requests.RequestException as error:
            raise self._error(error) from error

    def _error(self, error: requests.RequestException) -> KfpError:
        what, said = f"log in at {self._origin}", str(error)[:200]
        if isinstance(error, requests.exceptions.SSLError):
            return EndpointUntrusted(
                what,
                expected="a certificate that this machine trusts",
                got=said,
                hint="Name the PEM file of your authority by --ca-file",
            )
        if isinstance(error, requests.ReadTimeout):
            return AnswerLost(what, expected=f"an answer within {self._settings.read_timeout_s:g} s", got=said)
        return EndpointUnreachable(what, expected="a connection", got=said, hint="Check the address")


class _Form(HTMLParser):
    """The first form that has something to fill in or to confirm: its action and its fields."""

    def __init__(self) -> None:
        super().__init__()
        self.action = ""
        self.fields: dict[str, str] = {}
        self._inside = False
        self._done = False

    @classmethod
    def of(cls, page: str) -> _Form:
        form = cls()
        form.feed(page)
        return form

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if tag == "form" and not self._done:
            self._inside, self.action, self.fields = True, values.get("action", ""), {}
        elif tag in ("input", "button") and self._inside and values.get("name"):
            self.fields[values["name"]] = values.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "form" and self._inside:
            self._inside, self._done = False, bool(self.fields)


def origin(url: str) -> str:
    """Scheme, host and port as browsers compare them: the port of the scheme may be left out."""
    try:
        parts = urlsplit(url)
        number = parts.port
    except ValueError:
        return "an address that cannot be read"
    port = "" if number in (None, {"http": 80, "https": 443}.get(parts.scheme)) else f":{number}"
    host = parts.hostname or ""
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{port}"


def _joined(page: str, target: str) -> str:
    try:
        return urljoin(page, target)
    except ValueError:
        return target  # no address, so no one's origin: the caller refuses it


def _is_json(answer: requests.Response) -> bool:
    return bool(str(answer.headers.get("Content-Type", "")).split(";")[0].strip().lower() == "application/json")
