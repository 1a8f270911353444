"""What a merchant sets on a webhook config, as its receiver meets it."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import replace
from time import monotonic, time
from typing import Any

import pytest
import svix.webhooks
from aiohttp import web
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from core.ids import parse_id
from core.signing import standard_secret
from delivery.webhooks import erase_expired_secrets
from postrider.v1 import delivery_pb2, delivery_service_pb2, event_pb2, event_service_pb2
from postrider.v1 import webhook_config_service_pb2 as pb
from postrider.v1.webhook_config_pb2 import SIGNATURE_SCHEME_ED25519, WebhookConfig
from postrider_client import WebhookRefused, verify_webhook
from tests.support.platform import Platform
from tests.support.receiver import Received, Receiver
from tests.support.signatures import is_genuine

AMPLE = 20.0


class Turnstile:
    """Answers when told to, and knows how many were inside at once."""

    def __init__(self) -> None:
        self.inside = self.most = 0
        self.opened = asyncio.Event()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await self.opened.wait()
        self.inside -= 1
        return web.Response()


class Clocked:
    """Answers at once and notes when."""

    def __init__(self) -> None:
        self.times: list[float] = []

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.times.append(monotonic())
        return web.Response()

    def most_above(self, rate: float) -> float:
        """By how many webhooks the busiest stretch exceeds what the rate brings in its time."""
        return max(
            (last - first + 1) - rate * (self.times[last] - self.times[first])
            for first in range(len(self.times))
            for last in range(first, len(self.times))
        )


async def publish_many(platform: Platform, count: int) -> None:
    event = event_pb2.EventInput(merchant_id="m_1", type="payment.succeeded", payload_text="{}")
    await platform.events.PublishEvents(
        event_service_pb2.PublishEventsRequest(events=[event] * count), metadata=platform.producer()
    )


async def update(platform: Platform, webhook_id: str, **fields: Any) -> None:
    await platform.webhooks.UpdateWebhookConfig(
        pb.UpdateWebhookConfigRequest(
            webhook_config=WebhookConfig(id=webhook_id, **fields),
            update_mask=FieldMask(paths=list(fields)),
        ),
        metadata=platform.merchant(),
    )


async def rotate(platform: Platform, webhook_id: str, seconds: float) -> pb.RotateSecretResponse:
    overlap = Duration()
    overlap.FromNanoseconds(round(seconds * 1e9))
    return await platform.webhooks.RotateSecret(
        pb.RotateSecretRequest(id=webhook_id, overlap=overlap), metadata=platform.merchant()
    )


async def deliveries(platform: Platform) -> list[delivery_pb2.Delivery]:
    response = await platform.deliveries.ListDeliveries(
        delivery_service_pb2.ListDeliveriesRequest(page_size=100), metadata=platform.merchant()
    )
    return list(response.deliveries)


async def until_queued(pool: Any, expected: dict[str, int]) -> None:
    async with asyncio.timeout(AMPLE):
        found: Counter[str] = Counter()
        while found != expected:
            rows = await pool.fetch("SELECT state FROM delivery_queue")
            found = Counter(row["state"] for row in rows)


def verifies(secret: str, received: Received) -> bool:
    """Whether a merchant with this secret takes it, by both headers, which must agree."""
    by_ours = is_genuine(
        secret,
        received.message_id,
        received.body,
        received.headers["X-Webhook-Signature"],
        now=time(),
    )
    try:
        Webhook(standard_secret(secret)).verify(received.body, received.headers)
    except WebhookVerificationError:
        assert not by_ours
        return False
    assert by_ours
    return True


# Headers.


async def test_custom_headers_are_sent_and_follow_updates(
    platform: Platform, receiver: Receiver
) -> None:
    headers = {"Authorization": "Bearer swordfish", "X-Tenant": "a b"}
    created = await platform.register(receiver.url, headers=headers)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
        await update(platform, created.webhook_config.id, headers={"X-Tenant": "c"})
        await platform.publish()
        await receiver.wait_for(2)

    ping, first, second = receiver.requests
    assert ping.is_ping
    for request in (ping, first):
        assert request.headers["Authorization"] == "Bearer swordfish"
        assert request.headers["X-Tenant"] == "a b"
        assert verifies(created.secret, request)
    assert second.headers["X-Tenant"] == "c"
    assert "Authorization" not in second.headers
    assert second.headers["Content-Type"] == "application/json"


# Timeout.


async def test_config_timeout_ends_attempt(platform: Platform, receiver: Receiver) -> None:
    await platform.register(
        receiver.url, timeout=Duration(seconds=1), retry_schedule=[Duration(seconds=1)]
    )
    receiver.script.append(Turnstile())
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(2)
    [delivery] = await deliveries(platform)
    assert [a.outcome for a in delivery.attempts] == [
        delivery_pb2.OUTCOME_TIMEOUT,
        delivery_pb2.OUTCOME_SUCCEEDED,
    ]
    assert 1000 <= delivery.attempts[0].duration.ToMilliseconds() < 5000


async def test_timeout_is_capped_by_half_of_the_lease(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(
        receiver.url, timeout=Duration(seconds=30), retry_schedule=[Duration(seconds=1)]
    )
    receiver.script.append(Turnstile())
    async with platform.engine(delivery_timeout_seconds=0.5, lease_seconds=3.0):
        await platform.publish()
        await receiver.wait_for(2)
    [delivery] = await deliveries(platform)
    # Longer than the operator's timeout, and not reclaimed while it ran.
    assert 1500 <= delivery.attempts[0].duration.ToMilliseconds() < 3000
    assert delivery.attempts[0].outcome == delivery_pb2.OUTCOME_TIMEOUT


# In flight.


@pytest.mark.parametrize("caps", [(2, 32, 2), (1000, 3, 3), (0, 4, 4)])
async def test_smaller_in_flight_limit_applies(
    platform: Platform, receiver: Receiver, pool: Any, caps: tuple[int, int, int]
) -> None:
    own, operators, most = caps
    await platform.register(receiver.url, max_in_flight=own)
    receiver.default = turnstile = Turnstile()
    async with platform.engine(max_in_flight_per_webhook=operators):
        await publish_many(platform, 12)
        await until_queued(pool, {"leased": most, "parked": 12 - most})
        turnstile.opened.set()
        await receiver.wait_for(12)
    assert turnstile.most == most
    assert len(receiver.webhooks) == 12


# Rate.


@pytest.mark.parametrize("engines", [1, 2])
async def test_rate_limit_holds_for_all_engines_together(
    platform: Platform, receiver: Receiver, engines: int
) -> None:
    await platform.register(receiver.url, rate_limit=20.0)
    receiver.default = clocked = Clocked()
    async with AsyncExitStack() as stack:
        for _ in range(engines):
            await stack.enter_async_context(platform.engine())
        await publish_many(platform, 70)
        await receiver.wait_for(70)

    # A second's worth and one may come at once; more when a busy machine is late with the first
    # handshakes, but by far not all 70.
    assert clocked.most_above(20.0) <= 21 + 15
    # And the rate is used: 49 of them have to wait, 2.5 s at the least.
    assert clocked.times[-1] - clocked.times[0] <= 12
    assert {request.headers["X-Webhook-Attempt"] for request in receiver.webhooks} == {"1"}
    assert len({request.message_id for request in receiver.webhooks}) == 70


async def test_excess_over_rate_limit_is_parked_until_lifted(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url, rate_limit=0.001)
    async with platform.engine():
        await publish_many(platform, 5)
        await until_queued(pool, {"parked": 4})
        assert len(receiver.webhooks) == 1
        await update(platform, created.webhook_config.id, rate_limit=0)
        await receiver.wait_for(5)
    assert {d.attempt_count for d in await deliveries(platform)} == {1}
    assert len(receiver.webhooks) == 5


async def test_rate_limited_config_does_not_delay_others(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url, rate_limit=0.001)
    await platform.register(f"{receiver.url}/free")
    async with platform.engine():
        await publish_many(platform, 50)
        await receiver.wait_for(51, timeout=5)
    paths = Counter(request.path for request in receiver.webhooks)
    assert paths == {"/hook": 1, "/hook/free": 50}


async def test_retries_count_towards_rate_limit(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url, rate_limit=0.001)
    receiver.default = 500
    async with platform.engine(retry_schedule_seconds=(0.01,)):
        await platform.publish()
        await receiver.wait_for(1)
        await until_queued(pool, {"parked": 1})
    assert len(receiver.webhooks) == 1


# Two secrets.


async def test_both_secrets_sign_until_overlap_ends(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    # The retry falls due after the overlap, so nothing has to wait for it to end.
    receiver.script.append(500)
    async with platform.engine(retry_schedule_seconds=(3.0,)):
        rotated = await rotate(platform, created.webhook_config.id, 2.5)
        await platform.publish()
        first, second = await receiver.wait_for(2)

    old, new = created.secret, rotated.secret
    assert [verifies(old, first), verifies(new, first)] == [True, True]
    assert [verifies(old, second), verifies(new, second)] == [False, True]
    assert first.headers["webhook-signature"].count("v1,") == 2
    assert first.headers["X-Webhook-Signature"].count("v1=") == 2
    newest = first.headers["X-Webhook-Signature"].split(",")[1]
    assert is_genuine(
        new,
        first.message_id,
        first.body,
        f"t={first.headers['webhook-timestamp']},{newest}",
        now=time(),
    )
    assert second.headers["webhook-signature"].count("v1,") == 1

    await erase_expired_secrets(pool)
    assert await pool.fetchval("SELECT previous_secret_ciphertext FROM webhook_configs") is None


async def test_rotation_without_overlap_drops_old_secret(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
        rotated = await rotate(platform, created.webhook_config.id, 0)
        await platform.publish()
        first, second = await receiver.wait_for(2)
    assert verifies(created.secret, first)
    assert [verifies(created.secret, second), verifies(rotated.secret, second)] == [False, True]


async def test_only_the_newest_two_secrets_sign(platform: Platform, receiver: Receiver) -> None:
    created = await platform.register(receiver.url)
    rotations = [await rotate(platform, created.webhook_config.id, 3600) for _ in range(2)]
    async with platform.engine():
        await platform.publish()
        [received] = await receiver.wait_for(1)
    secrets = [created.secret, *(rotation.secret for rotation in rotations)]
    assert [verifies(secret, received) for secret in secrets] == [False, True, True]


async def test_header_prefix_works_with_svix_library(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url, header_prefix="svix")
    library = svix.webhooks.Webhook(created.standard_webhooks_secret)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
    assert [request.is_ping for request in receiver.requests] == [True, False]
    for request in receiver.requests:
        library.verify(
            request.body, {k: v for k, v in request.headers.items() if k.startswith("svix-")}
        )
        assert verifies(created.secret, request)


async def test_rotation_to_ed25519_signs_with_both_during_overlap(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    receiver.script.append(500)
    async with platform.engine(retry_schedule_seconds=(3.0,)):
        request = pb.RotateSecretRequest(
            id=created.webhook_config.id,
            overlap=Duration(seconds=2),
            signature_scheme=SIGNATURE_SCHEME_ED25519,
        )
        rotated = await platform.webhooks.RotateSecret(request, metadata=platform.merchant())
        await platform.publish()
        first, second = await receiver.wait_for(2)
    key = rotated.webhook_config.public_key
    for received in (first, second):
        assert verify_webhook(key, received.headers, received.body).id == first.message_id
    assert verify_webhook(created.secret, first.headers, first.body)
    assert verifies(created.secret, first)
    assert not verifies(created.secret, second)
    with pytest.raises(WebhookRefused):
        verify_webhook(created.secret, second.headers, second.body)


async def test_stored_header_injection_fails_only_its_own_config(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    healthy = await platform.register(receiver.url)
    # No call lets this in; somebody with the database may.
    await pool.execute(
        """UPDATE webhook_configs SET headers = $1, version = version + 1 WHERE id <> $2""",
        '{"X-Tenant": "a\\r\\nX-Admin: 1"}',
        parse_id("wh", healthy.webhook_config.id),
    )
    async with platform.engine(max_fault_retries=0):
        await platform.publish()
        await receiver.wait_for(1)
        await until_queued(pool, {})
    rows = await pool.fetch("SELECT outcome, status_code, detail FROM attempts ORDER BY outcome")
    assert [tuple(row) for row in rows] == [
        ("internal_error", None, "Postrider could not make the request"),
        ("succeeded", 200, "200 OK"),
    ]
    assert len(receiver.webhooks) == 1


@pytest.mark.parametrize(("seconds", "dialled"), [(1e-6, [True, True]), (300.0, [True, False])])
async def test_connection_is_reused_up_to_its_maximum_age(
    platform: Platform, receiver: Receiver, pool: Any, seconds: float, dialled: list[bool]
) -> None:
    egress = platform.settings.egress.model_copy(update={"receiver_connection_seconds": seconds})
    platform.settings = replace(platform.settings, egress=egress)
    await platform.register(receiver.url)
    async with platform.engine():
        for count in (1, 2):
            await platform.publish()
            await receiver.wait_for(count)
            await until_queued(pool, {})
    rows = await pool.fetch("SELECT connect_us FROM attempts ORDER BY delivery_id")
    assert [row["connect_us"] is not None for row in rows] == dialled
