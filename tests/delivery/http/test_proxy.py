"""Deliveries through an operator's CONNECT proxy, to a real TLS receiver."""

import asyncio
import socket
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import structlog
import trustme
import uvloop
from pydantic import SecretStr

from core.addresses import AddressPolicy
from core.errors import ConfigurationError
from core.file_secrets import Secret
from core.ids import new_id
from core.lifecycle import AttemptResult, Outcome
from core.settings import EgressSettings
from core.signing import new_secret
from core.urls import UrlPolicy
from delivery.http.client import WebhookClient, open_client
from delivery.http.outcome import endpoint_works
from delivery.http.request import RequestTemplate
from delivery.ping import ping
from delivery.send import send
from tests.support.connect_proxy import ConnectProxy, Misbehaviour, proxying
from tests.support.fake_dns import FakeDns
from tests.support.platform import Platform
from tests.support.raw_receiver import RawReceiver, header, receiving_raw, server_tls
from tests.support.receiver import receiving

NAME = "hooks.shop.com"
URL = f"https://{NAME}/hook"
TARGET = f"{NAME}:443"


async def ok(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture
async def receiver(authority: trustme.CA) -> AsyncIterator[RawReceiver]:
    tls = server_tls(authority.issue_cert(NAME, "127.0.0.1"))
    async with receiving_raw(RawReceiver(ok, ok, ok), tls) as receiver:
        yield receiver


@pytest.fixture
async def proxy(receiver: RawReceiver) -> AsyncIterator[ConnectProxy]:
    """Only it knows where the receiver's name leads."""
    async with proxying() as proxy:
        proxy.routes[TARGET] = receiver.port
        yield proxy


@pytest.fixture
def names() -> FakeDns:
    def no_name(_: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    return FakeDns(no_name)


@pytest.fixture
def opening(ca_file: Path, names: FakeDns) -> Callable[..., WebhookClient]:
    def opening(
        proxy_url: str, policy: AddressPolicy | None = None, **options: Any
    ) -> WebhookClient:
        return open_client(
            policy=policy or AddressPolicy(),
            ca_file=ca_file,
            proxy=Secret("WEBHOOK_EGRESS_PROXY", SecretStr(proxy_url)),
            names=names,
            **options,
        )

    return opening


async def post(client: WebhookClient, url: str = URL, timeout: float = 10) -> AttemptResult:
    return await send(client, RequestTemplate(url), b"", b"{}", timeout)


def told(result: AttemptResult) -> tuple[Outcome, str]:
    assert result.status_code is None
    assert result.remote_address is None
    return result.outcome, result.detail


def answering(answer: bytes) -> Misbehaviour:
    async def answering(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)

    return answering


async def test_name_that_only_the_proxy_resolves_is_delivered(
    proxy: ConnectProxy,
    receiver: RawReceiver,
    names: FakeDns,
    opening: Callable[..., WebhookClient],
) -> None:
    async with opening(proxy.url()) as client:
        result = await post(client)
    assert (result.outcome, result.status_code) == (Outcome.SUCCEEDED, 200)
    assert proxy.requests == [f"CONNECT {TARGET} HTTP/1.1\r\nHost: {TARGET}\r\n\r\n"]
    assert header(receiver.requests[0], "host") == NAME
    assert names.asked == []
    # Whom the proxy called is known to it alone.
    assert (result.dns_us, result.remote_address) == (None, None)
    assert result.connect_us is not None
    assert result.tls_us is not None
    assert result.tls_us < result.connect_us


async def test_a_tunnel_is_used_again_until_it_is_too_old(
    proxy: ConnectProxy, receiver: RawReceiver, opening: Callable[..., WebhookClient]
) -> None:
    async with opening(proxy.url()) as client:
        results = [await post(client) for _ in range(2)]
    assert [result.outcome for result in results] == [Outcome.SUCCEEDED] * 2
    assert [result.remote_address for result in results] == [None] * 2
    assert (len(proxy.requests), len(receiver.requests)) == (1, 2)


async def test_the_event_loop_of_production_makes_tunnels_as_well(
    authority: trustme.CA, opening: Callable[..., WebhookClient]
) -> None:
    async def deliver() -> None:
        tls = server_tls(authority.issue_cert(NAME))
        async with receiving_raw(RawReceiver(ok, ok), tls) as receiver, proxying() as proxy:
            proxy.routes[TARGET] = receiver.port
            async with opening(proxy.url()) as client:
                assert [(await post(client)).status_code for _ in range(2)] == [200, 200]
                proxy.instead = answering(b"HTTP/1.1 403 no\r\n\r\n")
                result = await post(client, "https://other.shop.com/")
            assert told(result) == (Outcome.CONNECTION_ERROR, "the egress proxy answered 403")
            assert len(proxy.requests) == 2

    await asyncio.to_thread(uvloop.run, deliver())


async def test_a_tunnel_that_grew_old_is_not_used_again(
    proxy: ConnectProxy, receiver: RawReceiver, opening: Callable[..., WebhookClient]
) -> None:
    async with opening(proxy.url(), age_seconds_max=0.0) as client:
        results = [await post(client) for _ in range(2)]
    assert [result.outcome for result in results] == [Outcome.SUCCEEDED] * 2
    assert (len(proxy.requests), receiver.connections) == (2, 2)


async def test_a_ping_goes_through_the_proxy(
    proxy: ConnectProxy, opening: Callable[..., WebhookClient]
) -> None:
    policy = UrlPolicy(AddressPolicy(), ((443, 443),))
    async with opening(proxy.url()) as client:
        result = await ping(
            client,
            policy,
            10,
            url=URL,
            webhook_id=new_id(),
            secrets=[new_secret()],
            headers={},
        )
    assert (result.outcome, proxy.targets) == (Outcome.SUCCEEDED, [TARGET])


async def test_servers_and_engines_both_go_through_the_proxy(
    proxy: ConnectProxy,
    authority: trustme.CA,
    ca_file: Path,
    start_platform: Callable[..., AbstractAsyncContextManager[Platform]],
) -> None:
    egress = EgressSettings(
        allowed_cidrs="127.0.0.0/8",
        allowed_ports="1-65535",
        ca_file=ca_file,
        egress_proxy=SecretStr(proxy.url()),
    )
    async with receiving(authority) as merchant, start_platform(egress=egress) as platform:
        target = f"127.0.0.1:{merchant.port}"
        proxy.routes[target] = merchant.port
        await platform.register(merchant.url)
        assert proxy.targets == [target]
        async with platform.engine():
            await platform.publish()
            await merchant.wait_for(1)
        assert proxy.targets == [target, target]


async def test_the_certificate_is_still_that_of_the_receivers_name(
    proxy: ConnectProxy, receiver: RawReceiver, opening: Callable[..., WebhookClient]
) -> None:
    proxy.routes["other.shop.com:443"] = receiver.port
    async with opening(proxy.url()) as client:
        outcome, detail = told(await post(client, "https://other.shop.com/"))
    assert outcome is Outcome.TLS_ERROR
    assert detail.startswith("the certificate does not verify: Hostname mismatch")
    assert receiver.requests == []


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "[::1]", "127.1", "2130706433", "0x7f.1"]
)
async def test_an_inner_address_is_refused_and_the_proxy_sees_nothing(
    proxy: ConnectProxy, opening: Callable[..., WebhookClient], host: str
) -> None:
    async with opening(proxy.url()) as client:
        outcome, _ = told(await post(client, f"https://{host}/"))
    assert outcome is Outcome.REFUSED
    assert proxy.connections == 0


