"""One attempt against receivers that misbehave in every way we know, over real TLS on loopback."""

import asyncio
import datetime
import gzip
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from ipaddress import ip_network
from pathlib import Path
from time import monotonic, time
from typing import Any
from uuid import UUID

import pytest
import trustme
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook
from yarl import URL

from core.addresses import AddressPolicy
from core.ids import format_id, new_id
from core.lifecycle import AttemptResult, Outcome
from core.queue import LeasedDelivery
from core.signing import new_secret, standard_secret
from core.urls import UrlPolicy
from delivery.http.client import WebhookClient, open_client
from delivery.http.connection import IdleConnections, ReceiverConnection
from delivery.http.request import RequestTemplate, header_lines
from delivery.ping import ping
from delivery.send import send
from delivery.sign import sign
from tests.support.fake_dns import FakeDns
from tests.support.raw_receiver import (
    Behaviour,
    RawReceiver,
    header,
    read_request,
    receiving_raw,
    server_tls,
)
from tests.support.receiver import Receiver
from tests.support.signatures import is_genuine

LOOPBACK_ALLOWED = AddressPolicy((ip_network("127.0.0.0/8"),))
#: Long enough for any answer on loopback, also on a busy machine.
AMPLE = 10.0
HEADERS = header_lines({"Content-Type": "a/b"})
#: For receivers that never come to an end; the test waits for it.
SHORT = 0.3
#: Of a TCP connection whose other end has been closed.
CLOSE_WAIT = 8

type Start = Callable[..., AbstractAsyncContextManager[RawReceiver]]


@pytest.fixture
async def client(ca_file: Path) -> AsyncIterator[WebhookClient]:
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        yield client


@pytest.fixture
def start(authority: trustme.CA) -> Start:
    """Starts a raw receiver: `async with start(behaviour, …) as receiver`."""

    @asynccontextmanager
    async def start(*script: Behaviour) -> AsyncIterator[RawReceiver]:
        tls = server_tls(authority.issue_cert("127.0.0.1"))
        async with receiving_raw(RawReceiver(*script), tls) as receiver:
            yield receiver

    return start


