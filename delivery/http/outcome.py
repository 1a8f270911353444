"""Classifies a response status or an exception as an outcome, and an outcome as a final state.

The engine adds two outcomes without a request: REFUSED for a stored URL that is not allowed, and
INTERNAL_ERROR for a secret that it cannot decrypt.
"""

import errno
import http
import ssl
from functools import cache

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from core.lifecycle import DeliveryState, Outcome
from delivery.http.connection import AnswerWithheldError
from delivery.http.guard import refusal_of
from delivery.http.proxy import ProxyError

_NOT_HTTP = "the answer is not valid HTTP/1.1"
_WITHHELD = "1xx answers kept coming, and no final one"


@cache  # at most a thousand entries
def outcome_of_status(status: int) -> tuple[Outcome, str]:
    """Only 2xx is success. The text names redirects, because people expect us to follow them."""
    try:
        phrase = f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        phrase = str(status)
    if 200 <= status < 300:
        return Outcome.SUCCEEDED, phrase
    if 300 <= status < 400:
        return Outcome.HTTP_ERROR, f"{phrase}: redirects are not followed"
    return Outcome.HTTP_ERROR, phrase


def outcome_of_error(  # noqa: PLR0911 - a table, one row a return
    error: BaseException,
) -> tuple[Outcome, str] | None:
    """Return the outcome of a request without a response. None means an internal error."""
    if refusal_of(error) is not None:
        return Outcome.REFUSED, "the host's address is not a public one; it is never called"
    match error:
        case ProxyError():
            return _outcome_of_proxy(error)
        case OSError(errno=errno.EMFILE | errno.ENFILE | errno.ENOMEM | errno.ENOBUFS):
            return None
        case TimeoutError():
            return Outcome.TIMEOUT, "no answer within the timeout"
        case aiohttp.ClientConnectorDNSError():
            return Outcome.DNS_ERROR, "the host name does not resolve"
        case aiohttp.ClientConnectorCertificateError():
            return Outcome.TLS_ERROR, _certificate_detail(error.certificate_error)
        case ssl.SSLCertVerificationError():
            return Outcome.TLS_ERROR, _certificate_detail(error)
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return Outcome.TLS_ERROR, "the TLS handshake failed"
        case aiohttp.ClientConnectorError():
            return Outcome.CONNECTION_ERROR, _connect_detail(error.os_error)
        case aiohttp.ServerDisconnectedError():
            return Outcome.CONNECTION_ERROR, "the connection was closed before an answer came"
        case aiohttp.ClientOSError() | OSError():
            return Outcome.CONNECTION_ERROR, _connect_detail(error)
        case HttpProcessingError():
            withheld = isinstance(error, AnswerWithheldError)
            return Outcome.PROTOCOL_ERROR, _WITHHELD if withheld else _NOT_HTTP
    return None


def final_state(
    outcome: Outcome, status: int | None, backoff: float | None
) -> DeliveryState | None:
    """Return the final state of the delivery, or None for another attempt."""
    if outcome is Outcome.SUCCEEDED:
        return DeliveryState.DELIVERED
    if outcome is Outcome.REFUSED or status == http.HTTPStatus.GONE or backoff is None:
        return DeliveryState.FAILED
    return None


def endpoint_works(outcome: Outcome, status: int | None) -> bool | None:
    """Return whether the endpoint takes requests, or None if the outcome says nothing about it.

    Every response below 500 shows that it does, except 429 Too Many Requests.
    """
    if outcome in {Outcome.INTERNAL_ERROR, Outcome.REFUSED}:
        return None
    if status is None:
        return False
    return status < 500 and status != http.HTTPStatus.TOO_MANY_REQUESTS


def _outcome_of_proxy(error: ProxyError) -> tuple[Outcome, str]:
    """Errors of the operator's proxy are internal. Its report on the receiver is the receiver's."""
    match error.status:
        case None | http.HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            return Outcome.INTERNAL_ERROR, str(error)
        case 502 | 503 | 504:
            return Outcome.CONNECTION_ERROR, "the host cannot be reached"
    return Outcome.CONNECTION_ERROR, str(error)


def _certificate_detail(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate does not verify: {error.verify_message}"
    return "the certificate does not verify"


def _connect_detail(error: OSError) -> str:
    match error:
        case ConnectionRefusedError():
            return "connection refused"
        # On an open connection aiohttp keeps the number of an error and loses its class.
        case ConnectionResetError() | OSError(errno=errno.ECONNRESET | errno.EPIPE):
            return "connection reset"
    return "the host cannot be reached"
