"""Configs that become inactive, are paused or deleted, and come back."""

from typing import Any

import pytest

from core.ids import parse_id
from core.lifecycle import DeliveryState
from postrider.v1 import webhook_config_pb2, webhook_config_service_pb2
from tests.support.event_log import EventLog
from tests.support.held_response import HeldResponse
from tests.support.platform import Platform
from tests.support.queue_state import finished_states, queue_states, until, until_queued
from tests.support.receiver import Receiver


async def test_failing_config_goes_inactive_until_reactivated(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.default = 500
    async with platform.engine(
        max_retries=0, max_consecutive_failures=3, max_in_flight_per_webhook=1
    ):
        published = await platform.publish_many(10)
        await log.wait_for("webhook_deactivated")
        config = await platform.config(webhook_id)
        assert not config.active
        assert config.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_FAILURES
        assert config.consecutive_failures == 3
        [entry] = log.named("webhook_deactivated")
        assert (entry["webhook_id"], entry["reason"]) == (webhook_id, "failures")

    assert await queue_states(pool) == {DeliveryState.PARKED: 7}
    assert await finished_states(pool) == {DeliveryState.FAILED: 3}
    assert len(receiver.webhooks) == 3
    receiver.default = 200
    # The queue keeps new events as well, and an engine alone does not reactivate the config.
    published.append((await platform.publish()).event.id)
    async with platform.engine(max_in_flight_per_webhook=1):
        await platform.reactivate(webhook_id)
        await receiver.wait_for(3 + 8)
    assert sorted(receiver.message_ids) == sorted(published)
    assert not await queue_states(pool)
    assert (await platform.config(webhook_id)).consecutive_failures == 0


async def test_410_deactivates_config_at_once(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.script.append(410)
    async with platform.engine(max_in_flight_per_webhook=1):
        await platform.publish_many(3)
        await log.wait_for("webhook_deactivated")
        await until_queued(pool, {"parked": 2})
        [entry] = log.named("webhook_deactivated")
        assert (entry["webhook_id"], entry["reason"]) == (webhook_id, "gone")
        reason = (await platform.config(webhook_id)).deactivation_reason
        assert reason == webhook_config_pb2.DEACTIVATION_REASON_GONE
        assert len(receiver.webhooks) == 1
        await platform.reactivate(webhook_id)
        await receiver.wait_for(3)
    rows = await pool.fetch("SELECT state, attempt_count FROM finished_deliveries ORDER BY state")
    assert [tuple(row) for row in rows] == [("delivered", 1), ("delivered", 1), ("failed", 1)]


async def test_failed_probes_deactivate_config(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = 500

    async def is_inactive() -> bool:
        return not await pool.fetchval("SELECT active FROM webhook_configs")

    async with platform.engine(
        breaker_failures=3,
        breaker_failing_seconds=0.01,
        breaker_cooldown_seconds=0.05,
        breaker_cooldown_max_seconds=0.05,
        max_retries=0,
        max_consecutive_failures=8,
    ):
        await platform.publish_many(30)
        await until(is_inactive)
    reason = await pool.fetchval("SELECT deactivation_reason FROM webhook_configs")
    assert reason == "failures"
    assert 8 <= len(receiver.webhooks) <= 12


async def test_success_resets_consecutive_failures(platform: Platform, receiver: Receiver) -> None:
    created = await platform.register(receiver.url)
    receiver.script.extend([500, 500, 200, 500, 500, 200, 500])
    async with platform.engine(
        max_retries=0, max_consecutive_failures=3, max_in_flight_per_webhook=1
    ):
        await platform.publish_many(7)
        await receiver.wait_for(7)
    config = await platform.config(created.webhook_config.id)
    assert (config.active, config.consecutive_failures) == (True, 1)


async def test_failed_delivery_counts_as_one_failure(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 500
    async with platform.engine(
        max_retries=3, max_consecutive_failures=2, retry_schedule_seconds=(0.02,)
    ):
        await platform.publish()
        await receiver.wait_for(4)
    config = await platform.config(created.webhook_config.id)
    assert (config.active, config.consecutive_failures) == (True, 1)


async def test_failure_of_paused_config_logs_no_deactivation(
    platform: Platform, receiver: Receiver, log: EventLog
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = response = HeldResponse(500)
    async with platform.engine(max_retries=0):
        await platform.publish()
        await response.wait_for(1)
        await platform.update(created.webhook_config.id, active=False)
        response.release()
    assert len(log.named("attempt")) == 1
    assert log.named("webhook_deactivated") == []


@pytest.mark.parametrize("change", ["paused", "deleted"])
async def test_paused_or_deleted_config_receives_nothing_more(
    platform: Platform, receiver: Receiver, pool: Any, change: str
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.default = response = HeldResponse()
    async with platform.engine(max_in_flight_per_webhook=1):
        await platform.publish_many(5)
        await response.wait_for(1)
        if change == "paused":
            await platform.update(webhook_id, active=False)
        else:
            await platform.webhooks.DeleteWebhookConfig(
                webhook_config_service_pb2.DeleteWebhookConfigRequest(id=webhook_id),
                metadata=platform.merchant(),
            )
        await platform.publish()
        response.release()
        # Another merchant's webhook shows that the engine went on.
        await platform.register(receiver.url, "m_2")
        await platform.publish(merchant_id="m_2")
        await receiver.wait_for(2)
    assert len(receiver.webhooks) == 2
    if change == "deleted":
        assert not await queue_states(pool)
        # The open request succeeds, but its delivery was cancelled with the others.
        assert await finished_states(pool) == {"cancelled": 5, "delivered": 1}
        return
    assert await queue_states(pool) == {DeliveryState.PARKED: 5}
    async with platform.engine():
        await platform.update(webhook_id, active=True)
        await receiver.wait_for(7)
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 7}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("active = false, deactivation_reason = 'paused'", {DeliveryState.PARKED: 3}),
        ("deleted_at = now(), version = version + 1", {DeliveryState.CANCELLED: 3}),
    ],
)
async def test_ready_delivery_of_stopped_config_is_not_sent(
    platform: Platform, receiver: Receiver, pool: Any, change: str, expected: dict[str, int]
) -> None:
    created = await platform.register(receiver.url)
    await platform.publish_many(3)
    # This is the state after a change that was committed while the events were accepted.
    await pool.execute(
        f"UPDATE webhook_configs SET {change} WHERE id = $1",  # noqa: S608
        parse_id("wh", created.webhook_config.id),
    )
    async with platform.engine():
        await platform.register(receiver.url, "m_2")
        other = await platform.publish(merchant_id="m_2")
        await receiver.wait_for(1)
    assert receiver.message_ids == [other.event.id]
    found = await queue_states(pool) + await finished_states(pool)
    assert found == {**expected, DeliveryState.DELIVERED: 1}
