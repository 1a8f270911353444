"""One merchant's trouble beside the others: dead receivers, breakers, floods, wishes for time."""

import asyncio
import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any

import pytest
from aiohttp import web
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from core import queue
from core.ids import parse_id
from postrider.v1 import (
    admin_service_pb2,
    delivery_service_pb2,
    event_pb2,
    event_service_pb2,
    webhook_config_pb2,
)
from postrider.v1 import webhook_config_service_pb2 as pb
from tests.support.factories import make_delivery
from tests.support.platform import Platform
from tests.support.receiver import Receiver

AMPLE = 20.0
#: Breakers that open within a test.
QUICK = {
    "breaker_failures": 3,
    "breaker_failing_seconds": 0.01,
    "breaker_cooldown_seconds": 0.2,
    "retry_schedule_seconds": (600.0,),
}


class Silence:
    """Never answers, and knows how many wait."""

    def __init__(self) -> None:
        self.waiting = self.most = 0
        self._changed = asyncio.Condition()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        async with self._changed:
            self.waiting += 1
            self.most = max(self.most, self.waiting)
            self._changed.notify_all()
        try:
            await asyncio.Event().wait()
        finally:
            self.waiting -= 1
        raise AssertionError

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(AMPLE), self._changed:
            await self._changed.wait_for(lambda: self.waiting >= count)


async def publish_many(
    platform: Platform, count: int, merchant_id: str = "m_1", **fields: Any
) -> list[str]:
    event = event_pb2.EventInput(
        merchant_id=merchant_id, type="payment.succeeded", payload_text="{}", **fields
    )
    response = await platform.events.PublishEvents(
        event_service_pb2.PublishEventsRequest(events=[event] * count), metadata=platform.producer()
    )
    return [result.event.id for result in response.results]


async def breaker_of(pool: Any, webhook_id: str) -> str:
    state: str = await pool.fetchval(
        "SELECT CASE WHEN breaker_open_until IS NULL THEN 'closed'"
        " WHEN breaker_open_until > now() THEN 'open' ELSE 'half-open' END"
        " FROM webhook_configs WHERE id = $1",
        parse_id("wh", webhook_id),
    )
    return state


async def queue_states(pool: Any) -> Counter[str]:
    return Counter(row["state"] for row in await pool.fetch("SELECT state FROM delivery_queue"))


async def until(condition: Any, timeout: float = AMPLE) -> None:
    """Return once an asynchronous condition holds."""
    async with asyncio.timeout(timeout):
        while not await condition():  # noqa: ASYNC110 - of the database, which tells nobody
            await asyncio.sleep(0.01)


async def hold(pool: Any, webhook_id: str, seconds: float) -> None:
    await pool.execute(
        "UPDATE webhook_configs SET breaker_open_until = now() + $2 * interval '1 second',"
        " breaker_trips = 1 WHERE id = $1",
        parse_id("wh", webhook_id),
        seconds,
    )


# Dead neighbours.


async def test_silent_receivers_hold_at_most_half_of_the_slots(
    platform: Platform, receiver: Receiver, start_receiver: Any, pool: Any
) -> None:
    healthy = [f"healthy_{n}" for n in range(4)]
    dead = [f"dead_{n}" for n in range(40)]
    receiver.default = silence = Silence()
    async with start_receiver() as well:
        for merchant_id in healthy:
            await platform.register(well.url, merchant_id)
        for merchant_id in dead:
            await platform.register(receiver.url, merchant_id)
        async with platform.engine(max_in_flight=48, delivery_drain_seconds=0.1):
            for merchant_id in healthy:
                await platform.publish(merchant_id=merchant_id)
            await well.wait_for(4)
            for merchant_id in dead:
                await publish_many(platform, 3, merchant_id)
            await silence.wait_for(24)
            began = monotonic()
            for _ in range(5):
                for merchant_id in healthy:
                    await publish_many(platform, 10, merchant_id)
            await well.wait_for(4 + 200)
            # Any of them that had to wait for a silent one would have waited for 30 seconds.
            assert monotonic() - began < 10
            assert silence.most == 24
            states = await queue_states(pool)
            # What has no place is parked, out of everybody's way.
            assert states["parked"] == 120 - 24


