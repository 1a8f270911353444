"""DeliveryService: open and finished deliveries as one list, with their attempts."""

from typing import Any

from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from postrider.v1 import delivery_pb2
from postrider.v1.delivery_pb2 import Delivery
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import pages

READY = delivery_pb2.DELIVERY_STATE_READY
PARKED = delivery_pb2.DELIVERY_STATE_PARKED
LEASED = delivery_pb2.DELIVERY_STATE_LEASED
DELIVERED = delivery_pb2.DELIVERY_STATE_DELIVERED
FAILED = delivery_pb2.DELIVERY_STATE_FAILED
CANCELLED = delivery_pb2.DELIVERY_STATE_CANCELLED
BLOCKED = delivery_pb2.DELIVERY_STATE_BLOCKED


async def page(platform: Platform, **request: Any) -> Any:
    return await platform.as_merchant().ListDeliveries(**request)


async def deliveries(platform: Platform, **request: Any) -> list[Delivery]:
    return list((await page(platform, **request)).deliveries)


async def get(platform: Platform, delivery_id: str) -> Any:
    got = await platform.as_merchant().GetDelivery(id=delivery_id)
    return got.delivery


async def settle_in_each_state(
    platform: Platform, receiver: Receiver, pool: Any
) -> dict[delivery_pb2.DeliveryState.ValueType, str]:
    """Make a delivery in each state except cancelled. Returns the ids by state."""
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    receiver.script.extend([200, 400])
    async with platform.engine(max_retries=0, max_consecutive_failures=100):
        for count in (1, 2):
            await platform.publish()
            await receiver.wait_for(count)
    await platform.publish()
    await platform.register(receiver.url, events=("refund.failed",), active=False)
    await platform.publish(type="refund.failed")
    await platform.register(receiver.url, events=("payment.created",), ordered=True)
    for _ in range(2):
        await platform.publish(type="payment.created", ordering_key="pay_1")
    # Lease the first of the two, so that each state has one delivery.
    await pool.execute(
        "UPDATE delivery_queue SET state = 'leased', lease_id = id, lease_until = now() + '1 h'"
        " WHERE ordering_key IS NOT NULL AND state = 'ready'"
    )
    ids = {delivery.state: delivery.id for delivery in await deliveries(platform)}
    assert set(ids) == {DELIVERED, FAILED, READY, PARKED, LEASED, BLOCKED}
    assert await deliveries(platform, webhook_id=webhook_id, state=READY)
    return ids


