"""The breaker of a config, and Retry-After, over whole engines."""

import asyncio
from typing import Any
from uuid import UUID

import pytest
from aiohttp import web

from postrider.v1 import admin_service_pb2, webhook_config_service_pb2
from tests.support.event_log import EventLog
from tests.support.factories import make_delivery
from tests.support.held_response import HeldResponse
from tests.support.platform import Platform
from tests.support.queue_state import (
    attempt_outcomes,
    breaker_state,
    open_breaker,
    queue_states,
    until,
    until_queued,
)
from tests.support.receiver import Receiver


async def until_only_retries_are_open(pool: Any) -> None:
    async def only_retries() -> bool:
        return not await pool.fetchval(
            "SELECT EXISTS (SELECT FROM delivery_queue WHERE attempt_count = 0)"
        )

    await until(only_retries)


async def test_breaker_opens_probes_and_closes(
    platform: Platform, receiver: Receiver, pool: Any, log: EventLog
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.default = 503
    async with platform.engine(
        breaker_failures=3,
        breaker_failing_seconds=0.01,
        breaker_cooldown_seconds=0.2,
        breaker_cooldown_max_seconds=0.2,
        retry_schedule_seconds=(600.0,),
    ):
        await platform.publish_many(40)
        await log.wait_for("breaker_opened")
        await platform.publish_many(5)
        # Two failed probes, so that the breaker opens again each time.
        await receiver.wait_for(len(receiver.webhooks) + 2)
        # A few were open when it opened. From then on it is one delivery at a time.
        assert len(receiver.webhooks) <= 4 + 4 + 3
        receiver.default = 200
        await receiver.wait_for(45)
        await until_only_retries_are_open(pool)
    # Failed deliveries wait for their retry. All others succeeded at their first attempt.
    outcomes = await attempt_outcomes(pool)
    assert outcomes["succeeded"] + outcomes["http_error"] == outcomes.total() == 45
    assert outcomes["http_error"] <= 11
    assert await pool.fetchval("SELECT max(number) FROM attempts") == 1
    assert await breaker_state(pool, webhook_id) == "closed"
    opened = log.named("breaker_opened")
    [closed] = log.named("breaker_closed")
    assert len(opened) >= 3
    assert opened[0]["webhook_id"] == closed["webhook_id"] == webhook_id
    assert opened[0]["failures"] >= 3
    assert opened[0]["seconds"] == 0.2


async def test_open_breaker_parks_new_events(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    await open_breaker(pool, created.webhook_config.id, 600)
    await platform.publish_many(3)
    assert await queue_states(pool) == {"parked": 3}
    # Ready, like an event that was accepted at the moment when the breaker opened.
    await make_delivery(pool, UUID(created.webhook_config.id.removeprefix("wh_")))
    async with platform.engine():
        other = await platform.publish(merchant_id="m_2")
        await receiver.wait_for(1)
        await until_queued(pool, {"parked": 4})
    assert receiver.message_ids == [other.event.id]
    assert await pool.fetchval("SELECT sum(attempt_count) FROM delivery_queue") == 0


async def test_half_open_breaker_admits_one_probe_over_all_engines(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    await open_breaker(pool, created.webhook_config.id, 0)
    receiver.default = response = HeldResponse()
    published = await platform.publish_many(6)
    options = {"delivery_drain_seconds": 0.1}
    async with platform.engine(**options), platform.engine(**options):
        await response.wait_for(1)
        # A delivery of another merchant and a sweep of both engines admit no second probe.
        await platform.register(f"{receiver.url}/2", "m_2")
        await platform.publish(merchant_id="m_2")
        await response.wait_for(2)
        await asyncio.sleep(1.2)
        states = await queue_states(pool)
    assert states == {"leased": 2, "parked": 5}
    assert receiver.message_ids[0] in published


async def test_ping_new_url_and_reactivation_close_breaker(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id

    async def is_open() -> bool:
        response = await platform.admin.GetQueueStatus(
            admin_service_pb2.GetQueueStatusRequest(webhook_id=webhook_id),
            metadata=platform.operator(),
        )
        return bool(response.webhooks[0].HasField("breaker_open_until"))

    await open_breaker(pool, webhook_id, 600)
    await platform.publish()
    assert await is_open()
    await platform.webhooks.PingWebhookConfig(
        webhook_config_service_pb2.PingWebhookConfigRequest(id=webhook_id),
        metadata=platform.merchant(),
    )
    assert not await is_open()

    await open_breaker(pool, webhook_id, 600)
    await platform.update(webhook_id, description="same")
    assert await breaker_state(pool, webhook_id) == "open"
    await platform.update(webhook_id, url=f"{receiver.url}/new")
    assert await breaker_state(pool, webhook_id) == "closed"

    await open_breaker(pool, webhook_id, 600)
    await pool.execute(
        "UPDATE webhook_configs SET active = false, deactivation_reason = 'failures'"
    )
    await platform.reactivate(webhook_id)
    assert await breaker_state(pool, webhook_id) == "closed"
    assert await pool.fetchval("SELECT breaker_trips FROM webhook_configs") == 0


@pytest.mark.parametrize("status", [410, 503])
async def test_response_of_old_url_does_not_stop_new_url(
    platform: Platform, receiver: Receiver, start_receiver: Any, pool: Any, status: int
) -> None:
    receiver.default = response = HeldResponse(status, headers={"Retry-After": "3000"})
    created = await platform.register(receiver.url)
    async with start_receiver() as new, platform.engine(max_retries=0):
        await platform.publish()
        await response.wait_for(1)
        await platform.update(created.webhook_config.id, url=new.url)
        response.release()
        # The new URL gets the delivery that the old one refused.
        await new.wait_for(1)
        await until_queued(pool, {})
        await platform.publish()
        await new.wait_for(2)
    config = await platform.config(created.webhook_config.id)
    assert (config.active, config.consecutive_failures) == (True, 0)


async def test_retry_after_pauses_config_up_to_maximum(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.script.append(web.Response(status=429, headers={"Retry-After": "9999999"}))
    async with platform.engine(retry_after_max_seconds=100.0, max_in_flight_per_webhook=1):
        await platform.publish_many(4)
        await until_queued(pool, {"parked": 3, "ready": 1})
    assert len(receiver.webhooks) == 1
    row = await pool.fetchrow(
        "SELECT extract(epoch FROM breaker_open_until - now())::float8 AS paused, breaker_trips"
        " FROM webhook_configs"
    )
    assert 80 < row["paused"] <= 100
    assert row["breaker_trips"] == 0
    [due_in] = await due_seconds(pool, "ready")
    assert 80 < due_in <= 100


async def test_retry_after_never_shortens_backoff(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.script.append(web.Response(status=503, headers={"Retry-After": "1"}))
    async with platform.engine(retry_schedule_seconds=(600.0,), max_in_flight_per_webhook=1):
        await platform.publish_many(4)
        await receiver.wait_for(4)
        await until_only_retries_are_open(pool)
    [due_in] = await due_seconds(pool, "ready")
    assert due_in > 500
    assert await pool.fetchval("SELECT breaker_open_until FROM webhook_configs") is None


async def due_seconds(pool: Any, state: str) -> list[float]:
    rows = await pool.fetch(
        "SELECT extract(epoch FROM due_at - now())::float8 AS due_in FROM delivery_queue"
        " WHERE state = $1",
        state,
    )
    return [row["due_in"] for row in rows]
