"""A client and its publishers on another event loop: a clear error, and nothing sent."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from postrider.v1.delivery_service_pb2 import WatchDeliveriesRequest
from postrider.v1.event_pb2 import EventInput
from postrider.v1.event_service_pb2 import GetEventRequest
from postrider_client import PostriderClient, Publisher, WrongEventLoop
from tests.client.conftest import token
from tests.support.event_service import FakeEventService, serving

EVENT = EventInput(merchant_id="m_1", type="payment.succeeded", payload=b"{}")


async def elsewhere(use: Callable[[], Awaitable[Any]]) -> None:
    """Use something on a loop of another thread; a wait that would never end fails."""

    async def bounded() -> None:
        async with asyncio.timeout(5):
            await use()

    await asyncio.to_thread(asyncio.run, bounded())


async def test_on_another_loop_everything_says_so_and_sends_nothing(
    client: PostriderClient, service: FakeEventService
) -> None:
    async def make_publisher() -> None:
        client.publisher()

    async def read_event() -> None:
        await client.events.GetEvent(GetEventRequest(id="evt_1"))

    async def watch() -> None:
        async for _ in client.deliveries.WatchDeliveries(WatchDeliveriesRequest()):
            pass

    async with client.publisher() as publisher:
        uses: list[Callable[[], Awaitable[Any]]] = [
            lambda: client.publish(EVENT),
            read_event,
            watch,
            make_publisher,
            client.close,
            lambda: publisher.publish(EVENT),
            publisher.flush,
            publisher.close,
        ]
        for use in uses:
            with pytest.raises(WrongEventLoop, match="one client for each event loop"):
                await elsewhere(use)
        assert service.calls == []
        # It has done no harm where it belongs.
        assert (await (await publisher.publish(EVENT))).id
    assert (await client.publish(EVENT)).id


async def test_a_publisher_kept_for_a_second_asyncio_run_does_not_hang(
    service: FakeEventService,
) -> None:
    """What publishes has ended with the first loop, and nobody would send what is added."""
    async with serving(service) as address:

        async def make() -> tuple[PostriderClient, Publisher]:
            client = PostriderClient(address, token, tls=False)
            publisher = client.publisher(linger_ms=0)
            await (await publisher.publish(EVENT))
            return client, publisher

        # The client as well: without it the channel would close.
        _client, publisher = await asyncio.to_thread(asyncio.run, make())

        async def publish_again() -> None:
            await (await publisher.publish(EVENT))

        with pytest.raises(WrongEventLoop):
            await elsewhere(publish_again)
    assert len(service.stored) == 1


def test_a_client_made_before_a_loop_runs_says_where_to_make_it() -> None:
    with pytest.raises(WrongEventLoop, match=r"asyncio\.run"):
        PostriderClient("127.0.0.1:1", token, tls=False)
