"""Ordered delivery as receivers see it: engines, failures, rates, and producers side by side."""

import asyncio
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any

import asyncpg
import pytest
from aiohttp import web
from google.protobuf.field_mask_pb2 import FieldMask

from core import queue
from postrider.v1 import event_service_pb2 as events_pb
from postrider.v1 import webhook_config_service_pb2 as pb
from postrider.v1.event_pb2 import EventInput
from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.platform import Platform
from tests.support.receiver import Receiver

AMPLE = 60.0


def event(key: str, number: int, **fields: Any) -> EventInput:
    """An event that says which of its key it is."""
    return EventInput(
        merchant_id="m_1",
        type="payment.succeeded",
        payload_text=json.dumps({"key": key, "number": number}),
        ordering_key=key,
        **fields,
    )


async def publish(platform: Platform, events: Iterable[EventInput]) -> list[str]:
    response = await platform.events.PublishEvents(
        events_pb.PublishEventsRequest(events=events), metadata=platform.producer()
    )
    return [result.event.id for result in response.results]


async def update(platform: Platform, webhook_id: str, **fields: Any) -> None:
    await platform.webhooks.UpdateWebhookConfig(
        pb.UpdateWebhookConfigRequest(
            webhook_config=WebhookConfig(id=webhook_id, **fields),
            update_mask=FieldMask(paths=list(fields)),
        ),
        metadata=platform.merchant(),
    )


class Ledger:
    """Answers as `fails` says, and keeps what was answered 2xx and when, key by key."""

    def __init__(self, failing: float = 0.0, *, broken: Iterable[tuple[str, int]] = ()) -> None:
        self.failing = failing
        self.broken = set(broken)
        self.delivered: dict[str, list[int]] = defaultdict(list)
        self.tried: Counter[tuple[str, int]] = Counter()
        #: Two of one key that were under way at once.
        self.together: list[str] = []
        self._inside: set[str] = set()
        self._random = random.Random(4)  # noqa: S311 - the same failures in every run
        self._changed = asyncio.Condition()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        said = json.loads(await request.read())
        key, number = said["key"], said["number"]
        if key in self._inside:
            self.together.append(key)
        self._inside.add(key)
        # Lets others in meanwhile, if there are any.
        await asyncio.sleep(self._random.random() * 0.004)
        self._inside.discard(key)
        fails = (key, number) in self.broken or self._random.random() < self.failing
        async with self._changed:
            self.tried[key, number] += 1
            if not fails:
                self.delivered[key].append(number)
            self._changed.notify_all()
        return web.Response(status=500 if fails else 200)

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(AMPLE), self._changed:
            await self._changed.wait_for(lambda: self.count >= count)

    async def wait_for_tries(self, key: str, number: int, count: int) -> None:
        async with asyncio.timeout(AMPLE), self._changed:
            await self._changed.wait_for(lambda: self.tried[key, number] >= count)

    @property
    def count(self) -> int:
        return sum(map(len, self.delivered.values()))


async def until_finished(pool: Any, count: int) -> Counter[str]:
    """Return once nothing is open and so many deliveries are finished: how they ended."""
    async with asyncio.timeout(AMPLE):
        while True:
            rows = await pool.fetch("SELECT state FROM finished_deliveries")
            if len(rows) == count:
                break
            await asyncio.sleep(0.02)
    assert await pool.fetchval("SELECT count(*) FROM delivery_queue") == 0
    return Counter(row["state"] for row in rows)


async def test_each_key_is_delivered_in_order_and_alone(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url, ordered=True)
    receiver.default = ledger = Ledger(failing=0.3)
    keys = [f"pay_{n}" for n in range(20)]
    settings = {
        "retry_schedule_seconds": (0.01,),
        "max_retries": 2,
        "max_consecutive_failures": 1000,
        "max_in_flight_per_webhook": 6,
        "poll_seconds": 0.2,
    }
    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(platform.engine(**settings))
        for number in range(0, 30, 3):
            # Batches of all keys and single calls, one of a key after the other.
            await publish(platform, [event(key, n) for n in (number, number + 1) for key in keys])
            for key in keys:
                await platform.events.PublishEvent(
                    events_pb.PublishEventRequest(event=event(key, number + 2)),
                    metadata=platform.producer(),
                )
        ended = await until_finished(pool, 600)

    assert ledger.together == []
    # Of three attempts each: a few were spent, and those behind them went on.
    assert 0 < ended["failed"] < 60
    assert ledger.count == ended["delivered"] == 600 - ended["failed"]
    for key in keys:
        assert ledger.delivered[key] == sorted(set(ledger.delivered[key]))