def answering(*parts: bytes, then_close: bool = True) -> Behaviour:
    """A behaviour that writes these bytes."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if then_close:
            writer.close()

    return answer


def dripping(head: bytes, drop: bytes, seconds: float = 0.02) -> Behaviour:
    """A behaviour that writes `head`, then `drop` for ever, never silent for long."""

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(drop)
            await writer.drain()
            await asyncio.sleep(seconds)

    return drip


async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.read()


async def reset(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """End the connection with a TCP reset."""
    reset_on_close(writer)
    writer.transport.abort()


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    linger = b"\x01\0\0\0\0\0\0\0"
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
ok = answering(OK, then_close=False)


async def post(
    client: WebhookClient, url: URL | str, body: bytes = b"{}", seconds: float = AMPLE
) -> AttemptResult:
    return await send(client, RequestTemplate(str(url)), HEADERS, body, seconds)


def told(result: AttemptResult) -> tuple[Outcome, int | None, str]:
    return result.outcome, result.status_code, result.detail


# What the answer says.


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_is_success(client: WebhookClient, receiver: Receiver, status: int) -> None:
    receiver.default = status
    result = await post(client, receiver.url)
    assert (result.outcome, result.status_code) == (Outcome.SUCCEEDED, status)
    assert 0 < result.duration_us < AMPLE * 1_000_000


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503, 599])
async def test_any_other_status_is_an_http_error_with_that_status(
    client: WebhookClient, receiver: Receiver, status: int
) -> None:
    receiver.default = status
    result = await post(client, receiver.url)
    assert (result.outcome, result.status_code) == (Outcome.HTTP_ERROR, status)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_a_failure_and_never_followed(
    client: WebhookClient, receiver: Receiver, start: Start, status: int
) -> None:
    async with start(ok) as canary:
        receiver.default = web.Response(status=status, headers={"Location": str(canary.url)})
        result = await post(client, receiver.url)
        assert (result.outcome, result.status_code) == (Outcome.HTTP_ERROR, status)
        assert "redirects are not followed" in result.detail
        assert (canary.connections, canary.requests) == (0, [])


@pytest.mark.parametrize("line", ["000 Odd", "099 Odd", "599 Odd", "999 Odd", "599"])
async def test_a_status_nobody_knows_is_a_failure_and_the_session_lives_on(
    client: WebhookClient, start: Start, receiver: Receiver, line: str
) -> None:
    async with start(answering(f"HTTP/1.1 {line}\r\nContent-Length: 0\r\n\r\n".encode())) as odd:
        result = await post(client, odd.url)
    assert result.outcome in {Outcome.HTTP_ERROR, Outcome.PROTOCOL_ERROR}
    assert result.outcome is Outcome.PROTOCOL_ERROR or result.status_code == int(line[:3])
    assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"\x00\xff" * 100,
        b"HTTP/1.1 two hundred\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Long: " + b"x" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    ],
    ids=["banner", "binary", "status", "no-colon", "100-KB-header", "1000-headers", "length"],
)
async def test_an_answer_that_is_not_http_is_a_protocol_error(
    client: WebhookClient, start: Start, answer: bytes
) -> None:
    async with start(answering(answer)) as receiver:
        assert told(await post(client, receiver.url)) == (
            Outcome.PROTOCOL_ERROR,
            None,
            "the answer is not valid HTTP/1.1",
        )


@pytest.mark.parametrize("at_once", [1, 5, 10_000])
async def test_1xx_without_end_are_cut_off_long_before_the_timeout(
    client: WebhookClient, start: Start, at_once: int
) -> None:
    notifier = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * at_once
    async with start(dripping(b"", notifier, 0)) as receiver:
        assert told(await post(client, receiver.url)) == (
            Outcome.PROTOCOL_ERROR,
            None,
            "1xx answers kept coming, and no final one",
        )
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)


async def test_of_a_flood_of_1xx_that_arrives_at_once_nearly_nothing_is_parsed() -> None:
    connection = ReceiverConnection(asyncio.get_running_loop(), IdleConnections(1))
    connection.set_response_params()
    connection.data_received(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)
    assert len(connection) <= 20


@pytest.mark.parametrize("apart", [False, True])
async def test_a_few_1xx_may_come_before_the_answer(
    client: WebhookClient, start: Start, apart: bool
) -> None:
    parts = [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"] * 10 + [OK]
    behaviour = answering(*(parts if apart else [b"".join(parts)]))
    async with start(behaviour) as receiver:
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED


# How long it may take.


@pytest.mark.parametrize(
    "behaviour",
    [
        silent,
        dripping(b"HTTP/1.1 200 OK\r\n", b"X-Drip: y\r\n"[:1]),
    ],
    ids=["silence", "header-drip"],
)
async def test_without_a_status_line_in_time_it_is_a_timeout_on_time(
    client: WebhookClient, start: Start, behaviour: Behaviour
) -> None:
    async with start(behaviour) as receiver:
        began = monotonic()
        result = await post(client, receiver.url, seconds=SHORT)
        took = monotonic() - began
        assert told(result) == (Outcome.TIMEOUT, None, "no answer within the timeout")
        assert SHORT <= took < SHORT + 1
        assert SHORT * 1_000_000 <= result.duration_us < (SHORT + 1) * 1_000_000
        # The receiver is let go of at once.
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)


async def test_a_receiver_that_never_finishes_the_handshake_is_a_timeout(
    client: WebhookClient,
) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        # The listener's own read ends only when we hang up, so leaving here proves that we did.
        result = await post(client, f"https://127.0.0.1:{port}/", seconds=SHORT)
    assert result.outcome is Outcome.TIMEOUT


async def test_a_request_that_was_given_up_is_not_sent_on(
    client: WebhookClient, authority: trustme.CA
) -> None:
    given_up = asyncio.Event()
    received: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await given_up.wait()
        size = 0
        with suppress(OSError):
            while chunk := await reader.read(2**20):
                size += len(chunk)
        received.set_result(size)
        writer.transport.abort()

    tls = server_tls(authority.issue_cert("127.0.0.1"))
    # More than sockets and streams take in while nobody reads.
    body = bytes(2**25)
    async with await asyncio.start_server(busy, "127.0.0.1", 0, ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        result = await post(client, f"https://127.0.0.1:{port}/", body, seconds=SHORT)
        given_up.set()
        assert await asyncio.wait_for(received, AMPLE) < len(body)
    assert result.outcome is Outcome.TIMEOUT


@pytest.mark.parametrize("seconds", [SHORT, AMPLE])
async def test_a_body_that_drips_after_200_is_success_and_soon_let_go_of(
    client: WebhookClient, start: Start, seconds: float
) -> None:
    drip = dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x")
    async with start(drip) as receiver:
        began = monotonic()
        result = await post(client, receiver.url, seconds=seconds)
        assert monotonic() - began < min(seconds, 1) + 1
        assert told(result) == (Outcome.SUCCEEDED, 200, "200 OK")
        # Only the time to the status line is the receiver's answer time.
        assert result.duration_us < SHORT * 1_000_000
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)


# Connections that fail.


async def test_a_closed_port_is_connection_refused(client: WebhookClient) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        result = await post(client, f"https://127.0.0.1:{taken.getsockname()[1]}/")
    assert told(result) == (Outcome.CONNECTION_ERROR, None, "connection refused")


async def test_a_name_that_does_not_resolve_is_a_dns_error(ca_file: Path) -> None:
    def lookup(_: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        result = await post(client, "https://hooks.shop.com/")
    assert told(result) == (Outcome.DNS_ERROR, None, "the host name does not resolve")


async def test_an_address_that_is_not_allowed_is_refused_and_not_called(
    ca_file: Path, start: Start
) -> None:
    async with start(ok) as canary, open_client(policy=AddressPolicy(), ca_file=ca_file) as strict:
        result = await post(strict, canary.url)
        assert (result.outcome, result.status_code) == (Outcome.REFUSED, None)
        assert canary.connections == 0


@pytest.mark.parametrize(
    ("behaviour", "detail"),
    [
        (reset, "connection reset"),
        (answering(), "the connection was closed before an answer came"),
        (answering(b"HTTP/1.1 20"), "the connection was closed before an answer came"),
    ],
    ids=["reset", "closed", "closed-in-status-line"],
)
async def test_a_connection_that_ends_before_an_answer_fails_and_is_not_sent_twice(
    client: WebhookClient, start: Start, behaviour: Behaviour, detail: str
) -> None:
    async with start(behaviour, ok) as receiver:
        result = await post(client, receiver.url)
        assert told(result) == (Outcome.CONNECTION_ERROR, None, detail)
        assert len(receiver.requests) == 1


async def reset_after_success(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    await writer.drain()
    reset_on_close(writer)
    writer.transport.abort()


@pytest.mark.parametrize(
    "behaviour",
    [
        reset_after_success,
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"),
        answering(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnot a chunk"),
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nmore than two"),
        answering(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nno"),
        answering(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\0\xff\0\xff"),
    ],
    ids=["reset", "too-short", "bad-chunk", "too-long", "not-gzip", "binary"],
)
async def test_what_happens_after_a_2xx_status_line_changes_nothing(
    client: WebhookClient, start: Start, receiver: Receiver, behaviour: Behaviour
) -> None:
    async with start(behaviour) as broken:
        assert told(await post(client, broken.url)) == (Outcome.SUCCEEDED, 200, "200 OK")
        assert len(broken.requests) == 1
    assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED


# How much is read.


async def test_a_gigabyte_of_body_is_cut_off_and_costs_no_memory(
    client: WebhookClient, start: Start
) -> None:
    written = 0

    async def flood(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
        chunk = bytes(65_536)
        while written < 2**30:
            writer.write(chunk)
            await writer.drain()
            written += len(chunk)

    async with start(flood) as receiver:
        before = resident_bytes()
        result = await post(client, receiver.url)
        # Our end hung up: the receiver could not write what nobody took.
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)
        assert told(result) == (Outcome.SUCCEEDED, 200, "200 OK")
        assert written < 32 * 2**20
        assert resident_bytes() - before < 32 * 2**20


async def test_of_a_large_payload_no_copy_waits_for_the_answer(
    client: WebhookClient, authority: trustme.CA
) -> None:
    payload, requests = bytes(4 * 2**20), 20
    arrived, answer = asyncio.Semaphore(0), asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        # Nor may this end of it keep what comes.
        left = len(payload)
        while left:
            left -= len(await reader.read(left))
        arrived.release()
        await answer.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    receiver = await asyncio.start_server(
        take, "127.0.0.1", 0, ssl=server_tls(authority.issue_cert("127.0.0.1"))
    )
    url = f"https://127.0.0.1:{receiver.sockets[0].getsockname()[1]}/"
    async with receiver, asyncio.TaskGroup() as group:
        before = resident_now()
        for _ in range(requests):
            group.create_task(send(client, RequestTemplate(url), HEADERS, payload, AMPLE))
            async with asyncio.timeout(AMPLE):
                await arrived.acquire()
        grown = resident_now() - before
        answer.set()
    # One copy in each of them would be 80 MiB.
    assert grown < requests * len(payload) / 2


async def test_a_gzip_bomb_is_not_unpacked(client: WebhookClient, start: Start) -> None:
    bomb = gzip.compress(bytes(10 * 2**20))
    assert len(bomb) < 16 * 1024
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    armed = answering(head + bomb, then_close=False)
    async with start(armed, ok) as receiver:
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        # Unpacked it would be past the limit, and the connection closed instead of used again.
        assert receiver.connections == 1
        assert header(receiver.requests[0], "accept-encoding") == "identity"


async def test_a_connection_is_used_again_after_a_body_that_was_read_whole(
    client: WebhookClient, start: Start
) -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 16384\r\n\r\n" + bytes(16_384)
    async with start(answering(whole, then_close=False), ok) as receiver:
        await post(client, receiver.url)
        await post(client, receiver.url)
        assert (receiver.connections, len(receiver.requests)) == (1, 2)


# Pooled connections that went stale.


async def unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer, then hang up at the first byte of another request, as an idle limit does."""
    writer.write(OK)
    await reader.readexactly(1)
    writer.transport.abort()


