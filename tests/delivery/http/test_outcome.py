"""The table from statuses and errors to outcomes, and from outcomes to final states."""

import errno
import socket
import ssl
from typing import Any
from unittest.mock import Mock

import aiohttp
import pytest
from aiohttp.http_exceptions import HttpProcessingError
from hypothesis import given
from hypothesis import strategies as st

from core.addresses import AddressClass
from core.lifecycle import DeliveryState, Outcome
from delivery.http.guard import AddressRefused
from delivery.http.outcome import (
    endpoint_works,
    final_state,
    outcome_of_error,
    outcome_of_status,
)

KEY: Any = Mock(host="10.1.2.3", port=443, ssl=True)


@pytest.mark.parametrize(
    ("status", "outcome", "detail"),
    [
        (200, Outcome.SUCCEEDED, "200 OK"),
        (204, Outcome.SUCCEEDED, "204 No Content"),
        (299, Outcome.SUCCEEDED, "299"),
        (0, Outcome.HTTP_ERROR, "0"),
        (101, Outcome.HTTP_ERROR, "101 Switching Protocols"),
        (199, Outcome.HTTP_ERROR, "199"),
        (300, Outcome.HTTP_ERROR, "300 Multiple Choices: redirects are not followed"),
        (307, Outcome.HTTP_ERROR, "307 Temporary Redirect: redirects are not followed"),
        (399, Outcome.HTTP_ERROR, "399: redirects are not followed"),
        (400, Outcome.HTTP_ERROR, "400 Bad Request"),
        (404, Outcome.HTTP_ERROR, "404 Not Found"),
        (410, Outcome.HTTP_ERROR, "410 Gone"),
        (429, Outcome.HTTP_ERROR, "429 Too Many Requests"),
        (500, Outcome.HTTP_ERROR, "500 Internal Server Error"),
        (599, Outcome.HTTP_ERROR, "599"),
        (999, Outcome.HTTP_ERROR, "999"),
    ],
)
def test_a_status_is_named_and_only_2xx_is_success(
    status: int, outcome: Outcome, detail: str
) -> None:
    assert outcome_of_status(status) == (outcome, detail)


@given(st.integers(0, 999))
def test_every_status_has_an_outcome_and_a_text(status: int) -> None:
    outcome, detail = outcome_of_status(status)
    assert (outcome is Outcome.SUCCEEDED) == (200 <= status <= 299)
    assert detail.startswith(str(status))


def _unverified(message: str) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed: somewhere in OpenSSL")
    error.verify_message = message
    return error


def _connector_error(os_error: OSError) -> aiohttp.ClientConnectorError:
    return aiohttp.ClientConnectorError(KEY, os_error)


ERRORS: list[tuple[BaseException, Outcome, str]] = [
    (TimeoutError(), Outcome.TIMEOUT, "no answer within the timeout"),
    (aiohttp.ConnectionTimeoutError(), Outcome.TIMEOUT, "no answer within the timeout"),
    (aiohttp.SocketTimeoutError(), Outcome.TIMEOUT, "no answer within the timeout"),
    (
        aiohttp.ClientConnectorDNSError(KEY, socket.gaierror(-2, "Name or service not known")),
        Outcome.DNS_ERROR,
        "the host name does not resolve",
    ),
    (
        aiohttp.ClientConnectorCertificateError(KEY, _unverified("certificate has expired")),
        Outcome.TLS_ERROR,
        "the certificate does not verify: certificate has expired",
    ),
    (
        aiohttp.ClientConnectorSSLError(KEY, ssl.SSLError(1, "wrong version number")),
        Outcome.TLS_ERROR,
        "the TLS handshake failed",
    ),
    (ssl.SSLError(1, "alert"), Outcome.TLS_ERROR, "the TLS handshake failed"),
    (
        _connector_error(ConnectionRefusedError(111, "refused")),
        Outcome.CONNECTION_ERROR,
        "connection refused",
    ),
    (
        _connector_error(ConnectionResetError(104, "reset")),
        Outcome.CONNECTION_ERROR,
        "connection reset",
    ),
    (
        _connector_error(OSError(113, "No route to host")),
        Outcome.CONNECTION_ERROR,
        "the host cannot be reached",
    ),
    (
        aiohttp.ServerDisconnectedError(),
        Outcome.CONNECTION_ERROR,
        "the connection was closed before an answer came",
    ),
    (
        aiohttp.ClientConnectionResetError("Cannot write to closing transport"),
        Outcome.CONNECTION_ERROR,
        "connection reset",
    ),
    (aiohttp.ClientOSError(104, "reset"), Outcome.CONNECTION_ERROR, "connection reset"),
    (BrokenPipeError(32, "pipe"), Outcome.CONNECTION_ERROR, "connection reset"),
    (
        HttpProcessingError(code=400, message="Expected HTTP/"),
        Outcome.PROTOCOL_ERROR,
        "the answer is not valid HTTP/1.1",
    ),
]


