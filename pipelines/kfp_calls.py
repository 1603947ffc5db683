"""One request to the KFP API: with a timeout, with a typed error, and again only where it changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import urllib3
from kfp_server_api import ApiException
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from pipelines.kfp_errors import (
    AlreadyThere,
    AnswerLost,
    EndpointDenied,
    EndpointUnreachable,
    EndpointUntrusted,
    KfpError,
    LoginNeeded,
    NotKfpV2,
    NotOnCluster,
    RequestRejected,
    ServerFailed,
)
from pipelines.kfp_settings import KfpSettings

_JSON = ("application/json", "text/json")


def call(function: Callable[..., Any], settings: KfpSettings, what: str, /, *arguments: Any, **named: Any) -> Any:
    """The answer of one generated ``…_with_http_info`` function; it is called once.

    Args:
        what: the request as a clause for messages, ``"create run nightly-7"``.
        named: query parameters; empty ones are not sent.

    Raises:
        KfpError: see :mod:`pipelines.kfp_errors`.
    """
    named = {name: value for name, value in named.items() if value not in (None, "")}
    timeouts = (settings.connect_timeout_s, settings.read_timeout_s)
    try:
        answer, _, headers = function(*arguments, **named, _request_timeout=timeouts)
    except ApiException as error:
        raise _from_status(error, what) from error
    except urllib3.exceptions.HTTPError as error:
        raise from_transport(error, what, settings) from error
    except (ValueError, TypeError, AttributeError) as error:
        # So fails the generated client on text that it cannot decode and on JSON of another shape.
        raise _not_understood(what, error) from error
    if answer is None:
        raise _not_understood(what, "nothing")
    kind = str(headers.get("Content-Type", "")).split(";")[0].strip().lower()
    if kind not in _JSON:
        # The generated client would turn a login page into an empty object.
        raise NotKfpV2(
            f"the answer to {what!r} is not JSON",
            expected="the KFP v2 API",
            got=kind or "no content type",
            hint="Is the endpoint the address of the user interface, or of a login page? Name that of the API",
        )
    return answer


def reading(function: Callable[..., Any], settings: KfpSettings, what: str, /, *arguments: Any, **named: Any) -> Any:
    """:func:`call`, and again while the endpoint is unreachable: only for requests that may be made twice."""
    again = Retrying(
        retry=retry_if_exception_type(EndpointUnreachable),
        stop=stop_after_attempt(settings.attempts),
        wait=wait_exponential_jitter(settings.retry_wait_s, settings.retry_wait_max_s, jitter=settings.retry_wait_s),
        reraise=True,
    )
    return again(call, function, settings, what, *arguments, **named)


def from_transport(error: Exception, what: str, settings: KfpSettings) -> KfpError:
    """The typed error for what urllib3 raised."""
    reason = getattr(error, "reason", None) or error
    where = settings.endpoint or f"kube context {settings.kube_context}"
    if isinstance(reason, urllib3.exceptions.SSLError):
        return EndpointUntrusted(
            f"{where} cannot be trusted: {what}",
            expected="a certificate that this machine trusts, of this host",
            got=_short(reason),
            hint="Name the PEM file of your authority by --ca-file or KFP_CA_FILE",
        )
    # A timeout of the connection is, in urllib3's classes, no failed connection.
    unreached = (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError)
    if isinstance(reason, unreached):
        return EndpointUnreachable(
            f"{where} is not reachable: {what}",
            expected=f"a connection within {settings.connect_timeout_s:g} s",
            got=_short(reason),
            hint="Check the address, the network policy, and that the ml-pipeline service runs",
        )
    return AnswerLost(
        f"{where} gave no answer: {what}",
        expected=f"an answer within {settings.read_timeout_s:g} s",
        got=_short(reason),
        hint="It may have been carried out; ask again by the same name, nothing is done twice",
    )


def _from_status(error: ApiException, what: str) -> KfpError:
    status = int(error.status or 0)
    if not status:
        return _not_understood(what, error.reason)
    got = f"{status} {_message(error)}".strip()
    if status == 401 or 300 <= status < 400:
        return LoginNeeded(
            f"{what}: not logged in",
            expected="a valid token, kube context or dex session",
            got="a redirect to a login page" if status != 401 else got,
            hint="Give --token-file, --kube-context or --dex-username; a token may have expired",
        )
    if status == 403:
        return EndpointDenied(
            f"{what}: not allowed",
            expected="credentials that may do this in this namespace",
            got=got,
            hint="Check --namespace and the role binding of this account",
        )
    if status in (404, 405, 501) and not _is_json(error):
        return NotKfpV2(
            f"{what}: this endpoint does not know the KFP v2 API",
            expected="Kubeflow Pipelines 2.x under /apis/v2beta1",
            got=got,
            hint="KFP 1.x is not supported; or the endpoint lacks its path, often /pipeline",
        )
    return _refusal(status, what, got)


def _refusal(status: int, what: str, got: str) -> KfpError:
    """The error for what the API itself answers."""
    if status == 404:
        return NotOnCluster(f"{what}: not found", expected="something that is there", got=got)
    if status == 409:
        return AlreadyThere(f"{what}: there already", expected="a name that is free", got=got)
    if status == 429 or status >= 500:
        return ServerFailed(
            f"{what}: the endpoint failed", expected="an answer", got=got, hint="Look at the log of ml-pipeline"
        )
    return RequestRejected(f"{what}: rejected", expected="a request that the endpoint accepts", got=got)


def _not_understood(what: str, got: object) -> NotKfpV2:
    return NotKfpV2(
        f"the answer to {what!r} is not understood", expected="an answer of the KFP v2 API", got=str(got)[:200]
    )


def _is_json(error: ApiException) -> bool:
    return str((error.headers or {}).get("Content-Type", "")).split(";")[0].strip().lower() in _JSON


def _message(error: ApiException) -> str:
    """What the endpoint says, shortened; of a page that is no JSON, only the reason."""
    try:
        body = json.loads(error.body or "")
    except ValueError:
        return str(error.reason or "")
    message = body.get("message") or body.get("error") if isinstance(body, dict) else None
    return str(message or error.reason or "")[:400]


def _short(reason: object) -> str:
    # urllib3 puts the address of a Python object first.
    return str(reason).rpartition(">: ")[2][:200] or type(reason).__name__
