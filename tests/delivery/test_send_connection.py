"""Connections that fail, go stale or are reused, and TLS."""

import asyncio
import datetime
import socket
import ssl
from pathlib import Path
from time import monotonic

import pytest
import trustme

from core.addresses import AddressPolicy
from core.lifecycle import Outcome
from delivery.http.client import WebhookClient, open_client
from tests.support.attempts import (
    AMPLE,
    LOOPBACK_ALLOWED,
    OK,
    SHORT,
    Start,
    answering,
    ok,
    post,
    reset,
    reset_on_close,
    silent,
    summary,
)
from tests.support.fake_dns import FakeDns
from tests.support.raw_receiver import (
    Behaviour,
    RawReceiver,
    receiving_raw,
    server_tls,
)
from tests.support.receiver import Receiver

#: The state of a TCP connection after its peer has closed it.
CLOSE_WAIT = 8


async def test_closed_port_is_connection_refused(client: WebhookClient) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        result = await post(client, f"https://127.0.0.1:{taken.getsockname()[1]}/")
    assert summary(result) == (Outcome.CONNECTION_ERROR, None, "connection refused")


async def test_unresolvable_name_is_a_dns_error(ca_file: Path) -> None:
    def lookup(_: str) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        result = await post(client, "https://hooks.shop.com/")
    assert summary(result) == (Outcome.DNS_ERROR, None, "the host name does not resolve")


async def test_forbidden_address_is_refused_without_a_connection(
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
async def test_connection_closed_before_a_response_is_not_retried(
    client: WebhookClient, start: Start, behaviour: Behaviour, detail: str
) -> None:
    async with start(behaviour, ok) as receiver:
        result = await post(client, receiver.url)
        assert summary(result) == (Outcome.CONNECTION_ERROR, None, detail)
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
async def test_broken_body_after_2xx_is_still_success(
    client: WebhookClient, start: Start, receiver: Receiver, behaviour: Behaviour
) -> None:
    async with start(behaviour) as broken:
        assert summary(await post(client, broken.url)) == (Outcome.SUCCEEDED, 200, "200 OK")
        assert len(broken.requests) == 1
    assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED


async def unread(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Respond, then abort at the first byte of the next request, like an idle timeout."""
    writer.write(OK)
    await reader.readexactly(1)
    writer.transport.abort()


async def unread_reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(OK)
    await reader.readexactly(1)
    reset_on_close(writer)
    writer.transport.abort()


@pytest.mark.parametrize("stale", [unread, unread_reset])
async def test_stale_connection_is_replaced_in_the_same_attempt(
    client: WebhookClient, start: Start, stale: Behaviour
) -> None:
    async with start(stale, ok) as receiver:
        assert (await post(client, receiver.url, b"first")).outcome is Outcome.SUCCEEDED
        assert (await post(client, receiver.url, b"second")).outcome is Outcome.SUCCEEDED
        assert receiver.connections == 2
        assert [request[-6:] for request in receiver.requests] == [b"\nfirst", b"second"]


async def test_stale_connection_is_replaced_only_once(client: WebhookClient, start: Start) -> None:
    async with start(unread, answering(), ok) as receiver:
        await post(client, receiver.url)
        result = await post(client, receiver.url)
        assert result.outcome is Outcome.CONNECTION_ERROR
        assert receiver.connections == 2


async def test_replacement_connection_keeps_the_deadline(
    client: WebhookClient, start: Start
) -> None:
    async with start(unread, silent) as receiver:
        await post(client, receiver.url)
        began = monotonic()
        result = await post(client, receiver.url, seconds=SHORT)
        assert result.outcome is Outcome.TIMEOUT
        assert monotonic() - began < SHORT + 1


async def test_data_between_requests_is_not_a_response(client: WebhookClient, start: Start) -> None:
    idle = asyncio.Event()

    async def time_out(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await idle.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        # Only the client closes this connection.
        await reader.read()

    async with start(time_out, ok) as receiver:
        assert (await post(client, receiver.url)).outcome is Outcome.SUCCEEDED
        idle.set()
        await asyncio.wait_for(receiver.ended.wait(), AMPLE)
        assert summary(await post(client, receiver.url)) == (Outcome.SUCCEEDED, 200, "200 OK")
        assert receiver.connections == 2


async def test_second_response_to_one_request_is_discarded(
    client: WebhookClient, start: Start
) -> None:
    async with start(answering(OK + OK.replace(b"200", b"500"), then_close=False), ok) as receiver:
        assert (await post(client, receiver.url)).status_code == 200
        assert (await post(client, receiver.url)).status_code == 200
        assert receiver.connections == 2


async def test_one_stale_connection_discards_the_others(
    client: WebhookClient, start: Start
) -> None:
    """After a restart of the receiver, all its connections are stale."""
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


@pytest.mark.parametrize("fault", ["self-signed", "unknown authority", "expired", "wrong host"])
async def test_invalid_certificate_gets_no_request(
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


async def test_plain_http_is_a_tls_error(client: WebhookClient) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(plain, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        result = await post(client, f"https://127.0.0.1:{port}/")
    assert summary(result) == (Outcome.TLS_ERROR, None, "the TLS handshake failed")


async def test_tls_1_1_is_refused(client: WebhookClient, authority: trustme.CA) -> None:
    tls = server_tls(authority.issue_cert("127.0.0.1"))
    tls.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        tls.minimum_version = tls.maximum_version = ssl.TLSVersion.TLSv1_1
    async with receiving_raw(RawReceiver(ok), tls) as receiver:
        # The client refuses with an alert, or closes the connection.
        outcome = (await post(client, receiver.url)).outcome
        assert outcome in {Outcome.TLS_ERROR, Outcome.CONNECTION_ERROR}
        assert receiver.requests == []


async def test_connection_close_response_closes_without_delay(
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
            # Until the receiver's kernel has seen the FIN.
            while theirs.getsockopt(  # noqa: ASYNC110 - the kernel sends no event
                socket.IPPROTO_TCP, socket.TCP_INFO, 1
            ) != bytes([CLOSE_WAIT]):
                await asyncio.sleep(0)
        closed.set()


async def test_most_recently_used_idle_connections_are_kept(ca_file: Path, start: Start) -> None:
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


async def test_closed_connection_does_not_count_as_idle(ca_file: Path, start: Start) -> None:
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
        # The loop handles the close before the next response.
        await post(client, other.url)
        await post(client, lasting.url)
        assert lasting.connections == 1
