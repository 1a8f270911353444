"""Hostile receivers do not affect deliveries to other receivers."""

import asyncio
import gzip
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import trustme
from google.protobuf.duration_pb2 import Duration

from postrider.v1 import webhook_config_service_pb2
from tests.support.raw_receiver import header, read_request, server_tls
from tests.support.system_under_load import PATIENT, Conclude, SystemUnderLoad

#: One at a time, since a receiver that only times out has one place.
EVENTS = 4

_BOMB = gzip.compress(bytes(50 * 2**20))
_RETRY_AFTER = itertools.cycle(
    ("1e308", "-1", "9" * 5000, "Fri, 31 Dec 9999 23:59:59 GMT", "inf", "nan", "\x00", "")
)


async def gigabyte(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1073741824\r\n\r\n")
    for _ in range(2**14):
        writer.write(bytes(2**16))
        await writer.drain()
        # Lets the end of the connection be noticed, which drain() alone does not.
        await asyncio.sleep(0)


async def dripping_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
    await drip(writer, b"x")


async def dripping_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    await drip(writer, b"x")


async def early_hints(writer: asyncio.StreamWriter) -> None:
    while not writer.is_closing():
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 10_000)
        await writer.drain()
        # As for the gigabyte.
        await asyncio.sleep(0)


async def gzip_bomb(writer: asyncio.StreamWriter) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % len(_BOMB) + _BOMB)
    await writer.drain()


async def reset_after_200(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
    await writer.drain()
    writer.transport.abort()


async def absurd_retry_after(writer: asyncio.StreamWriter) -> None:
    value = next(_RETRY_AFTER).encode()
    writer.write(
        b"HTTP/1.1 503 Unavailable\r\nRetry-After: %b\r\nContent-Length: 0\r\n\r\n" % value
    )
    await writer.drain()


async def drip(writer: asyncio.StreamWriter, byte: bytes) -> None:
    while not writer.is_closing():
        writer.write(byte)
        await writer.drain()
        await asyncio.sleep(1)


type Behaviour = Callable[[asyncio.StreamWriter], Awaitable[None]]

#: The record of every delivery to each, after all attempts.
EXPECTED: Mapping[Behaviour, tuple[str, str]] = {
    gigabyte: ("delivered", "succeeded"),
    dripping_body: ("delivered", "succeeded"),
    gzip_bomb: ("delivered", "succeeded"),
    reset_after_200: ("delivered", "succeeded"),
    dripping_head: ("failed", "timeout"),
    early_hints: ("failed", "protocol_error"),
}


def answers(behaviour: Behaviour) -> bool:
    return EXPECTED.get(behaviour) == ("delivered", "succeeded")


@asynccontextmanager
async def behaving(authority: trustme.CA, behaviour: Behaviour) -> AsyncIterator[str]:
    """The URL of a receiver that does this with every webhook; pings get 200."""
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while not writer.is_closing():
                request = await read_request(reader)
                if header(request, "X-Webhook-Event") == "webhook.ping":
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                else:
                    await behaviour(writer)
        writer.transport.abort()

    tls = server_tls(authority.issue_cert("127.0.0.1"))
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    finally:
        server.close()
        for task in tasks:
            task.cancel()


async def outcomes(pool: Any, merchant_id: str) -> Counter[tuple[str, str]]:
    """(final state, outcome) of the last attempts of a merchant's deliveries."""
    rows = await pool.fetch(
        "SELECT f.state, a.outcome FROM finished_deliveries f JOIN attempts a"
        " ON a.delivery_id = f.id AND a.number = f.attempt_count WHERE f.merchant_id = $1",
        merchant_id,
    )
    return Counter((row["state"], row["outcome"]) for row in rows)


@pytest.mark.slow
async def test_hostile_receivers_do_not_harm_others(
    system: SystemUnderLoad, conclude: Conclude, authority: trustme.CA, pool: Any
) -> None:
    # Its breakers would keep what the worst of them are sent from ever being given up here.
    engine = await system.engine(**PATIENT, max_in_flight=300, breaker_failures=1_000_000)
    async with AsyncExitStack() as stack:
        ids = {
            behaviour.__name__: await system.register(
                behaviour.__name__,
                await stack.enter_async_context(behaving(authority, behaviour)),
                timeout=Duration(seconds=2),
                # A busy machine may be too slow for the timeout, now and then.
                retry_schedule=[Duration(seconds=1)] * (5 if answers(behaviour) else 1),
            )
            for behaviour in (*EXPECTED, absurd_retry_after)
        }
        async with system.load.running() as load:
            await load.arrived_more(100)
            for _ in range(EVENTS):
                for name in ids:
                    await system.platform.publish(merchant_id=name)
            await load.arrived_more(500)
            await system.drained(
                f"merchant_id IN ({', '.join(repr(b.__name__) for b in EXPECTED)})"
            )
        for behaviour, expected in EXPECTED.items():
            assert await outcomes(pool, behaviour.__name__) == {expected: EVENTS}
        # However long it was asked to wait, it waits no longer than a retry may.
        longest = await pool.fetchval(
            "SELECT max(due_at) - now() FROM delivery_queue WHERE merchant_id = $1",
            absurd_retry_after.__name__,
        )
        assert longest is None or longest.total_seconds() <= 86_400
        await system.platform.webhooks.DeleteWebhookConfig(
            webhook_config_service_pb2.DeleteWebhookConfigRequest(
                id=ids[absurd_retry_after.__name__]
            ),
            metadata=system.platform.merchant(absurd_retry_after.__name__),
        )
        await conclude(system, f"{len(ids)} hostile receivers", 0)
    assert engine.lives
    assert not engine.named("attempt_broke")
