"""The bytes of a request, and the sources it ignores."""

import asyncio
import datetime
import resource
from pathlib import Path
from time import time
from typing import Any
from uuid import UUID

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook

from core.ids import format_id, new_id
from core.lifecycle import Outcome
from core.queue import LeasedDelivery
from core.signing import new_secret, standard_secret
from core.urls import UrlPolicy
from delivery.http.client import WebhookClient, open_client
from delivery.http.request import RequestTemplate
from delivery.ping import ping
from delivery.send import send
from delivery.sign import sign
from tests.support.attempts import (
    AMPLE,
    HEADERS,
    LOOPBACK_ALLOWED,
    OK,
    Start,
    answering,
    ok,
    post,
)
from tests.support.raw_receiver import (
    header,
    read_request,
    server_tls,
)
from tests.support.receiver import Receiver
from tests.support.signatures import is_genuine


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
async def test_request_target_is_sent_as_registered(
    client: WebhookClient, start: Start, target: str
) -> None:
    async with start(ok) as receiver:
        await post(client, f"https://127.0.0.1:{receiver.port}{target}")
        assert receiver.requests[0].split(b"\r\n")[0] == f"POST {target} HTTP/1.1".encode()
        assert header(receiver.requests[0], "host") == f"127.0.0.1:{receiver.port}"


async def test_payload_bytes_arrive_unchanged_and_verify(
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

        # Hypothesis calls plain functions, so the examples run in a thread.
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
    # The reference library also parses the body as JSON.
    if body == b"{}":
        Webhook(standard_secret(secret)).verify(body, headers)


async def test_attempt_sends_exactly_these_headers(client: WebhookClient, start: Start) -> None:
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


async def test_ping_is_signed_like_a_delivery(client: WebhookClient, receiver: Receiver) -> None:
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


async def test_cookies_are_not_kept(client: WebhookClient, start: Start) -> None:
    setting = b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 0\r\n\r\n"
    async with start(answering(setting, then_close=False), ok) as receiver:
        await post(client, receiver.url)
        await post(client, receiver.url)
        assert [header(request, "cookie") for request in receiver.requests] == [None, None]


async def test_proxies_and_netrc_of_the_environment_are_ignored(
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


ODD = ["a\r\nb: c", "a\nb", "a\r", "\0", "\x7f", "\x85", "é", "\ud800"]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("field", ["event_type", "content_type"])
def test_unsafe_header_value_is_rejected_before_signing(field: str, odd: str) -> None:
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
async def test_unsafe_request_is_rejected_and_not_sent(
    client: WebhookClient, start: Start, path: str, custom: dict[str, str]
) -> None:
    async with start(ok) as receiver:
        broken = RequestTemplate(f"{receiver.url}{path}", custom)
        with pytest.raises(ValueError, match="forbidden character"):
            await send(client, broken, HEADERS, b"{}", AMPLE)
        assert (receiver.requests, receiver.connections) == ([], 0)


async def test_cancelled_attempt_closes_its_connection(client: WebhookClient, start: Start) -> None:
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


async def test_large_payload_is_not_copied_while_waiting(
    client: WebhookClient, authority: trustme.CA
) -> None:
    payload, requests = bytes(4 * 2**20), 20
    arrived, answer = asyncio.Semaphore(0), asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        # Keep no copy on the receiver's side either.
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
    # A copy for each request would need 80 MiB.
    assert grown < requests * len(payload) / 2


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


def resident_now() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