@pytest.mark.parametrize(
    ("error", "outcome", "detail"), ERRORS, ids=[type(row[0]).__name__ for row in ERRORS]
)
def test_an_error_is_classified_and_told_in_our_words(
    error: BaseException, outcome: Outcome, detail: str
) -> None:
    assert outcome_of_error(error) == (outcome, detail)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refused_address_is_refused_however_deep_and_not_named(wrapped: bool) -> None:
    error: Exception = AddressRefused(AddressClass.LOOPBACK)
    if wrapped:
        refusal, error = error, _connector_error(OSError("[None]"))
        error.__cause__ = refusal
    found = outcome_of_error(error)
    assert found is not None
    assert found[0] is Outcome.REFUSED
    assert "loopback" not in found[1]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("header"),
        RuntimeError("Session is closed"),
        KeyError("x"),
        _connector_error(OSError(errno.EMFILE, "Too many open files")),
        OSError(errno.ENFILE, "Too many open files in system"),
    ],
)
def test_a_fault_of_ours_is_not_blamed_on_the_receiver(error: Exception) -> None:
    assert outcome_of_error(error) is None


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("backoff", [None, 0.5])
def test_final_state_of_each_outcome(outcome: Outcome, backoff: float | None) -> None:
    expected: DeliveryState | None
    if outcome is Outcome.SUCCEEDED:
        expected = DeliveryState.DELIVERED
    elif outcome is Outcome.REFUSED or backoff is None:
        expected = DeliveryState.FAILED
    else:
        expected = None
    assert final_state(outcome, 503, backoff) is expected


def test_410_is_not_tried_again() -> None:
    assert final_state(Outcome.HTTP_ERROR, 410, 0.5) is DeliveryState.FAILED
    assert final_state(Outcome.HTTP_ERROR, 404, 0.5) is None


@pytest.mark.parametrize(
    ("outcome", "status", "works"),
    [
        (Outcome.SUCCEEDED, 200, True),
        # It answers, and likes what it got as little as it would like a retry.
        (Outcome.HTTP_ERROR, 302, True),
        (Outcome.HTTP_ERROR, 404, True),
        (Outcome.HTTP_ERROR, 429, False),
        (Outcome.HTTP_ERROR, 500, False),
        (Outcome.HTTP_ERROR, 503, False),
        (Outcome.HTTP_ERROR, 999, False),
        (Outcome.TIMEOUT, None, False),
        (Outcome.DNS_ERROR, None, False),
        (Outcome.CONNECTION_ERROR, None, False),
        (Outcome.TLS_ERROR, None, False),
        (Outcome.PROTOCOL_ERROR, None, False),
        (Outcome.REFUSED, None, None),
        (Outcome.INTERNAL_ERROR, None, None),
    ],
)
def test_what_an_attempt_says_of_its_receiver(
    outcome: Outcome, status: int | None, works: bool | None
) -> None:
    assert endpoint_works(outcome, status) is works
