"""What can go wrong between this program and a Kubeflow Pipelines endpoint, one type for each."""

from __future__ import annotations

from defense_core.errors import EXIT_FAIL, EXIT_UNKNOWN, QuarantineError


class KfpError(QuarantineError):
    """The Kubeflow Pipelines endpoint cannot be used as asked."""


class EndpointUnreachable(KfpError):
    """The endpoint did not get the request: no such host, connection refused, no connection in time."""

    exit_code = EXIT_UNKNOWN


class AnswerLost(EndpointUnreachable):
    """The endpoint got the request and gave no answer in time, or dropped it: it may have been carried out."""


class ServerFailed(AnswerLost):
    """The endpoint, or what stands before it, answered 429 or 5xx: it may have been carried out."""


class EndpointUntrusted(KfpError):
    """TLS: the endpoint's certificate is not one that this machine trusts, or is another host's."""


class EndpointDenied(KfpError):
    """These credentials may not do this (401, 403), or the login was refused."""


class LoginNeeded(EndpointDenied):
    """There is no valid login (401, or a redirect to a login page): the request was not carried out."""


class NotKfpV2(KfpError):
    """What answers at the endpoint does not speak the KFP v2 API."""


class RequestRejected(KfpError):
    """The endpoint calls the request wrong (400, 413, 422)."""


class NotOnCluster(KfpError):
    """The endpoint has no such run, version or schedule (404)."""


class AlreadyThere(KfpError):
    """The endpoint has something of this name (409)."""

    exit_code = EXIT_FAIL


class RunConflict(KfpError):
    """A run of this name was submitted with other settings."""

    exit_code = EXIT_FAIL
