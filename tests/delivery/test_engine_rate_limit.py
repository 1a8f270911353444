"""The rate limit of a webhook config, over one or several engines."""

from collections import Counter
from contextlib import AsyncExitStack
from time import monotonic
from typing import Any

import pytest
from aiohttp import web

from tests.support.platform import Platform
from tests.support.queue_state import until_queued
from tests.support.receiver import Receiver


class TimedAnswer:
    """Answers at once, and records the time of each request."""

    def __init__(self) -> None:
        self.times: list[float] = []

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        self.times.append(monotonic())
        return web.Response()

    def largest_burst(self, rate: float) -> float:
        """Return by how many webhooks the busiest stretch exceeds `rate` times its length."""
        return max(
            (last - first + 1) - rate * (self.times[last] - self.times[first])
            for first in range(len(self.times))
            for last in range(first, len(self.times))
        )


@pytest.mark.parametrize("engines", [1, 2])
async def test_rate_limit_holds_for_all_engines_together(
    platform: Platform, receiver: Receiver, engines: int
) -> None:
    await platform.register(receiver.url, rate_limit=20.0)
    receiver.default = answer = TimedAnswer()
    async with AsyncExitStack() as stack:
        for _ in range(engines):
            await stack.enter_async_context(platform.engine())
        await platform.publish_many(70)
        await receiver.wait_for(70)

    # 21 may come at once. A busy machine delays the first handshakes, which adds a few.
    assert answer.largest_burst(20.0) <= 21 + 15
    # The rate is used: 49 have to wait, which takes at least 2.5 s.
    assert answer.times[-1] - answer.times[0] <= 12
    assert {request.headers["X-Webhook-Attempt"] for request in receiver.webhooks} == {"1"}
    assert len(set(receiver.message_ids)) == 70


async def test_excess_over_rate_limit_is_parked_until_lifted(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url, rate_limit=0.001)
    async with platform.engine():
        await platform.publish_many(5)
        await until_queued(pool, {"parked": 4})
        assert len(receiver.webhooks) == 1
        await platform.update(created.webhook_config.id, rate_limit=0)
        await receiver.wait_for(5)
    assert {d.attempt_count for d in await platform.list_deliveries()} == {1}
    assert len(receiver.webhooks) == 5


async def test_rate_limited_config_does_not_delay_others(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url, rate_limit=0.001)
    await platform.register(f"{receiver.url}/free")
    async with platform.engine():
        await platform.publish_many(50)
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
