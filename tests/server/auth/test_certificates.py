"""Services that authenticate with a client certificate instead of a token."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from core.errors import Unauthenticated
from postrider.v1 import event_service_pb2, event_service_pb2_grpc
from postrider.v1.event_pb2 import EventInput
from postrider_client import PostriderClient
from server.auth.certificates import CertificateCallers
from server.auth.principal import Scope, parse_certificate_scopes
from server.auth.rate_limits import CallerLimits
from server.auth.tokens import token_refused
from server.rpc.authenticate import Authentication
from server.rpc.call import RpcCall
from server.settings import ServerSettings, TlsSettings
from tests.docs.test_client_page import page
from tests.support.certificates import Authority, Issued
from tests.support.factories import count_rows
from tests.support.platform import Metadata, Platform, bearer
from tests.support.refused_calls import refused
from tests.support.rpcs import methods

AUTHORITY = Authority()
PAYMENTS = "spiffe://bank.example/payments"
SCOPES = f"{PAYMENTS}=events:publish, Ops.Internal=webhooks:admin events:publish"
CLIENT = AUTHORITY.issue(uris=(PAYMENTS,))
EVENT = EventInput(merchant_id="m_1", type="payment.succeeded", payload_text="{}")


@pytest.fixture
def start_mtls(start_platform: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Starts a server with TLS. The platform's channel presents `client`."""

    @asynccontextmanager
    async def start(client: Issued | None, **tls: Any) -> AsyncIterator[Platform]:
        paths = [tmp_path / name for name in ("server.pem", "server.key", "clients.pem")]
        AUTHORITY.issue(ips=("127.0.0.1",)).write(*paths[:2])
        paths[2].write_bytes(AUTHORITY.certificate)
        settings = TlsSettings(
            tls_certificate_file=paths[0],
            tls_private_key_file=paths[1],
            tls_client_ca_file=paths[2],
            **{"certificate_scopes": SCOPES, **tls},
        )
        async with start_platform(
            tls=settings,
            channel_credentials=AUTHORITY.channel_credentials(client),
        ) as platform:
            yield platform

    return start


@pytest.fixture
async def payments(start_mtls: Callable[..., Any]) -> AsyncIterator[Platform]:
    """A server whose platform's channel presents the certificate of PAYMENTS."""
    async with start_mtls(CLIENT) as platform:
        yield platform


def publish(channel: grpc.aio.Channel, metadata: Metadata | None = None) -> Any:
    stub = event_service_pb2_grpc.EventServiceStub(channel)
    request = event_service_pb2.PublishEventRequest(event=EVENT)
    return stub.PublishEvent(request, metadata=metadata, timeout=20)


async def test_certificate_with_scope_publishes_without_token(
    payments: Platform, pool: Any
) -> None:
    await publish(payments.channel)
    batch = [EventInput(merchant_id="m_2", type="payment.failed", payload=b"{}")]
    answer = await payments.calls([]).PublishEvents(events=batch)
    assert answer.results[0].status == event_service_pb2.PUBLISH_STATUS_ACCEPTED
    stream: Any = payments.events.StreamEvents()
    await stream.write(event_service_pb2.StreamEventsRequest(sequence=1, events=batch))
    assert (await stream.read()).sequence == 1
    await stream.done_writing()
    assert await stream.code() is StatusCode.OK
    assert await count_rows(pool) == 3


async def test_certificate_without_scope_is_refused(payments: Platform) -> None:
    async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
        await payments.calls([]).GetQueueStatus()


async def test_change_is_audited_with_the_certificates_identity(
    start_mtls: Callable[..., Any], pool: Any
) -> None:
    async with start_mtls(AUTHORITY.issue(dns=("OPS.internal",))) as platform:
        await platform.calls([]).EraseMerchant(merchant_id="m_1")
    actors = await pool.fetch("SELECT DISTINCT actor FROM audit_entries")
    assert [row["actor"] for row in actors] == ["certificate:ops.internal"]


UNKNOWN = {
    "unknown URI": AUTHORITY.issue(uris=("spiffe://bank.example/other",)),
    "URI with a suffix": AUTHORITY.issue(uris=(f"{PAYMENTS}/x",)),
    "URI in another case": AUTHORITY.issue(uris=(PAYMENTS.upper(),)),
    "known URI as common name": AUTHORITY.issue(common_name=PAYMENTS),
    "known name as common name": AUTHORITY.issue(common_name="ops.internal"),
    "wildcard": AUTHORITY.issue(dns=("*.internal",)),
    "subdomain": AUTHORITY.issue(dns=("x.ops.internal",)),
}


@pytest.mark.parametrize("client", UNKNOWN.values(), ids=UNKNOWN.keys())
async def test_unknown_certificate_needs_a_token(
    start_mtls: Callable[..., Any], client: Issued
) -> None:
    async with start_mtls(client) as platform:
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID") as error:
            await publish(platform.channel)
        assert error.message == token_refused().message
        await publish(platform.channel, platform.producer())


async def test_token_takes_precedence_over_the_certificate(payments: Platform) -> None:
    merchants = bearer(payments.token("events:publish", merchant_id="m_2"))
    async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISMATCH"):
        await publish(payments.channel, merchants)
    for metadata in (bearer("junk"), [("authorization", "")], [*merchants, *merchants]):
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
            await publish(payments.channel, metadata)