async def unread_reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK)
    await reader.readexactly(1)
    reset_on_close(writer)
    writer.transport.abort()


@pytest.mark.parametrize("stale", [unread, unread_reset])
async def test_a_stale_pooled_connection_is_replaced_within_the_same_attempt(
    client: WebhookClient, start: Start, stale: Behaviour
) -> None:
    async with start(stale, ok) as receiver:
        assert (await post(client, receiver.url, b"first")).outcome is Outcome.SUCCEEDED
        assert (await post(client, receiver.url, b"second")).outcome is Outcome.SUCCEEDED
        assert receiver.connections == 2
        assert [request[-6:] for request in receiver.requests] == [b"\nfirst", b"second"]


async def test_a_stale_pooled_connection_is_replaced_once_only(
    client: WebhookClient, start: Start
) -> None:
    async with start(unread, answering(), ok) as receiver:
        await post(client, receiver.url)
        result = await post(client, receiver.url)
        assert result.outcome is Outcome.CONNECTION_ERROR
        assert receiver.connections == 2


async def test_the_replacement_shares_the_deadline_of_the_attempt(
    client: WebhookClient, start: Start
) -> None:
    async with start(unread, silent) as receiver:
        await post(client, receiver.url)
        began = monotonic()
        result = await post(client, receiver.url, seconds=SHORT)
        assert result.outcome is Outcome.TIMEOUT
        assert monotonic() - began < SHORT + 1