async def test_an_address_that_is_allowed_is_asked_of_the_proxy(
    proxy: ConnectProxy, receiver: RawReceiver, opening: Callable[..., WebhookClient]
) -> None:
    proxy.routes["127.0.0.1:8443"] = receiver.port
    allowed = AddressPolicy((ip_network("127.0.0.0/8"),))
    async with opening(proxy.url(), allowed) as client:
        result = await post(client, "https://127.0.0.1:8443/")
    assert result.outcome is Outcome.SUCCEEDED


async def test_a_proxy_that_is_away_is_our_fault_and_not_the_merchants(
    opening: Callable[..., WebhookClient],
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        async with opening(f"http://127.0.0.1:{taken.getsockname()[1]}") as client:
            result = await post(client)
    assert told(result) == (Outcome.INTERNAL_ERROR, "the egress proxy cannot be reached")
    assert endpoint_works(result.outcome, result.status_code) is None


async def test_timeout_before_the_proxy_is_an_internal_error(
    opening: Callable[..., WebhookClient],
) -> None:
    # A listener whose queue is full answers no further connection.
    with socket.socket() as full, socket.socket() as queued:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        queued.connect(full.getsockname())
        async with opening(f"http://127.0.0.1:{full.getsockname()[1]}") as client:
            result = await post(client, timeout=0.3)
    assert told(result) == (Outcome.INTERNAL_ERROR, "the egress proxy cannot be reached")


async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while not writer.is_closing():
        writer.write(b"X: y\r\n" * 1000)
        await writer.drain()


NOT_HTTP = "the egress proxy's response is not valid HTTP/1.1"
UNREACHABLE = "the host cannot be reached"
CLOSED = "the egress proxy closed the connection"


@pytest.mark.parametrize(
    ("instead", "outcome", "detail"),
    [
        (answering(b"HTTP/1.1 403 canary\r\n\r\ncanary"), "connection", "answered 403"),
        (answering(b"HTTP/1.0 407 canary\r\n\r\n"), "internal", "answered 407"),
        (answering(b"HTTP/1.1 502 canary\r\n\r\n"), "connection", UNREACHABLE),
        (answering(b"HTTP/1.1 503\r\n\r\n"), "connection", UNREACHABLE),
        (answering(b"HTTP/1.1 504 canary\r\n\r\n"), "connection", UNREACHABLE),
        (answering(b"SSH-2.0-canary\r\n\r\n"), "internal", NOT_HTTP),
        (endless, "internal", NOT_HTTP),
        (answering(b""), "internal", CLOSED),
        (answering(b"HTTP/1.1 200 OK\r\nVia"), "internal", CLOSED),
        (answering(b"HTTP/1.1 200 OK\r\n\r\nSSH-2.0-canary"), "tls", "the TLS handshake failed"),
        (answering(b"HTTP/1.1 200 OK\r\n\r\n"), "connection", "connection reset"),
    ],
    ids=[
        "403",
        "407",
        "502",
        "503",
        "504",
        "garbage",
        "endless",
        "closed",
        "half",
        "early",
        "hung-up",
    ],
)
async def test_what_a_proxy_says_is_told_without_its_words(
    proxy: ConnectProxy,
    opening: Callable[..., WebhookClient],
    instead: Misbehaviour,
    outcome: str,
    detail: str,
) -> None:
    proxy.instead = instead
    async with opening(proxy.url()) as client:
        result = await post(client)
    if detail.startswith("answered"):
        detail = f"the egress proxy {detail}"
    assert told(result) == (Outcome(f"{outcome}_error"), detail)
    assert proxy.connections == 1


async def test_the_deadline_holds_for_a_proxy_that_is_silent(
    proxy: ConnectProxy, opening: Callable[..., WebhookClient]
) -> None:
    hung_up = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        assert await reader.read() == b""
        hung_up.set()

    proxy.instead = silent
    async with opening(proxy.url()) as client:
        assert told(await post(client, timeout=0.3))[0] is Outcome.TIMEOUT
        async with asyncio.timeout(10):
            await hung_up.wait()


async def test_credentials_are_sent_to_the_proxy_alone_and_never_shown(
    proxy: ConnectProxy,
    receiver: RawReceiver,
    opening: Callable[..., WebhookClient],
) -> None:
    expected = b64encode(b"us@er:c@nary").decode()
    with structlog.testing.capture_logs() as entries:
        async with opening(proxy.url("us%40er:c%40nary@")) as client:
            delivered = await post(client)
            proxy.instead = answering(b"HTTP/1.1 407 no\r\n\r\n")
            refused = await post(client, "https://other.shop.com/")
    assert delivered.outcome is Outcome.SUCCEEDED
    assert f"\r\nProxy-Authorization: Basic {expected}\r\n" in proxy.requests[0]
    assert header(receiver.requests[0], "proxy-authorization") is None
    assert told(refused) == (Outcome.INTERNAL_ERROR, "the egress proxy answered 407")
    assert [entry["event"] for entry in entries] == ["egress_proxy_refused"]
    shown = f"{entries} {delivered} {refused}"
    assert not any(secret in shown for secret in ("c@nary", "c%40nary", "us@er", expected))


@pytest.mark.parametrize(
    "url",
    [
        "proxy.corp:3128",
        "https://proxy.corp:3128",
        "socks5://proxy.corp:1080",
        "http://proxy.corp",
        "http://proxy.corp:0",
        "http://proxy.corp:65536",
        "http://proxy.corp:3128/",
        "http://proxy.corp:3128?a",
        "http://u:canary/x@proxy.corp:3128",
        "http://u:canary@x@proxy.corp:3128",
        "http://proxy.corp:3128\r\nX: y",
    ],
)
async def test_anything_but_the_url_of_a_proxy_is_refused_at_the_start(
    opening: Callable[..., WebhookClient], url: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        opening(url)
    assert caught.value.message.startswith("WEBHOOK_EGRESS_PROXY is not the URL of an HTTP proxy")
    assert "http://host:port" in caught.value.message
    assert "canary" not in caught.value.message


async def test_credentials_from_a_file_are_those_of_the_next_tunnel(
    proxy: ConnectProxy, ca_file: Path, names: FakeDns, tmp_path: Path
) -> None:
    file = tmp_path / "proxy"
    file.write_text(proxy.url("one:old@") + "\n")
    secret = Secret("WEBHOOK_EGRESS_PROXY", file=file)
    proxy.instead = answering(b"HTTP/1.1 407 no\r\n\r\n")
    async with open_client(
        policy=AddressPolicy(), ca_file=ca_file, proxy=secret, names=names
    ) as client:
        for content in (None, proxy.url("one:new@"), "nonsense"):
            if content is not None:
                file.write_text(content)
            await post(client)
    told = [request.partition("Basic ")[2].split("\r\n")[0] for request in proxy.requests]
    assert [b64decode(text) for text in told] == [b"one:old", b"one:new", b"one:new"]