@pytest.mark.parametrize(
    "client",
    [
        None,
        Authority("another authority").issue(uris=(PAYMENTS,)),
        AUTHORITY.issue(uris=(PAYMENTS,), lifetime=timedelta(hours=-1)),
    ],
    ids=["none", "other authority", "expired"],
)
async def test_connection_without_valid_certificate_is_refused(
    payments: Platform, client: Issued | None
) -> None:
    credentials = AUTHORITY.channel_credentials(client)
    async with grpc.aio.secure_channel(payments.address, credentials) as channel:
        call = publish(channel, payments.producer())
        assert await call.code() is StatusCode.UNAVAILABLE


async def test_mtls_address_leaves_the_first_address_to_tokens(
    start_mtls: Callable[..., Any], logged: list[Any]
) -> None:
    async with start_mtls(CLIENT, mtls_listen_address="127.0.0.1:0") as platform:
        await publish(platform.channel, platform.producer())
        # The first address does not request a certificate.
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
            await publish(platform.channel)
        [serving] = [entry for entry in logged if entry["event"] == "serving"]
        second = f"127.0.0.1:{serving['mtls_port']}"
        for client, expected in ((CLIENT, StatusCode.OK), (None, StatusCode.UNAVAILABLE)):
            credentials = AUTHORITY.channel_credentials(client)
            async with grpc.aio.secure_channel(second, credentials) as channel:
                assert await publish(channel).code() is expected


async def test_refusal_of_each_rpc_does_not_wait_for_the_request(
    start_mtls: Callable[..., Any],
) -> None:
    async with start_mtls(AUTHORITY.issue(dns=("unknown.internal",))) as platform:
        names = [f"/{m.containing_service.full_name}/{m.name}" for m in methods()]
        for name in (*names, "/postrider.v1.EventService/Missing"):
            call: Any = platform.channel.stream_stream(name)(timeout=20)
            assert await call.code() is StatusCode.UNAUTHENTICATED, name
            assert await call.details() == token_refused().message


async def test_unknown_method_is_revealed_to_a_known_certificate(payments: Platform) -> None:
    missing: Any = payments.channel.unary_unary("/postrider.v1.EventService/Missing")
    assert await missing(b"").code() is StatusCode.UNIMPLEMENTED


async def test_client_connects_with_a_certificate_as_documented(
    payments: Platform, tmp_path: Path
) -> None:
    CLIENT.write(tmp_path / "client.pem", tmp_path / "client.key")
    (tmp_path / "authority.pem").write_bytes(AUTHORITY.certificate)
    connect = page(issue_token=str)["connect_with_certificate"]
    event = EventInput(idempotency_key="k")
    event.MergeFrom(EVENT)
    async with connect(payments.address, tmp_path) as client:
        first = await client.publish(event)
        async with client.publisher() as publisher:
            second = await (await publisher.publish(event))
    assert (second.id, second.duplicate) == (first.id, True)


@pytest.mark.parametrize("tls", [True, False])
async def test_client_needs_a_token_or_a_certificate(tls: bool) -> None:
    with pytest.raises(ValueError, match="certificate"):
        PostriderClient("localhost:1", None, tls=tls)


def test_each_handler_is_wrapped_once() -> None:
    """The dispatcher caches handlers, so new ones for each call would fill its cache."""
    verifier: Any = None
    authentication = Authentication(
        verifier, CallerLimits(ServerSettings()), certificates=CertificateCallers(())
    )
    known: Any = grpc.unary_unary_rpc_method_handler(lambda request, _context: request)

    def handler_of(handler: Any) -> Any:
        return authentication.guard(RpcCall("/a.B/C", ()), handler)

    for handler in (known, None):
        assert handler_of(handler) is handler_of(handler)
    assert handler_of(known) is not handler_of(None)


def peer(issued: Issued, *uris: str, dns: tuple[str, ...] = ()) -> dict[str, list[bytes]]:
    """The authentication context that gRPC has of the client."""
    return {
        "x509_pem_cert": [issued.certificate],
        "peer_uri": [uri.encode() for uri in uris],
        "peer_dns": [name.encode() for name in dns],
    }


def test_expired_certificate_is_refused_on_a_live_connection() -> None:
    now = 0.0
    callers = CertificateCallers(parse_certificate_scopes(SCOPES), lambda: now)
    client = peer(CLIENT, PAYMENTS)
    caller = callers.identify(client)
    assert callers.identify(client) is caller
    now = caller.expires_at - 1
    callers.identify(client)
    now = caller.expires_at
    with pytest.raises(Unauthenticated):
        callers.identify(client)


def test_first_known_identity_counts_and_uris_precede_names() -> None:
    callers = CertificateCallers(parse_certificate_scopes(SCOPES))
    both = peer(AUTHORITY.issue(), "https://unknown.example", PAYMENTS, dns=("ops.internal",))
    assert callers.identify(both).subject == f"certificate:{PAYMENTS}"
    assert callers.identify(both).merchant_id is None
    names = callers.identify(peer(AUTHORITY.issue(), dns=("x", "ops.internal")))
    assert names.scopes == {Scope.ADMIN, Scope.PUBLISH}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("spiffe://bank/pay", "must be identity=scope"),
        ("=events:publish", "must be identity=scope"),
        ("a b=events:publish", "must be identity=scope"),
        ("bänk=events:publish", "must be identity=scope"),
        ("spiffe://bank/pay=", "must be among"),
        ("spiffe://bank/pay=events:publish everything", "must be among"),
    ],
)
def test_invalid_certificate_scopes_are_explained(text: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        parse_certificate_scopes(text)
