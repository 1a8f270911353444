"""TLS sessions are resumed, and certificates are still verified every hour."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic
from typing import Any, cast

import pytest
import trustme

from core.lifecycle import Outcome
from delivery.http.client import WebhookClient, open_client
from delivery.http.request import RequestTemplate
from delivery.http.tls_sessions import ResumingTls, TlsSessions
from delivery.send import send
from tests.support.attempts import AMPLE, LOOPBACK_ALLOWED
from tests.support.fake_dns import FakeDns
from tests.support.raw_receiver import RawReceiver, receiving_raw, server_tls


class Handshakes(RawReceiver):
    """Notes whether each connection was resumed, and closes it after each response."""

    def __init__(self) -> None:
        super().__init__()
        self.resumed: list[bool] = []
        self.answers = True
        #: Holds the responses back until this many requests have arrived.
        self.burst = asyncio.Barrier(1)
        #: Resumed connections get no response.
        self.fails_on_resumption = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.script.append(self._answer)
        await super().serve(reader, writer)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        resumed = writer.get_extra_info("ssl_object").session_reused
        self.resumed.append(resumed)
        await self.burst.wait()
        if self.answers and not (self.fails_on_resumption and resumed):
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
        writer.close()


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])
async def receiver(
    request: pytest.FixtureRequest, authority: trustme.CA
) -> AsyncIterator[Handshakes]:
    tls = server_tls(authority.issue_cert("127.0.0.1", "a.example", "b.example"))
    tls.minimum_version = tls.maximum_version = request.param
    receiver = Handshakes()
    async with receiving_raw(receiver, tls):
        yield receiver


@pytest.fixture
async def client(ca_file: Path) -> AsyncIterator[WebhookClient]:
    names = FakeDns(lambda _: ["127.0.0.1"])
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file, names=names) as client:
        yield client


async def post(client: WebhookClient, receiver: Handshakes, host: str = "a.example") -> Outcome:
    url = f"https://{host}:{receiver.port}/"
    return (await send(client, RequestTemplate(url), b"", b"{}", AMPLE)).outcome


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[ssl.SSLObject]:
    """Records the reads of sessions, because CPython leaks a copy with each."""
    genuine: Any = ssl.SSLObject.__dict__["session"]
    reads: list[ssl.SSLObject] = []

    def read(tls: ssl.SSLObject) -> Any:
        reads.append(tls)
        return genuine.__get__(tls)

    monkeypatch.setattr(ResumingTls, "session", property(read, genuine.__set__), raising=False)
    return reads


async def test_session_is_read_once_and_resumed_often(
    client: WebhookClient, receiver: Handshakes, reads: list[ssl.SSLObject]
) -> None:
    for _ in range(5):
        assert await post(client, receiver) is Outcome.SUCCEEDED
    assert receiver.resumed == [False, True, True, True, True]
    assert len(reads) == 1


async def test_concurrent_connections_read_at_most_four_sessions(
    client: WebhookClient, receiver: Handshakes, reads: list[ssl.SSLObject]
) -> None:
    receiver.burst = asyncio.Barrier(20)
    outcomes = await asyncio.gather(*(post(client, receiver) for _ in range(20)))
    assert set(outcomes) == {Outcome.SUCCEEDED}
    assert receiver.resumed == [False] * 20
    assert len(reads) == 4


async def test_process_stops_reading_sessions_at_its_limit(
    client: WebhookClient, receiver: Handshakes, reads: list[ssl.SSLObject]
) -> None:
    tls: Any = client._connector._ssl
    tls.sslobject_class.sessions = TlsSessions(reads_max=2)
    for host in ("a.example", "b.example", "127.0.0.1") * 2:
        assert await post(client, receiver, host) is Outcome.SUCCEEDED
    assert receiver.resumed == [False, False, False, True, True, False]
    assert len(reads) == 2


async def test_host_that_declines_is_offered_a_session_once_an_hour(
    client: WebhookClient,
    authority: trustme.CA,
    reads: list[ssl.SSLObject],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    began = monotonic()
    for count, seconds in enumerate((0, 1, 2, 3, 3500, 3700, 3701, 3702), start=1):
        monkeypatch.setattr("delivery.http.tls_sessions.monotonic", lambda now=began + seconds: now)
        # Each has its own keys, so none can read the ticket of another.
        fresh = Handshakes()
        async with receiving_raw(fresh, server_tls(authority.issue_cert("a.example"))):
            assert await post(client, fresh) is Outcome.SUCCEEDED
        assert fresh.resumed == [False]
        # The first, and after an hour the next.
        assert len(reads) == (1 if count <= 5 else 2)


async def test_later_connection_resumes_for_its_host_only(
    client: WebhookClient, receiver: Handshakes
) -> None:
    for host in ("a.example", "a.example", "b.example", "127.0.0.1", "a.example"):
        assert await post(client, receiver, host) is Outcome.SUCCEEDED
    assert receiver.resumed == [False, True, False, False, True]


async def test_certificate_is_verified_again_after_an_hour(
    client: WebhookClient, receiver: Handshakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = monotonic()
    for seconds in (0, 1800, 3500, 3700, 7200):
        monkeypatch.setattr("delivery.http.tls_sessions.monotonic", lambda now=began + seconds: now)
        assert await post(client, receiver) is Outcome.SUCCEEDED
    assert receiver.resumed == [False, True, True, False, True]


async def test_session_without_a_response_is_not_used_again(
    client: WebhookClient, receiver: Handshakes
) -> None:
    await post(client, receiver)
    receiver.answers = False
    assert await post(client, receiver) is Outcome.CONNECTION_ERROR
    receiver.answers = True
    await post(client, receiver)
    assert receiver.resumed == [False, True, False]


async def test_receiver_failing_on_sessions_loses_one_attempt_an_hour(
    client: WebhookClient, receiver: Handshakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver.fails_on_resumption = True
    began = monotonic()
    outcomes = []
    for seconds in (0, 1, 2, 3, 3500, 3700, 3701, 3702):
        monkeypatch.setattr("delivery.http.tls_sessions.monotonic", lambda now=began + seconds: now)
        outcomes.append(await post(client, receiver))
    failed = [outcome is not Outcome.SUCCEEDED for outcome in outcomes]
    assert failed == receiver.resumed == [False, True, False, False, False, False, True, False]


def test_one_response_clears_a_host_of_suspicion() -> None:
    sessions, session = TlsSessions(), cast(ssl.SSLSession, object())
    for _ in range(2):
        sessions.keep("a.example", session, monotonic())
    # One connection failed while another got a response.
    assert [sessions.take("a.example") is not None for _ in range(2)] == [True, True]
    assert not sessions._are_wanted("a.example")
    sessions.keep("a.example", session, monotonic())
    assert sessions._are_wanted("a.example")


async def test_receiver_that_lost_its_keys_gets_a_full_handshake(
    client: WebhookClient, receiver: Handshakes, authority: trustme.CA
) -> None:
    await post(client, receiver)
    # Another process at the same name cannot read the ticket, and shows its certificate.
    other = Handshakes()
    other.answers = True
    async with receiving_raw(other, server_tls(authority.issue_cert("a.example"))):
        assert await post(client, other) is Outcome.SUCCEEDED
    assert other.resumed == [False]


async def test_ticket_does_not_replace_trust_in_a_new_certificate(
    client: WebhookClient, receiver: Handshakes
) -> None:
    await post(client, receiver)
    stranger = Handshakes()
    async with receiving_raw(stranger, server_tls(trustme.CA().issue_cert("a.example"))):
        assert await post(client, stranger) is Outcome.TLS_ERROR
    assert stranger.requests == []


def test_number_of_kept_sessions_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delivery.http.tls_sessions._HOSTS_MAX", 3)
    sessions = TlsSessions()
    session: Any = object()
    for n in range(5):
        for _ in range(20):
            sessions.keep(f"{n}.example", session, monotonic())
    assert sorted(sessions._kept) == ["2.example", "3.example", "4.example"]
    assert [len(kept) for kept in sessions._kept.values()] == [4, 4, 4]
    for n in range(5):
        sessions.decline(f"{n}.example")
    assert sorted(sessions._declined) == ["2.example", "3.example", "4.example"]
    assert sessions._kept == {}