async def test_ready_delivery_has_its_next_attempt_time(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    published = await platform.publish()

    [delivery] = await deliveries(platform)

    assert delivery.id.startswith("dlv_")
    assert delivery.webhook_id == created.webhook_config.id
    assert delivery.event_id == published.event.id
    assert delivery.event_type == "payment.succeeded"
    assert (delivery.state, delivery.attempt_count) == (READY, 0)
    assert delivery.next_attempt_time == delivery.create_time
    assert not delivery.HasField("finish_time")
    assert not delivery.attempts
    assert await get(platform, delivery.id) == delivery


async def test_attempts_are_listed_oldest_first_with_outcomes(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url, retry_schedule=[Duration(seconds=1)])
    receiver.script.extend([503, 200])
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
        await receiver.wait_for(2)

    [delivery] = await deliveries(platform)

    assert (delivery.state, delivery.attempt_count) == (DELIVERED, 2)
    assert delivery.HasField("finish_time")
    assert not delivery.HasField("next_attempt_time")
    first, second = delivery.attempts
    assert (first.number, first.outcome) == (1, delivery_pb2.OUTCOME_HTTP_ERROR)
    assert (first.status_code, first.detail) == (503, "503 Service Unavailable")
    assert (second.number, second.outcome) == (2, delivery_pb2.OUTCOME_SUCCEEDED)
    assert second.status_code == 200
    assert second.start_time.ToNanoseconds() >= first.start_time.ToNanoseconds() + 10**9
    assert all(0 < attempt.duration.ToNanoseconds() < 10**10 for attempt in (first, second))
    assert await get(platform, delivery.id) == delivery


async def test_attempt_recorded_during_a_read_is_left_out(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await platform.publish()
    # An engine may record an attempt between the reads of a delivery and of its attempts.
    await pool.execute("""
        INSERT INTO attempts (delivery_id, number, outcome, detail, started_at, duration_us)
        SELECT id, 1, 'succeeded', '200 OK', now(), 1 FROM delivery_queue
    """)
    [delivery] = await deliveries(platform)
    assert (delivery.state, delivery.attempt_count, len(delivery.attempts)) == (READY, 0, 0)
    assert await get(platform, delivery.id) == delivery


async def test_delivery_filters_combine(platform: Platform, receiver: Receiver, pool: Any) -> None:
    ids = await settle_in_each_state(platform, receiver, pool)
    every = await deliveries(platform)
    for state, delivery_id in ids.items():
        assert [d.id for d in await deliveries(platform, state=state)] == [delivery_id]
    assert await deliveries(platform, state=CANCELLED) == []
    assert not (await get(platform, ids[BLOCKED])).HasField("next_attempt_time")
    assert (await get(platform, ids[LEASED])).HasField("next_attempt_time")
    for delivery in every:
        same_webhook = [d for d in every if d.webhook_id == delivery.webhook_id]
        assert await deliveries(platform, webhook_id=delivery.webhook_id) == same_webhook
        assert await deliveries(platform, event_id=delivery.event_id) == [delivery]
        both = {"event_id": delivery.event_id, "webhook_id": delivery.webhook_id}
        assert await deliveries(platform, **both, state=delivery.state) == [delivery]
        assert await deliveries(platform, **both, state=CANCELLED) == []
        assert await get(platform, delivery.id) == delivery


async def test_open_and_finished_deliveries_share_one_paged_list(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    ids = await settle_in_each_state(platform, receiver, pool)
    for _ in range(3):
        await platform.publish()
    whole = [delivery.id for delivery in await deliveries(platform)]
    assert len(whole) == len(ids) + 3
    assert whole == sorted(whole, reverse=True)
    for size in (1, 2, 7, 8):
        found = await pages(platform.as_merchant().ListDeliveries, page_size=size)
        assert all(0 < len(part.deliveries) <= size for part in found)
        assert [delivery.id for part in found for delivery in part.deliveries] == whole


async def test_delivery_finishing_between_pages_is_listed_once(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    for _ in range(4):
        await platform.publish()
    first = await page(platform, page_size=2)
    async with platform.engine():
        await receiver.wait_for(4)
    rest = await page(platform, page_token=first.next_page_token)
    seen = [delivery.id for delivery in (*first.deliveries, *rest.deliveries)]
    assert len(set(seen)) == len(seen) == 4
    assert {delivery.state for delivery in rest.deliveries} == {DELIVERED}


async def test_page_size_is_50_by_default_and_at_most_100(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    for _ in range(101):
        await platform.publish()
    assert len(await deliveries(platform)) == 50
    assert len(await deliveries(platform, page_size=1000)) == 100


async def test_delivery_page_stays_below_the_message_size_limit(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    published = {(await platform.publish()).event.id for _ in range(100)}
    # The longest history: every possible retry, each answered with binary zeros.
    await pool.execute("UPDATE delivery_queue SET attempt_count = 21")
    await pool.execute("""
        INSERT INTO attempts (delivery_id, number, outcome, detail, started_at, duration_us,
            response_excerpt)
        SELECT id, number, 'http_error', '500', now(), 1, repeat('\\x00', 1024)
        FROM delivery_queue, generate_series(1, 21) number
    """)
    # The channel has gRPC's default limit of 4 MiB per message.
    found = await pages(platform.as_merchant().ListDeliveries, page_size=100)
    seen = [delivery.event_id for part in found for delivery in part.deliveries]
    assert len(seen) == 100
    assert set(seen) == published


async def test_page_token_requires_the_same_filters(platform: Platform, receiver: Receiver) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    for _ in range(2):
        event_id = (await platform.publish()).event.id
    token = (await page(platform, page_size=1, webhook_id=webhook_id)).next_page_token
    assert token
    for other in (
        {},
        {"webhook_id": webhook_id, "state": READY},
        {"webhook_id": webhook_id, "event_id": event_id},
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
            await page(platform, page_token=token, **other)
    assert len(await deliveries(platform, webhook_id=webhook_id, page_token=token)) == 1


async def test_invalid_filters_are_refused_by_field(platform: Platform) -> None:
    for request, reason in (
        ({"webhook_id": "wh_1"}, "ID_INVALID"),
        ({"webhook_id": "evt_" + "0" * 32}, "ID_INVALID"),
        ({"event_id": "\x00"}, "ID_INVALID"),
        ({"state": 99}, "STATE_UNKNOWN"),
        ({"state": -1}, "STATE_UNKNOWN"),
        ({"page_size": -1}, "PAGE_SIZE_INVALID"),
        ({"page_token": "x"}, "PAGE_TOKEN_INVALID"),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, reason) as error:
            await page(platform, **request)
        assert error.violations == dict.fromkeys(request, reason)
    async with refused(StatusCode.INVALID_ARGUMENT, "ID_INVALID") as error:
        await page(platform, event_id="evt_1")
    assert error.message == "event_id: must be the event's id: evt_ and 32 hexadecimal digits"


async def test_unknown_delivery_is_not_found(platform: Platform) -> None:
    async with refused(StatusCode.NOT_FOUND, "DELIVERY_NOT_FOUND") as error:
        await get(platform, "dlv_" + "0" * 32)
    assert "dlv_" + "0" * 32 in error.message
