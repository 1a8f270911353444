"""RedeliverDelivery: sends the event of a finished delivery again, as a new delivery."""

from typing import Any

from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from postrider.v1 import delivery_pb2
from postrider.v1.delivery_pb2 import Delivery
from tests.support.factories import fail_open_delivery, health
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

READY = delivery_pb2.DELIVERY_STATE_READY
PARKED = delivery_pb2.DELIVERY_STATE_PARKED
DELIVERED = delivery_pb2.DELIVERY_STATE_DELIVERED
FAILED = delivery_pb2.DELIVERY_STATE_FAILED
CANCELLED = delivery_pb2.DELIVERY_STATE_CANCELLED


async def redeliver(platform: Platform, delivery_id: str, merchant_id: str = "m_1") -> Any:
    answer = await platform.as_merchant(merchant_id).RedeliverDelivery(id=delivery_id)
    return answer.delivery


async def listed(platform: Platform) -> dict[str, Delivery]:
    answer = await platform.as_merchant().ListDeliveries()
    return {delivery.id: delivery for delivery in answer.deliveries}


async def test_redelivery_keeps_the_message_id_and_restarts_attempts(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url, retry_schedule=[Duration(seconds=1)])
    receiver.script.extend([500, 500, 500, 200])
    async with platform.engine():
        await platform.publish('{"n": 1}')
        await receiver.wait_for(2)
        [failed] = (await listed(platform)).values()
        while failed.state != FAILED:
            [failed] = (await listed(platform)).values()
        made = await redeliver(platform, failed.id)
        await receiver.wait_for(4)

    assert made.id != failed.id
    assert (made.state, made.attempt_count, made.redelivery_of) == (READY, 0, failed.id)
    assert (made.event_id, made.webhook_id) == (failed.event_id, failed.webhook_id)
    first, *_, last = receiver.webhooks
    assert last.message_id == first.message_id == failed.event_id
    assert last.body == first.body == b'{"n": 1}'
    numbers = [request.headers["X-Webhook-Attempt"] for request in receiver.webhooks]
    assert numbers == ["1", "2", "1", "2"]
    after = await listed(platform)
    assert after[failed.id] == failed
    assert after[made.id].state == DELIVERED
    assert after[made.id].redelivery_of == failed.id
    assert [attempt.number for attempt in after[made.id].attempts] == [1, 2]


async def test_redelivery_of_a_redelivery_names_its_original(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
    [original] = await listed(platform)
    async with platform.engine():
        second = await redeliver(platform, original)
        await receiver.wait_for(2)
    async with platform.engine():
        third = await redeliver(platform, second.id)
        await receiver.wait_for(3)
    found = await listed(platform)
    assert {d.id: d.redelivery_of for d in found.values()} == {
        original: "",
        second.id: original,
        third.id: second.id,
    }
    assert {d.state for d in found.values()} == {DELIVERED}


async def changes_on_record(pool: Any) -> int:
    found: int = await pool.fetchval(
        "SELECT count(*) FROM audit_entries WHERE resource LIKE 'dlv%' AND result = 'OK'"
    )
    return found


async def test_redelivery_of_an_open_delivery_is_refused(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await platform.publish()
    [delivery_id] = await listed(platform)
    for change in (
        "state = 'ready'",
        "state = 'leased', lease_id = id, lease_until = now() + '1 h'",
        "state = 'parked', lease_id = NULL, lease_until = NULL",
    ):
        await pool.execute(f"UPDATE delivery_queue SET {change}")  # noqa: S608
        async with refused(StatusCode.FAILED_PRECONDITION, "DELIVERY_OPEN") as error:
            await redeliver(platform, delivery_id)
        assert "wait" in error.message
    assert list(await listed(platform)) == [delivery_id]
    assert not await changes_on_record(pool)


async def test_redelivery_to_a_deleted_config_is_refused(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await platform.publish()
    await platform.delete(webhook_id)
    [cancelled] = (await listed(platform)).values()
    assert cancelled.state == CANCELLED
    async with refused(StatusCode.FAILED_PRECONDITION, "REDELIVERY_IMPOSSIBLE"):
        await redeliver(platform, cancelled.id)
    assert not await pool.fetchval("SELECT count(*) FROM delivery_queue")
    assert not await changes_on_record(pool)


async def test_redelivery_of_a_removed_event_is_refused(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    await pool.execute("DELETE FROM events")
    async with refused(StatusCode.FAILED_PRECONDITION, "REDELIVERY_IMPOSSIBLE"):
        await redeliver(platform, delivery_id)
    assert not await pool.fetchval("SELECT count(*) FROM delivery_queue")


async def test_redelivery_to_an_inactive_config_is_parked(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    await pool.execute("UPDATE webhook_configs SET active = false, deactivation_reason = 'paused'")
    made = await redeliver(platform, delivery_id)
    assert made.state == PARKED
    assert not made.HasField("next_attempt_time")
    await platform.update(webhook_id, active=True)
    async with platform.engine():
        await receiver.wait_for(1)
    assert (await listed(platform))[made.id].state == DELIVERED


async def test_cancelled_redelivery_keeps_its_original_id(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    made = await redeliver(platform, delivery_id)
    await platform.delete(webhook_id)
    after = (await listed(platform))[made.id]
    assert (after.state, after.redelivery_of) == (CANCELLED, delivery_id)


async def test_failed_redelivery_counts_towards_deactivation(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 500
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    for _ in range(2):
        await redeliver(platform, delivery_id)
    async with platform.engine(max_retries=0, max_consecutive_failures=2):
        await receiver.wait_for(2)
    [webhook_id] = await pool.fetchrow("SELECT id FROM webhook_configs")
    assert created.webhook_config.id.endswith(webhook_id.hex)
    assert await health(pool, webhook_id) == (False, "failures", 2)


async def test_redelivery_of_another_merchants_delivery_is_not_found(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    for text in (delivery_id, "dlv_" + "0" * 32, "dlv_", "wh_" + "0" * 32, ""):
        async with refused(StatusCode.NOT_FOUND, "DELIVERY_NOT_FOUND"):
            await redeliver(platform, text, "m_2")
    assert not await pool.fetchval("SELECT count(*) FROM delivery_queue")


async def test_redelivery_is_audited_with_its_actor(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    await redeliver(platform, delivery_id)
    entry = await pool.fetchrow(
        "SELECT actor, merchant_id, resource, result FROM audit_entries"
        " WHERE action = 'RedeliverDelivery'"
    )
    assert tuple(entry) == ("tester", "m_1", delivery_id, "OK")
