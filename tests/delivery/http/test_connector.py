"""The dialler against a real TLS receiver on loopback: whom it calls, and how it says no."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from ipaddress import ip_network
from pathlib import Path
from time import monotonic

import aiohttp
import pytest
import trustme
from aiohttp import web
from yarl import URL

from core.addresses import AddressClass, AddressPolicy
from core.lifecycle import AttemptResult, Outcome
from delivery.http.client import WebhookClient, open_client
from delivery.http.connector import RequestTrace
from delivery.http.guard import AddressRefused, refusal_of
from delivery.http.request import RequestTemplate
from delivery.http.resolver import RACED_MAX, GuardedResolver
from delivery.send import send
from tests.support.fake_dns import FakeDns

NOTHING_ALLOWED = AddressPolicy()
LOOPBACK_ALLOWED = AddressPolicy((ip_network("127.0.0.0/8"),))
NAME = "hooks.shop.com"


class Receiver:
    """A TLS server that counts connections, whether or not a request comes of them."""

    def __init__(self, certificates: trustme.CA):
        self.connections = 0
        self.requests: list[web.BaseRequest] = []
        self.protocols: list[str | None] = []
        self.port = 0
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.set_alpn_protocols(["h2", "http/1.1"])
        certificates.issue_cert(NAME, "localhost", "a.localhost", "127.0.0.1").configure_cert(
            self._tls
        )

    def url(self, host: str, target: str = "/") -> URL:
        return URL(f"https://{host}:{self.port}{target}", encoded=True)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Receiver"]:
        answering = web.Server(self._answer)

        def accept() -> asyncio.Protocol:
            self.connections += 1
            return answering()

        loop = asyncio.get_running_loop()
        # Accepting is counted below TLS, so that a refused handshake is seen as well.
        listening = await loop.create_server(accept, "127.0.0.1", 0, ssl=self._tls)
        self.port = listening.sockets[0].getsockname()[1]
        yield self
        listening.close()
        await answering.shutdown()

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        self.requests.append(request)
        self.protocols.append(request.get_extra_info("ssl_object").selected_alpn_protocol())
        return web.Response(headers={"Set-Cookie": "a=b", "Content-Encoding": "gzip"}, body=b"raw")


@pytest.fixture(scope="module")
def certificates() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(certificates: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    certificates.cert_pem.write_to_path(str(path))
    return path


@pytest.fixture
async def receiver(certificates: trustme.CA) -> AsyncIterator[Receiver]:
    async with Receiver(certificates).serving() as serving:
        yield serving


def answers(*addresses: str) -> Callable[[str], Sequence[str]]:
    return lambda _: addresses


async def dial(client: WebhookClient, url: URL) -> RequestTrace:
    trace = RequestTrace(RequestTemplate(str(url)))
    (await client._connector.open(trace)).close()
    return trace


async def post(client: WebhookClient, url: URL) -> AttemptResult:
    result = await send(client, RequestTemplate(str(url)), b"", b"{}", 10)
    assert result.outcome is Outcome.SUCCEEDED
    return result


async def refused(client: WebhookClient, url: URL) -> AddressRefused:
    with pytest.raises(AddressRefused) as caught:
        await dial(client, url)
    assert refusal_of(caught.value) is caught.value
    return caught.value


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "a.localhost", NAME])
async def test_an_allowed_receiver_is_called_by_number_and_by_name(
    receiver: Receiver, ca_file: Path, host: str
) -> None:
    asked: list[str] = []

    def lookup(name: str) -> Sequence[str]:
        asked.append(name)
        return ["127.0.0.1"]

    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        await post(client, receiver.url(host))
    assert receiver.connections == 1
    # localhost is not a question for DNS.
    assert asked == ([NAME] if host == NAME else [])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "a.localhost", "[::ffff:7f00:1]", NAME])
async def test_a_receiver_that_is_not_allowed_never_sees_a_connection(
    receiver: Receiver, ca_file: Path, host: str
) -> None:
    lookup = answers("127.0.0.1")
    async with open_client(
        policy=NOTHING_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        refusal = await refused(client, receiver.url(host))
    mapped = host.startswith("[")
    assert refusal.address_class == (AddressClass.MAPPED if mapped else AddressClass.LOOPBACK)
    assert "127.0.0.1" not in str(refusal)
    assert receiver.connections == 0


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["127.0.0.1", "10.0.0.1"], AddressClass.PRIVATE),
        (["10.0.0.1", "127.0.0.1"], AddressClass.PRIVATE),
        (["127.0.0.1", "8.8.8.8", "169.254.169.254"], AddressClass.METADATA),
        (["127.0.0.1", "::1"], AddressClass.LOOPBACK),
        (["127.0.0.1", "::ffff:7f00:1"], AddressClass.MAPPED),
        (["127.0.0.1", "fe80::1%eth0"], AddressClass.LINK_LOCAL),
        (["127.0.0.1", "what is this"], AddressClass.RESERVED),
    ],
)
async def test_one_refused_answer_refuses_the_whole_name(
    receiver: Receiver, ca_file: Path, addresses: list[str], expected: AddressClass
) -> None:
    lookup = answers(*addresses)
    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        refusal = await refused(client, receiver.url(NAME))
    assert refusal.address_class is expected
    assert receiver.connections == 0


async def test_a_name_that_moves_inside_after_it_was_called_is_refused(
    receiver: Receiver, ca_file: Path
) -> None:
    moving = iter([["127.0.0.1"], ["169.254.169.254"]])
    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lambda _: next(moving))
    ) as client:
        await dial(client, receiver.url(NAME))
        refusal = await refused(client, receiver.url(NAME))
    assert refusal.address_class is AddressClass.METADATA
    assert receiver.connections == 1


@pytest.mark.parametrize(
    "addresses",
    [
        ["127.0.0.1"],
        ["127.0.0.1", "127.0.0.2"],
        ["127.0.0.1", "::1", "127.0.0.2", "10.0.0.1"],
    ],
)
async def test_the_socket_says_no_even_when_the_resolver_did_not(
    receiver: Receiver, ca_file: Path, monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    await _let_the_resolver_check_nothing(monkeypatch, addresses)
    async with open_client(policy=NOTHING_ALLOWED, ca_file=ca_file) as client:
        await refused(client, receiver.url(NAME))
    assert receiver.connections == 0


async def test_failure_of_another_address_does_not_hide_a_refusal(
    receiver: Receiver, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _let_the_resolver_check_nothing(monkeypatch, ["10.0.0.1", "127.0.0.2"])
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        refusal = await refused(client, receiver.url(NAME))
    assert refusal.address_class is AddressClass.PRIVATE
    assert isinstance(refusal.__cause__, aiohttp.ClientConnectorError)


async def _let_the_resolver_check_nothing(
    monkeypatch: pytest.MonkeyPatch, addresses: Sequence[str]
) -> None:
    guarded = GuardedResolver.resolve
    everything = AddressPolicy((ip_network("0.0.0.0/0"), ip_network("::/0")))

    async def unguarded(
        _: GuardedResolver, host: str, port: int, family: socket.AddressFamily
    ) -> object:
        trusting = GuardedResolver(everything, FakeDns(answers(*addresses)))
        rows = await guarded(trusting, host, port, family)
        await trusting.close()
        return rows

    monkeypatch.setattr(GuardedResolver, "resolve", unguarded)


def test_a_refusal_is_found_behind_what_was_raised_from_it() -> None:
    refused = AddressRefused(AddressClass.SHARED)
    outer = RuntimeError("outer")
    outer.__cause__ = ValueError("between")
    outer.__cause__.__context__ = refused
    assert refusal_of(outer) is refused
    assert refusal_of(ValueError("nothing behind it")) is None


async def test_a_dns_failure_is_told_apart_from_a_failure_to_connect(
    receiver: Receiver, ca_file: Path
) -> None:
    def lookup(name: str) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        with pytest.raises(aiohttp.ClientConnectorDNSError) as caught:
            await dial(client, receiver.url(NAME))
    assert caught.value.os_error.errno == socket.EAI_NONAME
    assert refusal_of(caught.value) is None


async def test_a_name_without_addresses_is_a_dns_failure(receiver: Receiver, ca_file: Path) -> None:
    lookup = answers()
    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        with pytest.raises(aiohttp.ClientConnectorDNSError):
            await dial(client, receiver.url(NAME))


async def test_name_with_many_addresses_gets_few_connections(
    ca_file: Path,
) -> None:
    """aiohttp tries all, a socket each, and where they refuse begins again with all but one."""
    connections = 0

    def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        writer.close()

    lookup = answers(*(f"127.0.1.{number}" for number in range(1, 201)))
    server = await asyncio.start_server(hang_up, "0.0.0.0", 0)  # noqa: S104
    url = f"https://{NAME}:{server.sockets[0].getsockname()[1]}/"
    async with (
        server,
        open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)) as client,
    ):
        result = await send(client, RequestTemplate(url), b"", b"{}", 10)
    assert result.outcome is Outcome.CONNECTION_ERROR
    assert connections <= RACED_MAX


async def test_closing_the_dialler_closes_what_it_asks(ca_file: Path) -> None:
    names = FakeDns(answers())
    async with open_client(policy=NOTHING_ALLOWED, ca_file=ca_file, names=names):
        assert not names.closed
    assert names.closed


@pytest.mark.parametrize("target", ["/a//b/../%2e%2E/%7E%2f~;x@y:z", "/?a=+%20&a=&=b?c/d", "/a??"])
async def test_the_path_that_arrives_is_the_one_that_was_registered(
    receiver: Receiver, ca_file: Path, target: str
) -> None:
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        await post(client, receiver.url("127.0.0.1", target))
    assert receiver.requests[0].raw_path == target


async def test_http_1_1_is_agreed_on_during_the_handshake(
    receiver: Receiver, ca_file: Path
) -> None:
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        await post(client, receiver.url("127.0.0.1"))
    assert receiver.protocols == ["http/1.1"]


async def test_a_compressed_answer_is_left_alone(receiver: Receiver, ca_file: Path) -> None:
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        result = await post(client, receiver.url("127.0.0.1"))
    assert result.response_excerpt == "raw"


async def test_proxies_of_the_environment_are_ignored(
    receiver: Receiver, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        await post(client, receiver.url("127.0.0.1"))
    assert receiver.connections == 1


async def test_a_connection_is_kept_for_the_next_request(receiver: Receiver, ca_file: Path) -> None:
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        for _ in range(3):
            await post(client, receiver.url("127.0.0.1"))
    assert (receiver.connections, len(receiver.requests)) == (1, 3)


async def test_a_connection_that_grew_old_is_closed_instead_of_used(
    receiver: Receiver, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = monotonic()
    monkeypatch.setattr("delivery.http.connection.monotonic", lambda: now)
    monkeypatch.setattr("delivery.http.connector.monotonic", lambda: now)
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file, age_seconds_max=60) as client:
        for seconds, connections in ((0, 1), (59, 1), (2, 2), (59, 2)):
            # The pool's own clock stands still: only its age can end a connection here.
            now += seconds
            await post(client, receiver.url("127.0.0.1"))
            assert receiver.connections == connections


async def test_a_certificate_nobody_vouches_for_is_not_accepted(receiver: Receiver) -> None:
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=None) as client:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await dial(client, receiver.url("127.0.0.1"))
    assert receiver.requests == []


async def test_a_certificate_for_another_name_is_not_accepted(
    receiver: Receiver, ca_file: Path
) -> None:
    lookup = answers("127.0.0.1")
    async with open_client(
        policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=FakeDns(lookup)
    ) as client:
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await dial(client, receiver.url("other.shop.com"))
    assert receiver.requests == []
