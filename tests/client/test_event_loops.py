"""A client or publisher on another event loop raises an error and sends nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from postrider.v1.delivery_service_pb2 import WatchDeliveriesRequest
from postrider.v1.event_service_pb2 import GetEventRequest
from postrider_client import PostriderClient, Publisher, WrongEventLoop
from tests.client.conftest import event, token
from tests.support.event_service import FakeEventService, serving

EVENT = event()


async def on_another_loop(use: Callable[[], Awaitable[Any]]) -> None:
    """Run on the event loop of another thread, for 5 s at most."""

    async def bounded() -> None:
        async with asyncio.timeout(5):
            await use()

    await asyncio.to_thread(asyncio.run, bounded())


async def test_every_use_on_another_loop_is_refused(
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
            with pytest.raises(WrongEventLoop, match="one client per event loop"):
                await on_another_loop(use)
        assert service.calls == []
        # Both still work on their own loop.
        assert (await (await publisher.publish(EVENT))).id
    assert (await client.publish(EVENT)).id


async def test_publisher_in_a_second_asyncio_run_is_refused(service: FakeEventService) -> None:
    """Its sending task ended with the first loop, so the future would never end."""
    async with serving(service) as address:

        async def make() -> tuple[PostriderClient, Publisher]:
            client = PostriderClient(address, token, tls=False)
            publisher = client.publisher(linger_ms=0)
            await (await publisher.publish(EVENT))
            return client, publisher

        # Keeps the client, because its channel would close otherwise.
        _client, publisher = await asyncio.to_thread(asyncio.run, make())

        async def publish_again() -> None:
            await (await publisher.publish(EVENT))

        with pytest.raises(WrongEventLoop):
            await on_another_loop(publish_again)
    assert len(service.stored) == 1


def test_client_without_a_running_loop_is_refused() -> None:
    with pytest.raises(WrongEventLoop, match=r"asyncio\.run"):
        PostriderClient("127.0.0.1:1", token, tls=False)
