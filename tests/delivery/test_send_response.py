"""The result of an attempt for each kind of response."""

import asyncio
import gzip
import resource
import sys
from contextlib import suppress
from time import monotonic

import pytest
import trustme
from aiohttp import web

from core.lifecycle import Outcome
from delivery.http.client import WebhookClient
from delivery.http.connection import IdleConnections, ReceiverConnection
from tests.support.attempts import (
    AMPLE,
    OK,
    SHORT,
    Start,
    answering,
    dripping,
    ok,
    post,
    silent,
    summary,
)
from tests.support.raw_receiver import (
    Behaviour,
    header,
    server_tls,
)
from tests.support.receiver import Receiver


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_2xx_status_is_success(
    client: WebhookClient, receiver: Receiver, status: int
) -> None:
    receiver.default = status
    result = await post(client, receiver.url)
    assert (result.outcome, result.status_code) == (Outcome.SUCCEEDED, status)
    assert 0 < result.duration_us < AMPLE * 1_000_000


@pytest.mark.parametrize("status", [400, 401, 404, 410, 429, 500, 503, 599])
async def test_other_status_is_an_http_error(
    client: WebhookClient, receiver: Receiver, status: int
) -> None:
    receiver.default = status
    result = await post(client, receiver.url)
    assert (result.outcome, result.status_code) == (Outcome.HTTP_ERROR, status)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_fails_and_is_not_followed(
    client: WebhookClient, receiver: Receiver, start: Start, status: int
) -> None:
    async with start(ok) as canary:
        receiver.default = web.Response(status=status, headers={"Location": str(canary.url)})
        result = await post(client, receiver.url)
        assert (result.outcome, result.status_code) == (Outcome.HTTP_ERROR, status)
        assert "redirects are not followed" in result.detail
        assert (canary.connections, canary.requests) == (0, [])


@pytest.mark.parametrize("line", ["000 Odd", "099 Odd", "599 Odd", "999 Odd", "599"])
async def test_unknown_status_fails_without_breaking_the_client(
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
async def test_invalid_http_response_is_a_protocol_error(
    client: WebhookClient, start: Start, answer: bytes
) -> None:
    async with start(answering(answer)) as receiver:
        assert summary(await post(client, receiver.url)) == (
            Outcome.PROTOCOL_ERROR,
            None,
            "the answer is not valid HTTP/1.1",
        )


@pytest.mark.parametrize("at_once", [1, 5, 10_000])
async def test_endless_1xx_responses_are_cut_off_early(
    client: WebhookClient, start: Start, at_once: int
) -> None:
    notifier = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * at_once
    async with start(dripping(b"", notifier, 0)) as receiver:
        assert summary(await post(client, receiver.url)) == (
            Outcome.PROTOCOL_ERROR,
            None,
            "1xx answers kept coming, and no final one",
        )
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)


async def test_burst_of_1xx_responses_is_barely_parsed() -> None:
    connection = ReceiverConnection(asyncio.get_running_loop(), IdleConnections(1))
    connection.set_response_params()
    connection.data_received(b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000)
    assert len(connection) <= 20


@pytest.mark.parametrize("apart", [False, True])
async def test_a_few_1xx_responses_are_accepted(
    client: WebhookClient, start: Start, apart: bool
) -> None:
    parts = [b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"] * 10 + [OK]
    behaviour = answering(*(parts if apart else [b"".join(parts)]))
    async with start(behaviour) as receiver:
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(
    "behaviour",
    [
        silent,
        dripping(b"HTTP/1.1 200 OK\r\n", b"X-Drip: y\r\n"[:1]),
    ],
    ids=["silence", "header-drip"],
)
async def test_missing_status_line_times_out_on_time(
    client: WebhookClient, start: Start, behaviour: Behaviour
) -> None:
    async with start(behaviour) as receiver:
        began = monotonic()
        result = await post(client, receiver.url, seconds=SHORT)
        took = monotonic() - began
        assert summary(result) == (Outcome.TIMEOUT, None, "no answer within the timeout")
        assert SHORT <= took < SHORT + 1
        assert SHORT * 1_000_000 <= result.duration_us < (SHORT + 1) * 1_000_000
        # The connection closes at once.
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)


async def test_unfinished_tls_handshake_times_out(
    client: WebhookClient,
) -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        # Leaving the context proves that the client closed the connection: the server waits for it.
        result = await post(client, f"https://127.0.0.1:{port}/", seconds=SHORT)
    assert result.outcome is Outcome.TIMEOUT


async def test_request_after_its_timeout_is_not_sent_further(
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
    # More than the buffers of sockets and streams.
    body = bytes(2**25)
    async with await asyncio.start_server(busy, "127.0.0.1", 0, ssl=tls) as server:
        port = server.sockets[0].getsockname()[1]
        result = await post(client, f"https://127.0.0.1:{port}/", body, seconds=SHORT)
        given_up.set()
        assert await asyncio.wait_for(received, AMPLE) < len(body)
    assert result.outcome is Outcome.TIMEOUT


@pytest.mark.parametrize("seconds", [SHORT, AMPLE])
async def test_slow_body_after_200_is_success_and_cut_off(
    client: WebhookClient, start: Start, seconds: float
) -> None:
    drip = dripping(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n", b"x")
    async with start(drip) as receiver:
        began = monotonic()
        result = await post(client, receiver.url, seconds=seconds)
        assert monotonic() - began < min(seconds, 1) + 1
        assert summary(result) == (Outcome.SUCCEEDED, 200, "200 OK")
        # The duration ends at the status line.
        assert result.duration_us < SHORT * 1_000_000
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)


async def test_gigabyte_body_is_cut_off_without_using_memory(
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
        # The client closed the connection, so the receiver could not write further.
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)
        assert summary(result) == (Outcome.SUCCEEDED, 200, "200 OK")
        assert written < 32 * 2**20
        assert resident_bytes() - before < 32 * 2**20


async def test_gzip_bomb_is_not_decompressed(client: WebhookClient, start: Start) -> None:
    bomb = gzip.compress(bytes(10 * 2**20))
    assert len(bomb) < 16 * 1024
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    armed = answering(head + bomb, then_close=False)
    async with start(armed, ok) as receiver:
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        # Decompressed, it would exceed the limit and the connection would not be reused.
        assert receiver.connections == 1
        assert header(receiver.requests[0], "accept-encoding") == "identity"


async def test_connection_is_reused_after_a_complete_body(
    client: WebhookClient, start: Start
) -> None:
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 16384\r\n\r\n" + bytes(16_384)
    async with start(answering(whole, then_close=False), ok) as receiver:
        await post(client, receiver.url)
        await post(client, receiver.url)
        assert (receiver.connections, len(receiver.requests)) == (1, 2)


def resident_bytes() -> int:
    """The peak memory of this process."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