async def test_what_comes_between_two_requests_is_not_taken_for_an_answer(
    client: WebhookClient, start: Start
) -> None:
    idle = asyncio.Event()

    async def give_up_on_us(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await idle.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        # The connection stays open on this side: that it ends is our doing.
        await reader.read()

    async with start(give_up_on_us, ok) as receiver:
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        idle.set()
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)
        assert told(await post(client, receiver.url)) == (Outcome.SUCCEEDED, 200, "200 OK")
        assert receiver.connections == 2


async def test_a_second_answer_to_one_request_is_nobodys(
    client: WebhookClient, start: Start
) -> None:
    async with start(answering(OK + OK.replace(b"200", b"500"), then_close=False), ok) as receiver:
        assert (await post(client, receiver.url)).status_code == 200
        assert (await post(client, receiver.url)).status_code == 200
        assert receiver.connections == 2


async def test_of_several_stale_connections_only_one_costs_time(
    client: WebhookClient, start: Start
) -> None:
    """After a restart of the receiver all of them are, and the next one would be no better."""
    both = asyncio.Barrier(2)

    async def together(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await both.wait()
        writer.write(OK)

    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    async with start(together, together, hang_up, ok) as receiver:
        await asyncio.gather(post(client, receiver.url), post(client, receiver.url))
        assert receiver.connections == 2
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        assert receiver.connections == 3


# TLS.


@pytest.mark.parametrize("fault", ["self-signed", "unknown authority", "expired", "wrong host"])
async def test_a_certificate_that_does_not_verify_gets_no_request(
    client: WebhookClient, authority: trustme.CA, tmp_path: Path, fault: str
) -> None:
    long_ago = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    match fault:
        case "self-signed":
            alone = trustme.CA()
            pem = tmp_path / "alone.pem"
            pem.write_bytes(alone.private_key_pem.bytes() + alone.cert_pem.bytes())
            tls.load_cert_chain(pem)
        case "unknown authority":
            trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
        case "expired":
            authority.issue_cert("127.0.0.1", not_after=long_ago).configure_cert(tls)
        case "wrong host":
            authority.issue_cert("127.0.0.2", "other.example").configure_cert(tls)
    async with receiving_raw(RawReceiver(ok), tls) as receiver:
        result = await post(client, receiver.url)
        assert (result.outcome, result.status_code) == (Outcome.TLS_ERROR, None)
        assert result.detail.startswith("the certificate does not verify: ")
        assert receiver.requests == []


async def test_plain_http_on_the_port_is_a_tls_error(client: WebhookClient) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await post(client, f"https://127.0.0.1:{port}/")
    assert told(result) == (Outcome.TLS_ERROR, None, "the TLS handshake failed")


async def test_tls_1_1_is_not_spoken(client: WebhookClient, authority: trustme.CA) -> None:
    tls = server_tls(authority.issue_cert("127.0.0.1"))
    tls.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    async with receiving_raw(RawReceiver(ok), tls) as receiver:
        # Its refusal may come as an alert, or the connection just ends.
        outcome = (await post(client, receiver.url)).outcome
        assert outcome in {Outcome.TLS_ERROR, Outcome.CONNECTION_ERROR}
        assert receiver.requests == []


# What is kept, and what is taken from the environment: nothing.


async def test_cookies_of_a_receiver_are_not_kept(client: WebhookClient, start: Start) -> None:
    setting = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 0\r\n\r\n"
    async with start(answering(setting, then_close=False), ok) as receiver:
        await post(client, receiver.url)
        await post(client, receiver.url)
        assert [header(request, "cookie") for request in receiver.requests] == [None, None]


async def test_proxies_and_netrc_of_the_environment_are_not_used(
    ca_file: Path, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = 0

    async def proxy(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal called
        called += 1
        writer.close()

    async with await asyncio.start_server(proxy, "127.0.0.1", 0) as canary, start(ok) as receiver:
        address = f"http://127.0.0.1:{canary.sockets[0].getsockname()[1]}"
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, address)
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login operator password secret\n")
        monkeypatch.setenv("NETRC", str(netrc))
        async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
            assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        assert called == 0
        assert header(receiver.requests[0], "authorization") is None


async def test_a_receiver_that_leaves_closing_to_us_gets_no_time_for_a_farewell(
    client: WebhookClient, start: Start
) -> None:
    async def then_deaf(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await closed.wait()

    closed = asyncio.Event()
    async with start(then_deaf) as receiver:
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        theirs = receiver.writers[0].get_extra_info("socket")
        async with asyncio.timeout(AMPLE):
            # Until our end has come to its kernel.
            while theirs.getsockopt(  # noqa: ASYNC110 - of the kernel, which tells nobody
                socket.IPPROTO_TCP, socket.TCP_INFO, 1
            ) != bytes([CLOSE_WAIT]):
                await asyncio.sleep(0)
        closed.set()


async def test_of_idle_connections_only_so_many_are_kept_and_those_used_last(
    ca_file: Path, start: Start
) -> None:
    async with (
        start(ok, ok, ok) as first,
        start(ok, ok, ok) as second,
        start(ok, ok, ok) as third,
        open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file, idle_max=2) as client,
    ):
        for receiver in (first, second, first, third):
            assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        await asyncio.wait_for(second.ended.wait(), AMPLE)
        for receiver in (third, second):
            assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        assert [r.connections for r in (first, second, third)] == [1, 2, 1]


async def test_a_connection_that_its_receiver_has_ended_takes_the_place_of_none(
    ca_file: Path, start: Start
) -> None:
    async def then_hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await ok(reader, writer)
        writer.close()

    async with (
        start(ok, ok) as lasting,
        start(then_hang_up) as short,
        start(ok, ok) as other,
        open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file, idle_max=2) as client,
    ):
        await post(client, lasting.url)
        await post(client, short.url)
        await asyncio.wait_for(short.ended.wait(), AMPLE)
        # Its end comes to us on the same loop, before what this one brings.
        await post(client, other.url)
        await post(client, lasting.url)
        assert lasting.connections == 1


# What arrives.


@pytest.mark.parametrize(
    "target",
    [
        "/hook",
        "/",
        "/a%7Eb/%2F/c",
        "/x?next=http://169.254.169.254/&a=%20+%2B",
        "/a//b/../c/./d",
        "/@:;,=!$&'()*",
        "/%e2%82%AC?%FF",
        "/?a=1&a=2&&b",
    ],
)
async def test_the_target_arrives_as_it_was_registered(
    client: WebhookClient, start: Start, target: str
) -> None:
    async with start(ok) as receiver:
        await post(client, f"https://127.0.0.1:{receiver.port}{target}")
        assert receiver.requests[0].split(b"\r\n")[0] == f"POST {target} HTTP/1.1".encode()
        assert header(receiver.requests[0], "host") == f"127.0.0.1:{receiver.port}"


async def test_the_bytes_of_a_payload_arrive_as_they_are_and_verify(
    ca_file: Path, authority: trustme.CA
) -> None:
    received: list[bytes] = []

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_answers = True
        while with_answers:
            try:
                received.append(await read_request(reader))
            except asyncio.IncompleteReadError:
                return writer.close()
            writer.write(OK)
        return None

    tls = server_tls(authority.issue_cert("127.0.0.1"))
    server = await asyncio.start_server(keep, "127.0.0.1", 0, ssl=tls)
    request_template = RequestTemplate(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
    secret = new_secret()
    loop = asyncio.get_running_loop()

    async with server, open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:

        async def round_trip(body: bytes) -> None:
            delivery = leased(body)
            headers = sign(delivery, [secret], int(time()))
            result = await send(client, request_template, headers, body, AMPLE)
            assert result.outcome is Outcome.SUCCEEDED
            request = received.pop()
            assert request.partition(b"\r\n\r\n")[2] == body
            _assert_signed(request, secret, body, format_id("evt", delivery.event_id))

        # Hypothesis calls plain functions, so the examples run beside this loop.
        @settings(max_examples=60, deadline=None, database=None)
        @given(st.one_of(st.binary(max_size=300), st.sampled_from(BODIES)))
        def examples(body: bytes) -> None:
            asyncio.run_coroutine_threadsafe(round_trip(body), loop).result(AMPLE)

        await asyncio.to_thread(examples)


BODIES = [b"", b"\0", b"\r\n\r\n", b"\xff\xfe", "€ naïve".encode(), bytes(262_144), b"a=1&b=2"]


def _assert_signed(request: bytes, secret: str, body: bytes, message_id: str) -> None:
    names = ("webhook-id", "webhook-timestamp", "webhook-signature")
    headers = {name: header(request, name) or "" for name in names}
    signature = header(request, "X-Webhook-Signature") or ""
    assert headers["webhook-id"] == message_id
    assert is_genuine(secret, message_id, body, signature, now=time())
    assert not is_genuine(secret, message_id, body + b" ", signature, now=time())
    assert not is_genuine(new_secret(), message_id, body, signature, now=time())
    # The reference library parses JSON after it has verified, so it is asked about JSON only.
    if body == b"{}":
        Webhook(standard_secret(secret)).verify(body, headers)


async def test_the_headers_of_an_attempt_are_exactly_these(
    client: WebhookClient, start: Start
) -> None:
    delivery, secret, now = leased(b"{}", attempt_count=2), new_secret(), int(time())
    async with start(ok) as receiver:
        await send(
            client, RequestTemplate(str(receiver.url)), sign(delivery, [secret], now), b"{}", AMPLE
        )
        [request] = receiver.requests
    head = request.partition(b"\r\n\r\n")[0].decode()
    sent = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    assert sent.pop("webhook-signature").startswith("v1,")
    assert sent.pop("X-Webhook-Signature").startswith(f"t={now},v1=")
    assert sent == {
        "Host": f"127.0.0.1:{receiver.port}",
        "Content-Type": "application/json; charset=utf-8",
        "Content-Length": "2",
        "User-Agent": "Postrider/0.1",
        "Accept-Encoding": "identity",
        "webhook-id": format_id("evt", delivery.event_id),
        "webhook-timestamp": str(now),
        "X-Webhook-Event": "payment.succeeded",
        "X-Webhook-Delivery": format_id("dlv", delivery.id),
        "X-Webhook-Attempt": "3",
    }
    _assert_signed(request, secret, b"{}", format_id("evt", delivery.event_id))


async def test_a_ping_is_signed_like_a_delivery(client: WebhookClient, receiver: Receiver) -> None:
    secret, webhook_id = new_secret(), UUID(int=1)
    policy = UrlPolicy(LOOPBACK_ALLOWED, ((1, 65535),))
    result = await ping(
        client,
        policy,
        AMPLE,
        url=receiver.url,
        webhook_id=webhook_id,
        secrets=[secret],
        headers={},
    )
    assert result.outcome is Outcome.SUCCEEDED
    [request] = receiver.requests
    assert request.is_ping
    verified: Any = Webhook(standard_secret(secret)).verify(request.body, request.headers)
    assert verified == {"type": "webhook.ping", "webhook_id": format_id("wh", webhook_id)}


# Faults of ours.


ODD = ["a\r\nb: c", "a\nb", "a\r", "\0", "\x7f", "\x85", "é", "\ud800"]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("field", ["event_type", "content_type"])
def test_what_could_break_out_of_a_header_of_ours_is_a_fault_of_ours(field: str, odd: str) -> None:
    fields: Any = {field: odd}
    with pytest.raises(ValueError, match="forbidden character"):
        sign(leased(b"{}")._replace(**fields), [new_secret()], 1)


@pytest.mark.parametrize(
    ("path", "custom"),
    [
        *[("", {"X-Custom": odd}) for odd in ODD],
        *[("", {f"X-{odd}": "fine"}) for odd in ODD],
        *[(f"/{odd}", {}) for odd in ("a b", "\0", "\x7f", "é", " HTTP/1.1")],
    ],
)
async def test_what_could_break_out_of_a_request_is_a_fault_of_ours_and_nothing_is_sent(
    client: WebhookClient, start: Start, path: str, custom: dict[str, str]
) -> None:
    async with start(ok) as receiver:
        broken = RequestTemplate(f"{receiver.url}{path}", custom)
        with pytest.raises(ValueError, match="forbidden character"):
            await send(client, broken, HEADERS, b"{}", AMPLE)
        assert (receiver.requests, receiver.connections) == ([], 0)


async def test_a_cancelled_attempt_hangs_up(client: WebhookClient, start: Start) -> None:
    asked = asyncio.Event()

    async def tell(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()

    async with start(tell) as receiver:
        attempt = asyncio.create_task(post(client, receiver.url))
        await asyncio.wait_for(asked.wait(), AMPLE)
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)


def leased(payload: bytes, attempt_count: int = 0) -> LeasedDelivery:
    return LeasedDelivery(
        id=new_id(),
        lease_id=new_id(),
        webhook_id=new_id(),
        webhook_version=1,
        webhook_active=True,
        webhook_deleted=False,
        breaker_open_until=None,
        has_backlog=False,
        event_id=new_id(),
        merchant_id="m_1",
        event_type="payment.succeeded",
        content_type="application/json; charset=utf-8",
        payload=payload,
        attempt_count=attempt_count,
        fault_count=0,
        due_since=datetime.datetime.now(datetime.UTC),
        claimed_at=datetime.datetime.now(datetime.UTC),
    )


def resident_bytes() -> int:
    """The most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