async def test_receiver_that_times_out_ends_with_one_slot(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = silence = Silence()
    async with platform.engine(
        delivery_timeout_seconds=0.3,
        retry_schedule_seconds=(600.0,),
        max_consecutive_failures=100,
        delivery_drain_seconds=0.1,
    ):
        await publish_many(platform, 20)
        await silence.wait_for(8)
    starts = [
        row["started_at"]
        for row in await pool.fetch("SELECT started_at FROM attempts ORDER BY started_at")
    ]
    waits = [(b - a).total_seconds() for a, b in itertools.pairwise(starts)]
    assert len(waits) >= 6
    assert max(waits[:3]) < 0.3
    assert min(waits[4:]) >= 0.3


async def test_fast_failures_pause_the_config(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = 500
    async with platform.engine(
        breaker_failures=1000, retry_schedule_seconds=(600.0,), max_consecutive_failures=1000
    ):
        await publish_many(platform, 50)
        # Not by the sweep of every second, which would take as many seconds.
        async with asyncio.timeout(8):
            await receiver.wait_for(12)
    attempts = await pool.fetch("SELECT started_at, duration_us FROM attempts ORDER BY started_at")
    ends = [row["started_at"] + timedelta(microseconds=row["duration_us"]) for row in attempts]
    rests = [
        (row["started_at"] - end).total_seconds()
        for end, row in zip(ends, attempts[1:], strict=False)
    ]
    assert min(rests[4:]) >= 0.05
    assert min(rests[8:]) >= 0.5


# The breaker.


async def test_breaker_opens_probes_and_closes(
    platform: Platform, receiver: Receiver, pool: Any, logged: list[Any]
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.default = 503

    async def is_open() -> bool:
        return await breaker_of(pool, webhook_id) != "closed"

    async with platform.engine(**QUICK, breaker_cooldown_max_seconds=0.2):
        published = await publish_many(platform, 40)
        await until(is_open)
        published += await publish_many(platform, 5)
        # Two probes more, so that it is known to open again and again.
        seen = len(receiver.webhooks)
        await receiver.wait_for(seen + 2)
        # Few were open when it opened; from then on one delivery at a time.
        assert len(receiver.webhooks) <= 4 + 4 + 3
        receiver.default = 200
        await receiver.wait_for(45)
        await until(_drained(pool))
    # The failed ones wait for their retry, the others were delivered at their first attempt.
    attempts = Counter(
        row["outcome"] for row in await pool.fetch("SELECT outcome FROM attempts WHERE number = 1")
    )
    assert attempts["succeeded"] + attempts["http_error"] == 45
    assert attempts["http_error"] <= 11
    assert await pool.fetchval("SELECT max(number) FROM attempts") == 1
    assert await breaker_of(pool, webhook_id) == "closed"
    opened = [entry for entry in logged if entry["event"] == "breaker_opened"]
    [closed] = [entry for entry in logged if entry["event"] == "breaker_closed"]
    assert len(opened) >= 3
    assert opened[0]["webhook_id"] == webhook_id
    assert opened[0]["failures"] >= 3
    assert opened[0]["seconds"] == 0.2
    assert closed["webhook_id"] == webhook_id


def _drained(pool: Any) -> Any:
    async def drained() -> bool:
        """Only retries of the far future are left."""
        return not await pool.fetchval(
            "SELECT EXISTS (SELECT FROM delivery_queue WHERE attempt_count = 0)"
        )

    return drained


async def test_open_breaker_parks_new_events(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    await hold(pool, created.webhook_config.id, 600)
    await publish_many(platform, 3)
    assert await queue_states(pool) == {"parked": 3}
    # As if it had been accepted or rescheduled at the moment when the breaker opened.
    await make_delivery(pool, parse_id("wh", created.webhook_config.id))  # type: ignore[arg-type]
    async with platform.engine():
        other = await platform.publish(merchant_id="m_2")
        await receiver.wait_for(1)
        await until(_all_parked(pool, 4))
    assert [request.message_id for request in receiver.webhooks] == [other.event.id]
    assert await pool.fetchval("SELECT sum(attempt_count) FROM delivery_queue") == 0


def _all_parked(pool: Any, count: int) -> Any:
    async def parked() -> bool:
        return await queue_states(pool) == {"parked": count}

    return parked


async def test_half_open_breaker_admits_one_probe_over_all_engines(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    await hold(pool, created.webhook_config.id, 0)
    receiver.default = silence = Silence()
    published = await publish_many(platform, 6)
    options = {"delivery_drain_seconds": 0.1}
    async with platform.engine(**options), platform.engine(**options):
        await silence.wait_for(1)
        # A second delivery of another merchant, and a sweep of both engines later.
        await platform.register(f"{receiver.url}/2", "m_2")
        await platform.publish(merchant_id="m_2")
        await silence.wait_for(2)
        await asyncio.sleep(1.2)
        states = await queue_states(pool)
    assert states == {"leased": 2, "parked": 5}
    # In the order of arrival, to the millisecond.
    assert receiver.webhooks[0].message_id in published


async def test_failed_probes_deactivate_config(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = 500
    async with platform.engine(
        **{**QUICK, "breaker_cooldown_seconds": 0.05, "breaker_cooldown_max_seconds": 0.05},
        max_retries=0,
        max_consecutive_failures=8,
    ):
        await publish_many(platform, 30)

        async def is_inactive() -> bool:
            return not await pool.fetchval("SELECT active FROM webhook_configs")

        await until(is_inactive)
    reason = await pool.fetchval("SELECT deactivation_reason FROM webhook_configs")
    assert reason == "failures"
    assert 8 <= len(receiver.webhooks) <= 12


async def test_ping_new_url_and_reactivation_close_breaker(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id

    async def status() -> admin_service_pb2.QueueStatus:
        answer = await platform.admin.GetQueueStatus(
            admin_service_pb2.GetQueueStatusRequest(webhook_id=webhook_id),
            metadata=platform.operator(),
        )
        return answer.webhooks[0]

    await hold(pool, webhook_id, 600)
    await platform.publish()
    assert (await status()).HasField("breaker_open_until")
    await platform.webhooks.PingWebhookConfig(
        pb.PingWebhookConfigRequest(id=webhook_id), metadata=platform.merchant()
    )
    assert not (await status()).HasField("breaker_open_until")

    await hold(pool, webhook_id, 600)
    await platform.webhooks.UpdateWebhookConfig(
        pb.UpdateWebhookConfigRequest(
            webhook_config=webhook_config_pb2.WebhookConfig(id=webhook_id, description="same"),
            update_mask=FieldMask(paths=["description"]),
        ),
        metadata=platform.merchant(),
    )
    assert await breaker_of(pool, webhook_id) == "open"
    await platform.webhooks.UpdateWebhookConfig(
        pb.UpdateWebhookConfigRequest(
            webhook_config=webhook_config_pb2.WebhookConfig(
                id=webhook_id, url=f"{receiver.url}/new"
            ),
            update_mask=FieldMask(paths=["url"]),
        ),
        metadata=platform.merchant(),
    )
    assert await breaker_of(pool, webhook_id) == "closed"

    await hold(pool, webhook_id, 600)
    await pool.execute(
        "UPDATE webhook_configs SET active = false, deactivation_reason = 'failures'"
    )
    await platform.admin.ReactivateWebhookConfig(
        admin_service_pb2.ReactivateWebhookConfigRequest(id=webhook_id),
        metadata=platform.operator(),
    )
    assert await breaker_of(pool, webhook_id) == "closed"
    assert await pool.fetchval("SELECT breaker_trips FROM webhook_configs") == 0


# What receivers say.


@pytest.mark.parametrize("status", [410, 503])
async def test_response_of_old_url_does_not_stop_new_url(
    platform: Platform, receiver: Receiver, start_receiver: Any, pool: Any, status: int
) -> None:
    asked, moved = asyncio.Event(), asyncio.Event()

    async def when_it_has_moved(_: web.Request) -> web.StreamResponse:
        asked.set()
        await moved.wait()
        return web.Response(status=status, headers={"Retry-After": "3000"})

    async def settled() -> bool:
        return await queue_states(pool) == {}

    receiver.default = when_it_has_moved
    created = await platform.register(receiver.url)
    async with start_receiver() as new, platform.engine(max_retries=0):
        await platform.publish()
        await asyncio.wait_for(asked.wait(), AMPLE)
        await platform.webhooks.UpdateWebhookConfig(
            pb.UpdateWebhookConfigRequest(
                webhook_config=webhook_config_pb2.WebhookConfig(
                    id=created.webhook_config.id, url=new.url
                ),
                update_mask=FieldMask(paths=["url"]),
            ),
            metadata=platform.merchant(),
        )
        moved.set()
        # What the old URL refused is for the new one to take.
        await new.wait_for(1)
        await until(settled)
        await platform.publish()
        await new.wait_for(2)
    [config] = await pool.fetch("SELECT active, consecutive_failures FROM webhook_configs")
    assert tuple(config) == (True, 0)


async def test_410_deactivates_config_at_once(
    platform: Platform, receiver: Receiver, pool: Any, logged: list[Any]
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.script.append(410)
    async with platform.engine(max_in_flight_per_webhook=1):
        published = await publish_many(platform, 3)
        await until(_all_parked(pool, 2))
        [entry] = [entry for entry in logged if entry["event"] == "webhook_deactivated"]
        assert (entry["webhook_id"], entry["reason"]) == (webhook_id, "gone")
        answer = await platform.webhooks.GetWebhookConfig(
            pb.GetWebhookConfigRequest(id=webhook_id), metadata=platform.merchant()
        )
        reason = answer.webhook_config.deactivation_reason
        assert reason == webhook_config_pb2.DEACTIVATION_REASON_GONE
        assert len(receiver.webhooks) == 1
        await platform.admin.ReactivateWebhookConfig(
            admin_service_pb2.ReactivateWebhookConfigRequest(id=webhook_id),
            metadata=platform.operator(),
        )
        await receiver.wait_for(3)
    rows = await pool.fetch("SELECT state, attempt_count FROM finished_deliveries")
    assert sorted(tuple(row) for row in rows) == [("delivered", 1)] * 2 + [("failed", 1)]
    assert len(published) == 3


async def test_retry_after_pauses_config_up_to_maximum(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.script.append(web.Response(status=429, headers={"Retry-After": "9999999"}))
    async with platform.engine(retry_after_max_seconds=100.0, max_in_flight_per_webhook=1):
        await publish_many(platform, 4)

        async def held() -> bool:
            return await queue_states(pool) == {"parked": 3, "ready": 1}

        await until(held)
    assert len(receiver.webhooks) == 1
    row = await pool.fetchrow(
        "SELECT extract(epoch FROM breaker_open_until - now())::float8 AS held, breaker_trips"
        " FROM webhook_configs"
    )
    assert 80 < row["held"] <= 100
    assert row["breaker_trips"] == 0
    due_in = await pool.fetchval(
        "SELECT extract(epoch FROM due_at - now())::float8 FROM delivery_queue"
        " WHERE state = 'ready'"
    )
    assert 80 < due_in <= 100


async def test_retry_after_never_shortens_backoff(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.script.append(web.Response(status=503, headers={"Retry-After": "1"}))
    async with platform.engine(retry_schedule_seconds=(600.0,), max_in_flight_per_webhook=1):
        await publish_many(platform, 4)
        await receiver.wait_for(4)
        await until(_drained(pool))
    [due_in] = [
        row["due_in"]
        for row in await pool.fetch(
            "SELECT extract(epoch FROM due_at - now())::float8 AS due_in FROM delivery_queue"
        )
    ]
    assert due_in > 500
    assert await pool.fetchval("SELECT breaker_open_until FROM webhook_configs") is None


# Floods.


async def test_flood_is_parked_at_publish(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    flooded = [event for _ in range(3) for event in await publish_many(platform, 300)]
    await platform.publish(merchant_id="m_2")
    assert await queue_states(pool) == {"ready": 101, "parked": 800}
    async with platform.engine():
        received = await receiver.wait_for(901)
    assert {request.message_id for request in received[:200]}.difference(flooded)
    assert len({request.message_id for request in received}) == 901


async def test_burst_due_at_one_moment_is_parked_by_few_claims(
    platform: Platform, receiver: Receiver, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await platform.register(receiver.url)
    receiver.default = Silence()
    moment = Timestamp()
    moment.FromDatetime(datetime.now(UTC) + timedelta(seconds=1))
    await publish_many(platform, 300, not_before=moment)
    # Only when its time comes is it more than the config can take.
    assert await queue_states(pool) == {"ready": 300}
    await pool.execute("SELECT pg_sleep_until(max(due_at)) FROM delivery_queue")
    genuine = queue.claim
    claims = []

    async def counted(*arguments: Any) -> Any:
        leased = await genuine(*arguments)
        claims.append(len(leased))
        return leased

    monkeypatch.setattr(queue, "claim", counted)
    async with platform.engine(max_in_flight=20, delivery_drain_seconds=0.1):

        async def is_parked() -> bool:
            return (await queue_states(pool))["ready"] == 0

        await until(is_parked)
        # Of ten each there would have to be thirty.
        assert sum(map(bool, claims)) <= 5


async def test_fast_single_events_are_parked_as_flood(
    platform: Platform, pool: Any, receiver: Receiver
) -> None:
    await platform.register(receiver.url)
    # Too few at once to be one by themselves.
    for _ in range(14):
        await asyncio.gather(*(platform.publish() for _ in range(10)))
    states = await queue_states(pool)
    assert states["parked"] >= 30
    assert states["ready"] <= 110


async def test_event_and_redelivery_queue_behind_backlog(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    async with platform.engine():
        await platform.publish()
        await receiver.wait_for(1)
    delivery_id = await pool.fetchval("SELECT id FROM finished_deliveries")
    webhook_id = parse_id("wh", created.webhook_config.id)
    assert webhook_id
    await make_delivery(pool, webhook_id, state="parked")
    await platform.publish()
    await platform.deliveries.RedeliverDelivery(
        delivery_service_pb2.RedeliverDeliveryRequest(id=f"dlv_{delivery_id.hex}"),
        metadata=platform.merchant(),
    )
    assert await queue_states(pool) == {"parked": 3}
    async with platform.engine():
        await receiver.wait_for(4)


async def test_sweep_admits_backlog_left_by_dead_engine(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = parse_id("wh", created.webhook_config.id)
    assert webhook_id
    for _ in range(10):
        await make_delivery(pool, webhook_id, state="parked")
    # Its last engine died before it could probe, another before it could close the breaker.
    await hold(pool, created.webhook_config.id, 0)
    async with platform.engine():
        await receiver.wait_for(10)
