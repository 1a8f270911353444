"""CreateWebhookConfig: the ping, refusals with their reasons, the secret and the quota."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode
from pydantic import SecretStr
from standardwebhooks.webhooks import Webhook

from core.settings import EgressSettings
from postrider.v1 import webhook_config_pb2
from tests.support.endpoint import answering
from tests.support.factories import count_rows
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import Refusal, refused
from tests.support.rpcs import messages
from tests.support.signatures import is_genuine

NOT_PUBLIC = "URL_ADDRESS_NOT_ALLOWED"
NOT_A_NAME = "URL_HOST_NOT_ALLOWED"
MALFORMED = "URL_MALFORMED"

REFUSED_URLS = {
    "": "URL_NOT_HTTPS",
    "http://example.com/": "URL_NOT_HTTPS",
    "ftp://example.com/": "URL_NOT_HTTPS",
    "https://user:pass@example.com/": "URL_HAS_CREDENTIALS",
    "https://user@example.com/": "URL_HAS_CREDENTIALS",
    "https://example.com/#top": "URL_HAS_FRAGMENT",
    "https://example.com:0/": "URL_PORT_NOT_ALLOWED",
    "https://example.com:65536/": "URL_PORT_NOT_ALLOWED",
    "https://example.com:99999/": "URL_PORT_NOT_ALLOWED",
    "https://example.com:port/": MALFORMED,
    f"https://example.com/{'a' * 2048}": "URL_TOO_LONG",
    "https://example.com/a b": MALFORMED,
    "https://example.com/\x00": MALFORMED,
    "https://10.0.0.1/": NOT_PUBLIC,
    "https://172.16.0.1/": NOT_PUBLIC,
    "https://192.168.1.1/": NOT_PUBLIC,
    "https://100.64.0.1/": NOT_PUBLIC,
    "https://0.0.0.0/": NOT_PUBLIC,
    "https://169.254.169.254/latest/meta-data": NOT_PUBLIC,
    "https://[::1]/": NOT_PUBLIC,
    "https://[::]/": NOT_PUBLIC,
    "https://[fe80::1]/": NOT_PUBLIC,
    "https://[fd00:ec2::254]/": NOT_PUBLIC,
    "https://[::ffff:169.254.169.254]/": MALFORMED,
    "https://[::ffff:a9fe:a9fe]/": NOT_PUBLIC,
    "https://[64:ff9b::a9fe:a9fe]/": NOT_PUBLIC,
    "https://[2002:a9fe:a9fe::]/": NOT_PUBLIC,
    "https://2852039166/": MALFORMED,
    "https://0xa9fea9fe/": MALFORMED,
    "https://0xa9.0xfe.0xa9.0xfe/": MALFORMED,
    "https://0251.0376.0251.0376/": MALFORMED,
    "https://169.254.43518/": MALFORMED,
    "https://169.254.169.254./": MALFORMED,
    "https://１６９.254.169.254/": MALFORMED,
    "https://metadata.google.internal/": NOT_A_NAME,
    "https://metadata.goog/": NOT_A_NAME,
    "https://intranet/": NOT_A_NAME,
    "https://db.svc.cluster.local/": NOT_A_NAME,
}


async def test_create_pings_the_url_signed_with_the_new_secret(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url, description="orders")

    [ping] = receiver.requests
    assert ping.headers["X-Webhook-Event"] == "webhook.ping"
    body = {"type": "webhook.ping", "webhook_id": created.webhook_config.id}
    assert json.loads(ping.body) == body
    assert Webhook(created.standard_webhooks_secret).verify(ping.body, ping.headers) == body
    assert is_genuine(
        created.secret,
        ping.message_id,
        ping.body,
        ping.headers["X-Webhook-Signature"],
        now=int(ping.headers["webhook-timestamp"]),
    )
    assert len(created.secret) == 64
    assert int(created.secret, 16)


async def test_create_returns_defaults_and_ignores_output_fields(
    platform: Platform, receiver: Receiver
) -> None:
    asked = webhook_config_pb2.WebhookConfig(
        url=receiver.url,
        events=("payment.succeeded", "refund.failed"),
        description="orders",
        retry_schedule=[Duration(seconds=1), Duration(seconds=2, nanos=500_000_000)],
        id="wh_" + "0" * 32,
        merchant_id="m_2",
        consecutive_failures=7,
        etag="mine",
        deactivation_reason=webhook_config_pb2.DEACTIVATION_REASON_FAILURES,
    )
    created = await platform.as_merchant("m_1").CreateWebhookConfig(webhook_config=asked)

    config = created.webhook_config
    assert config.id.startswith("wh_")
    assert config.id != "wh_" + "0" * 32
    assert config.merchant_id == "m_1"
    assert config.url == receiver.url
    assert list(config.events) == ["payment.succeeded", "refund.failed"]
    assert config.description == "orders"
    assert config.active
    assert not config.deactivation_reason
    assert config.consecutive_failures == 0
    assert [d.ToMilliseconds() for d in config.retry_schedule] == [1000, 2500]
    assert config.etag not in {"", "mine"}
    assert config.HasField("create_time")
    assert config.update_time == config.create_time


async def test_create_accepts_a_paused_config(platform: Platform, receiver: Receiver) -> None:
    config = (await platform.register(receiver.url, active=False)).webhook_config
    assert not config.active
    assert config.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_PAUSED


async def refused_as_unreachable(platform: Platform, url: str, pool: Any) -> Refusal:
    """The refusal of a create whose ping fails. Nothing is stored."""
    async with refused(StatusCode.FAILED_PRECONDITION, "URL_UNREACHABLE") as error:
        await platform.register(url)
    assert await count_rows(pool, "webhook_configs") == 0
    return error


async def test_create_refuses_url_whose_ping_fails(
    platform: Platform, pool: Any, authority: trustme.CA
) -> None:
    for status in (302, 308, 404, 410, 500, 503):
        async with answering(authority, status, {"Location": "https://example.com/"}) as url:
            error = await refused_as_unreachable(platform, url, pool)
        assert str(status) in error.message
        assert error.metadata == {"outcome": "http_error", "status_code": str(status)}


async def test_create_accepts_ping_status_from_live_endpoint(
    platform: Platform, authority: trustme.CA
) -> None:
    for status in (200, 204, 400, 401, 403, 429):
        async with answering(authority, status) as url:
            assert (await platform.register(url)).webhook_config.active


async def test_create_refuses_closed_port(platform: Platform, pool: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"https://127.0.0.1:{taken.getsockname()[1]}/"
        error = await refused_as_unreachable(platform, url, pool)
    assert "connection refused" in error.message
    assert error.metadata == {"outcome": "connection_error", "status_code": "0"}


async def test_create_refuses_untrusted_certificate(platform: Platform, pool: Any) -> None:
    async with answering(trustme.CA(), 200) as url:
        error = await refused_as_unreachable(platform, url, pool)
    assert "certificate" in error.message
    assert error.metadata["outcome"] == "tls_error"


@pytest.mark.server(ping_timeout_seconds=0.2)
async def test_create_refuses_silent_receiver_after_ping_timeout(
    platform: Platform, pool: Any
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"https://127.0.0.1:{mute.getsockname()[1]}/"
        error = await refused_as_unreachable(platform, url, pool)
    assert error.metadata["outcome"] == "timeout"


async def test_create_stores_nothing_after_internal_ping_error(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    with socket.socket() as away:
        away.bind(("127.0.0.1", 0))
        proxy = SecretStr(f"http://127.0.0.1:{away.getsockname()[1]}")
        async with (
            start_platform(egress=EgressSettings(egress_proxy=proxy)) as platform,
            refused(StatusCode.UNAVAILABLE, "PING_NOT_POSSIBLE") as error,
        ):
            await platform.register("https://merchant.example.com/")
    assert "internal error" in error.message
    assert await count_rows(pool, "webhook_configs") == 0


async def test_create_refuses_forbidden_urls(platform: Platform, pool: Any) -> None:
    for url, reason in REFUSED_URLS.items():
        async with refused(StatusCode.INVALID_ARGUMENT, reason) as error:
            await platform.register(url)
        assert error.violations == {"webhook_config.url": reason}, url
    assert await count_rows(pool, "webhook_configs") == 0


async def test_create_refuses_name_resolving_to_private_address(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def inner(*_: Any) -> list[str]:
        return ["10.0.0.1"]

    monkeypatch.setattr("delivery.http.resolver.NameServers.look_up", inner)
    async with refused(StatusCode.INVALID_ARGUMENT, NOT_PUBLIC) as error:
        await platform.register("https://inner.example.com/")
    assert error.violations == {"webhook_config.url": NOT_PUBLIC}
    assert "10.0.0.1" not in error.message
    assert await count_rows(pool, "webhook_configs") == 0


async def test_create_reports_every_invalid_field(platform: Platform, receiver: Receiver) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "URL_NOT_HTTPS") as error:
        await platform.register(
            "http://example.com/",
            events=("payment.succeeded", "no.such", "refund.failed", "Neither"),
            description="line\nbreak",
            retry_schedule=[Duration(seconds=1), Duration(nanos=1)],
        )
    assert error.violations == {
        "webhook_config.url": "URL_NOT_HTTPS",
        "webhook_config.events[1]": "EVENT_TYPE_UNKNOWN",
        "webhook_config.events[3]": "EVENT_TYPE_UNKNOWN",
        "webhook_config.description": "DESCRIPTION_INVALID",
        "webhook_config.retry_schedule[1]": "RETRY_WAIT_INVALID",
    }
    assert "no.such" in error.message
    assert "ListEventTypes" in error.message
    assert receiver.requests == []


async def test_events_are_1_to_100_and_distinct(platform: Platform, receiver: Receiver) -> None:
    for events, reason in (
        ((), "EVENTS_COUNT"),
        (tuple(f"a.b{n}" for n in range(101)), "EVENTS_COUNT"),
        (("payment.succeeded", "payment.succeeded"), "EVENTS_REPEATED"),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, reason) as error:
            await platform.register(receiver.url, events=events)
        assert error.violations == {"webhook_config.events": reason}


async def test_malformed_event_prefix_error_shows_the_syntax(
    platform: Platform, receiver: Receiver
) -> None:
    for name in ("*", "payment*", "payment.succ*", ".*", "Payment.*"):
        async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_UNKNOWN") as error:
            await platform.register(receiver.url, events=(name,))
        assert f"{name!r}" in error.message
        assert "'payment.*'" in error.message


async def test_error_with_100_unknown_event_types_fits_in_metadata(
    platform: Platform, receiver: Receiver
) -> None:
    # gRPC carries the details in metadata, and clients drop metadata above 8 KiB.
    async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_UNKNOWN") as error:
        await platform.register(receiver.url, events=tuple(f"a.{n:0120}" for n in range(100)))
    assert "webhook_config.events[0]" in error.violations


async def test_eleventh_config_is_refused_until_one_is_deleted(
    platform: Platform, receiver: Receiver
) -> None:
    created = [await platform.register(receiver.url) for _ in range(10)]
    async with refused(StatusCode.RESOURCE_EXHAUSTED, "WEBHOOK_CONFIG_LIMIT") as error:
        await platform.register(receiver.url)
    assert error.quota_subjects == ["merchant:m_1"]
    assert len(receiver.requests) == 10

    await platform.register(receiver.url, merchant_id="m_2")
    await platform.delete(created[0].webhook_config.id)
    await platform.register(receiver.url)


async def test_concurrent_creates_respect_the_quota(
    start_platform: Callable[..., Any], receiver: Receiver, pool: Any
) -> None:
    async def create(platform: Platform) -> str:
        try:
            await platform.register(receiver.url)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async with start_platform(max_pings_per_merchant=20) as platform:
        answers = await asyncio.gather(*(create(platform) for _ in range(20)))

    assert Counter(answers) == {"OK": 10, "RESOURCE_EXHAUSTED": 10}
    assert await count_rows(pool, "webhook_configs") == 10


async def test_secret_is_encrypted_at_rest(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    for table in ("webhook_configs", "audit_entries"):
        for row in await pool.fetch(f"SELECT t::text AS whole FROM {table} t"):  # noqa: S608
            assert created.secret not in row["whole"]
            assert created.secret.encode().hex() not in row["whole"]
    ciphertext = await pool.fetchval("SELECT secret_ciphertext FROM webhook_configs")
    assert bytes.fromhex(created.secret) not in ciphertext
    assert len(ciphertext) > len(created.secret)


def test_only_create_and_rotate_responses_have_secrets() -> None:
    with_secrets = {
        f"{message.name}.{field.name}"
        for message in messages()
        for field in message.fields
        if "secret" in field.name
    }
    assert with_secrets == {
        "CreateWebhookConfigResponse.secret",
        "CreateWebhookConfigResponse.standard_webhooks_secret",
        "RotateSecretResponse.secret",
        "RotateSecretResponse.standard_webhooks_secret",
        # This field is a time.
        "WebhookConfig.previous_secret_expire_time",
    }


async def test_secret_is_in_no_log_and_no_other_response(
    platform: Platform, receiver: Receiver, logged: list[Any]
) -> None:
    created = await platform.register(receiver.url)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
    merchant, webhook_id = platform.as_merchant(), created.webhook_config.id
    answers = [
        await merchant.GetWebhookConfig(id=webhook_id),
        await merchant.ListWebhookConfigs(),
        await merchant.PingWebhookConfig(id=webhook_id),
        await merchant.ListDeliveries(),
    ]
    assert any(entry["event"] == "attempt" for entry in logged)
    for secret in (created.secret, created.standard_webhooks_secret, platform.merchant()[0][1]):
        assert secret not in repr(answers)
        assert secret not in repr(logged)
