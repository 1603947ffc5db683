"""The login that stands before Kubeflow: a redirect, dex's pages, and a session cookie."""

from __future__ import annotations

import html
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

COOKIE = "authservice_session"


@dataclass(frozen=True)
class Page:
    """An answer of the login."""

    status: int
    text: str = ""
    location: str = ""
    cookie: str = ""


@dataclass
class Dex:
    """Sessions and logins under way."""

    sessions: set[str] = field(default_factory=set)
    logins: int = 0
    states: dict[str, str] = field(default_factory=dict)

    def knows(self, cookie: str) -> bool:
        """Whether the ``Cookie`` header holds a session."""
        found = SimpleCookie(cookie).get(COOKIE)
        return found is not None and found.value in self.sessions

    def to_login(self, path: str, elsewhere: str = "") -> Page:
        """The redirect that a request without a session gets."""
        state = secrets.token_hex(8)
        self.states[state] = path
        return Page(302, location=f"{elsewhere}/dex/auth?" + urlencode({"client_id": "kubeflow", "state": state}))

    def page(self, method: str, url: str, form: Mapping[str, str], account: tuple[str, str]) -> Page | None:
        """The page at ``url``; ``None`` where the login has none."""
        parts = urlsplit(url)
        state = parse_qs(parts.query).get("state", [""])[0]
        if not parts.path.startswith(("/dex/", "/authservice/")):
            return None
        if state not in self.states:
            return Page(400, "<p>Invalid state parameter</p>")
        asked = urlencode({"state": state})
        match method, parts.path:
            case "GET", "/dex/auth":
                return Page(200, f'<a href="/dex/auth/local?{asked}">Log in with Email</a>')
            case "GET", "/dex/auth/local":
                return Page(302, location=f"/dex/auth/local/login?back=&{asked}")
            case "GET", "/dex/auth/local/login":
                return Page(200, _form(parts.path, parts.query))
            case "POST", "/dex/auth/local/login":
                if (form.get("login"), form.get("password")) != account:
                    return Page(200, "<p>Invalid Email Address and password.</p>" + _form(parts.path, parts.query))
                return Page(303, location=f"/dex/approval?{asked}")
            case "GET", "/dex/approval":
                return Page(200, _approval(state))
            case "POST", "/dex/approval":
                if form.get("approval") != "approve" or form.get("req") != state:
                    return Page(400, "<p>Not approved</p>")
                return Page(303, location=f"/authservice/oidc/callback?code=1&{asked}")
            case "GET", "/authservice/oidc/callback":
                session = secrets.token_hex(16)
                self.sessions.add(session)
                self.logins += 1
                return Page(302, location=self.states.pop(state), cookie=f"{COOKIE}={session}; Path=/; HttpOnly")
        return Page(404, "<p>no such page</p>")


def _form(path: str, query: str) -> str:
    action = html.escape(f"{path}?{query}")
    return (
        f'<form method="post" action="{action}"><input type="text" name="login"/>'
        '<input type="password" name="password"/><button type="submit">Login</button></form>'
    )


def _approval(state: str) -> str:
    forms = [
        f'<form method="post"><input type="hidden" name="req" value="{state}"/>'
        f'<input type="hidden" name="approval" value="{value}"/><button type="submit">{value}</button></form>'
        for value in ("approve", "rejected")
    ]
    return "".join(forms)