async def test_failing_delivery_blocks_only_its_own_key(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url, ordered=True)
    receiver.default = ledger = Ledger(broken=[("sick", 0)])
    events = [event("sick", 0), *(event(k, n) for n in range(1, 6) for k in ("sick", "well"))]
    async with platform.engine(max_retries=3, retry_schedule_seconds=(0.01, 0.01, 2.0)):
        await publish(platform, events)
        # Its last retry is 2 s away.
        await ledger.wait_for_tries("sick", 0, 3)
        await ledger.wait_for(5)
        assert ledger.delivered == {"well": [1, 2, 3, 4, 5]}
        open_states = await pool.fetch("SELECT state FROM delivery_queue")
        assert Counter(row["state"] for row in open_states)["blocked"] == 5
        await ledger.wait_for(10)
    assert ledger.tried["sick", 0] == 4
    assert ledger.delivered["sick"] == [1, 2, 3, 4, 5]
    assert await until_finished(pool, 11) == {"failed": 1, "delivered": 10}


@pytest.mark.parametrize("limits", [{"rate_limit": 40.0}, {"max_in_flight": 1}])
async def test_parked_deliveries_stay_in_order(
    platform: Platform, receiver: Receiver, pool: Any, limits: dict[str, Any]
) -> None:
    await platform.register(receiver.url, ordered=True, **limits)
    receiver.default = ledger = Ledger(failing=0.2)
    keys = ["a", "b", "c", "d", "e"]
    async with platform.engine(
        max_retries=10, retry_schedule_seconds=(0.01,), max_in_flight_per_webhook=2
    ):
        await publish(platform, [event(key, n) for n in range(12) for key in keys])
        await ledger.wait_for(60)
    assert ledger.together == []
    assert ledger.delivered == {key: list(range(12)) for key in keys}


async def test_next_of_key_does_not_wait_for_poll(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url, ordered=True)
    receiver.default = ledger = Ledger()
    async with platform.engine(), asyncio.timeout(5):
        await publish(platform, [event("k", n) for n in range(30)])
        # By polls or sweeps alone this would take half a minute.
        await ledger.wait_for(30)
    assert ledger.delivered["k"] == list(range(30))


async def test_sweep_continues_chain_left_by_engine(
    platform: Platform, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, pool: Any
) -> None:
    await platform.register(receiver.url, ordered=True)
    receiver.default = ledger = Ledger()
    promote, lost = queue.promote, 0

    async def promote_or_lose(*arguments: Any) -> int:
        nonlocal lost
        if not lost:
            lost += 1
            raise asyncpg.PostgresConnectionError("gone between the settle and this")
        return await promote(*arguments)

    monkeypatch.setattr("core.queue.promote", promote_or_lose)
    await publish(platform, [event("k", n) for n in range(3)])
    async with platform.engine():
        await ledger.wait_for(3)
    assert lost == 1
    assert ledger.delivered["k"] == [0, 1, 2]


async def test_reactivated_config_continues_in_order(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url, ordered=True)
    receiver.default = ledger = Ledger(broken=[("k", 2)])
    async with platform.engine(max_retries=1, retry_schedule_seconds=(0.5,)):
        await publish(platform, [event("k", n) for n in range(6)])
        await ledger.wait_for_tries("k", 2, 1)
        await update(platform, created.webhook_config.id, active=False)
        await publish(platform, [event("k", n) for n in range(6, 9)])
        assert ledger.delivered["k"] == [0, 1]
        ledger.broken.clear()
        await update(platform, created.webhook_config.id, active=True)
        await ledger.wait_for(9)
    assert ledger.delivered["k"] == list(range(9))


async def test_stream_order_is_delivery_order(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url, ordered=True)
    receiver.default = ledger = Ledger()

    async def stream(key: str) -> None:
        # Of sizes that take the database more and less time, as many on their way as may be.
        numbers = iter(range(10_000))
        batches = [
            events_pb.StreamEventsRequest(
                sequence=sequence,
                events=[event(key, next(numbers)) for _ in range(1 if sequence % 2 else 6)],
            )
            for sequence in range(24)
        ]
        call: Any = platform.events.StreamEvents(iter(batches), metadata=platform.producer())
        acknowledged = [response.sequence async for response in call]
        assert acknowledged == list(range(24))

    async with platform.engine():
        await asyncio.gather(*(stream(key) for key in ("a", "b", "c")))
        await ledger.wait_for(3 * 84)
    assert ledger.delivered == {key: list(range(84)) for key in ("a", "b", "c")}


async def test_deleted_config_cancels_its_chain(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url, ordered=True)
    await publish(platform, [event("k", n) for n in range(5)])
    answer = await platform.webhooks.DeleteWebhookConfig(
        pb.DeleteWebhookConfigRequest(id=created.webhook_config.id), metadata=platform.merchant()
    )
    assert answer.cancelled_deliveries == 5
    assert await until_finished(pool, 5) == {"cancelled": 5}
