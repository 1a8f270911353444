"""Services that show a certificate in place of a token."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from core.errors import Unauthenticated
from postrider.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    event_pb2,
    event_service_pb2,
    event_service_pb2_grpc,
)
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
from tests.support.platform import Metadata, Platform, bearer
from tests.support.refused_calls import refused
from tests.support.rpcs import methods

AUTHORITY = Authority()
PAYMENTS = "spiffe://bank.example/payments"
SCOPES = f"{PAYMENTS}=events:publish, Ops.Internal=webhooks:admin events:publish"


@pytest.fixture
def start_mtls(start_platform: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """Starts a server with TLS, whose own channel shows `client`."""

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


def publish(channel: grpc.aio.Channel, metadata: Metadata | None = None, **fields: Any) -> Any:
    event = event_pb2.EventInput(
        merchant_id="m_1", type="payment.succeeded", payload_text="{}", **fields
    )
    stub = event_service_pb2_grpc.EventServiceStub(channel)
    request = event_service_pb2.PublishEventRequest(event=event)
    return stub.PublishEvent(request, metadata=metadata, timeout=20)


async def test_a_known_certificate_publishes_for_any_merchant_without_a_token(
    start_mtls: Callable[..., Any], pool: Any
) -> None:
    async with start_mtls(AUTHORITY.issue(uris=(PAYMENTS,))) as platform:
        await publish(platform.channel)
        batch = [event_pb2.EventInput(merchant_id="m_2", type="payment.failed", payload=b"{}")]
        answer = await platform.events.PublishEvents(
            event_service_pb2.PublishEventsRequest(events=batch)
        )
        assert answer.results[0].status == event_service_pb2.PUBLISH_STATUS_ACCEPTED
        stream = platform.events.StreamEvents()
        await stream.write(event_service_pb2.StreamEventsRequest(sequence=1, events=batch))
        assert (await stream.read()).sequence == 1
        await stream.done_writing()
        assert await stream.code() is StatusCode.OK
    assert await pool.fetchval("SELECT count(*) FROM events") == 3


async def test_its_scopes_are_all_it_may_and_it_speaks_for_no_merchant(
    start_mtls: Callable[..., Any],
) -> None:
    async with (
        start_mtls(AUTHORITY.issue(uris=(PAYMENTS,))) as platform,
        refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"),
    ):
        await platform.admin.GetQueueStatus(admin_service_pb2.GetQueueStatusRequest())


async def test_a_change_by_certificate_is_on_record_under_its_identity(
    start_mtls: Callable[..., Any], pool: Any
) -> None:
    client = AUTHORITY.issue(dns=("OPS.internal",))
    async with start_mtls(client) as platform:
        stub = admin_service_pb2_grpc.AdminServiceStub(platform.channel)
        await stub.EraseMerchant(admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"))
    actors = await pool.fetch("SELECT DISTINCT actor FROM audit_entries")
    assert [row["actor"] for row in actors] == ["certificate:ops.internal"]


NOBODY = {
    "unknown URI": AUTHORITY.issue(uris=("spiffe://bank.example/other",)),
    "URI below a known one": AUTHORITY.issue(uris=(f"{PAYMENTS}/x",)),
    "URI in another case": AUTHORITY.issue(uris=(PAYMENTS.upper(),)),
    "a known URI as its common name": AUTHORITY.issue(common_name=PAYMENTS),
    "a known name as its common name": AUTHORITY.issue(common_name="ops.internal"),
    "a wildcard": AUTHORITY.issue(dns=("*.internal",)),
    "a name below a known one": AUTHORITY.issue(dns=("x.ops.internal",)),
}


@pytest.mark.parametrize("client", NOBODY.values(), ids=NOBODY.keys())
async def test_other_certificates_are_nobodys(
    start_mtls: Callable[..., Any], client: Issued
) -> None:
    async with start_mtls(client) as platform:
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID") as error:
            await publish(platform.channel)
        assert error.message == token_refused().message
        await publish(platform.channel, platform.producer())


async def test_a_token_beside_a_certificate_is_all_that_counts(
    start_mtls: Callable[..., Any],
) -> None:
    async with start_mtls(AUTHORITY.issue(uris=(PAYMENTS,))) as platform:
        merchants = bearer(platform.token("events:publish", merchant_id="m_2"))
        async with refused(StatusCode.PERMISSION_DENIED, "MERCHANT_MISMATCH"):
            await publish(platform.channel, merchants)
        for metadata in (bearer("junk"), [("authorization", "")], [*merchants, *merchants]):
            async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
                await publish(platform.channel, metadata)


async def test_without_a_certificate_nobody_gets_as_far_as_a_call(
    start_mtls: Callable[..., Any],
) -> None:
    stranger = Authority("somebody else").issue(uris=(PAYMENTS,))
    async with start_mtls(AUTHORITY.issue(uris=(PAYMENTS,))) as platform:
        for credentials in (
            AUTHORITY.channel_credentials(),
            AUTHORITY.channel_credentials(stranger),
            AUTHORITY.channel_credentials(
                AUTHORITY.issue(uris=(PAYMENTS,), lifetime=timedelta(hours=-1))
            ),
        ):
            async with grpc.aio.secure_channel(platform.address, credentials) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await publish(channel, platform.producer())
                assert failed.value.code() is StatusCode.UNAVAILABLE


async def test_with_a_second_address_the_first_takes_tokens_from_anybody(
    start_mtls: Callable[..., Any], logged: list[Any]
) -> None:
    client = AUTHORITY.issue(uris=(PAYMENTS,))
    async with start_mtls(client, mtls_listen_address="127.0.0.1:0") as platform:
        await publish(platform.channel, platform.producer())
        # Nothing was shown there, so nobody is known by it.
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
            await publish(platform.channel)
        [serving] = [entry for entry in logged if entry["event"] == "serving"]
        second = f"127.0.0.1:{serving['mtls_port']}"
        for shown, expected in ((client, StatusCode.OK), (None, StatusCode.UNAVAILABLE)):
            credentials = AUTHORITY.channel_credentials(shown)
            async with grpc.aio.secure_channel(second, credentials) as channel:
                assert await publish(channel).code() is expected


async def test_every_kind_of_call_is_refused_before_its_request_is_read(
    start_mtls: Callable[..., Any],
) -> None:
    client = AUTHORITY.issue(dns=("nobody.internal",))
    async with start_mtls(client) as platform:
        names = [f"/{m.containing_service.full_name}/{m.name}" for m in methods()]
        for name in (*names, "/postrider.v1.EventService/Missing"):
            call: Any = platform.channel.stream_stream(name)(timeout=20)
            assert await call.code() is StatusCode.UNAUTHENTICATED, name
            assert await call.details() == token_refused().message


async def test_a_method_that_is_missing_is_told_to_a_known_certificate(
    start_mtls: Callable[..., Any],
) -> None:
    async with start_mtls(AUTHORITY.issue(uris=(PAYMENTS,))) as platform:
        call: Any = platform.channel.unary_unary("/postrider.v1.EventService/Missing")(b"")
        assert await call.code() is StatusCode.UNIMPLEMENTED


async def test_the_client_needs_no_token_where_it_has_a_certificate(
    start_mtls: Callable[..., Any], tmp_path: Path
) -> None:
    client = AUTHORITY.issue(uris=(PAYMENTS,))
    client.write(tmp_path / "client.pem", tmp_path / "client.key")
    (tmp_path / "authority.pem").write_bytes(AUTHORITY.certificate)
    connect = page(issue_token=str)["connect_with_certificate"]
    async with start_mtls(client) as platform, connect(platform.address, tmp_path) as connected:
        event = event_pb2.EventInput(
            merchant_id="m_1", type="payment.succeeded", payload=b"{}", idempotency_key="k"
        )
        first = await connected.publish(event)
        async with connected.publisher() as publisher:
            second = await (await publisher.publish(event))
        assert (second.id, second.duplicate) == (first.id, True)


async def test_a_client_with_neither_token_nor_certificate_is_not_made() -> None:
    for tls in (True, False):
        with pytest.raises(ValueError, match="certificate"):
            PostriderClient("localhost:1", None, tls=tls)


def test_the_handlers_that_identify_are_as_few_as_the_methods() -> None:
    """What wraps them remembers each handler it is given."""
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
    """What gRPC says of the other side."""
    return {
        "x509_pem_cert": [issued.certificate],
        "peer_uri": [uri.encode() for uri in uris],
        "peer_dns": [name.encode() for name in dns],
    }


def test_a_certificate_that_expires_on_a_live_connection_is_nobodys() -> None:
    now = 0.0
    callers = CertificateCallers(parse_certificate_scopes(SCOPES), lambda: now)
    shown = peer(AUTHORITY.issue(uris=(PAYMENTS,)), PAYMENTS)
    caller = callers.identify(shown)
    assert callers.identify(shown) is caller
    now = caller.expires_at - 1
    callers.identify(shown)
    now = caller.expires_at
    with pytest.raises(Unauthenticated):
        callers.identify(shown)


def test_the_first_known_identity_counts_and_uris_come_first() -> None:
    callers = CertificateCallers(parse_certificate_scopes(SCOPES))
    both = peer(AUTHORITY.issue(), "https://unknown.example", PAYMENTS, dns=("ops.internal",))
    assert callers.identify(both).subject == f"certificate:{PAYMENTS}"
    assert callers.identify(both).merchant_id is None
    names = callers.identify(peer(AUTHORITY.issue(), dns=("x", "ops.internal")))
    assert names.scopes == {Scope.ADMIN, Scope.PUBLISH}


@pytest.mark.parametrize(
    ("text", "mend"),
    [
        ("spiffe://bank/pay", "must be identity=scope"),
        ("=events:publish", "must be identity=scope"),
        ("a b=events:publish", "must be identity=scope"),
        ("bänk=events:publish", "must be identity=scope"),
        ("spiffe://bank/pay=", "must be among"),
        ("spiffe://bank/pay=events:publish everything", "must be among"),
    ],
)
def test_a_wrong_list_of_identities_says_what_is_wrong(text: str, mend: str) -> None:
    with pytest.raises(ValueError, match=mend):
        parse_certificate_scopes(text)
