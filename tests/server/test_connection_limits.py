"""Limits of one connection: pings, streams, message size, age and idle time."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import pytest
from grpc import StatusCode

from postrider.v1 import event_pb2
from tests.support.factories import count_rows, locked, until_blocked
from tests.support.platform import Platform, bearer
from tests.support.refused_calls import refused
from tests.support.rpcs import code_of

GOAWAY, PING, SETTINGS = 7, 6, 4
NO_ERROR, ENHANCE_YOUR_CALM = 0, 11
AMPLE = 10
PUBLISH = "/postrider.v1.EventService/PublishEvent"


class Connection:
    """A minimal HTTP/2 client that can break the protocol."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    def send(self, kind: int, payload: bytes, flags: int = 0) -> None:
        header = struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + bytes(4)
        self._writer.write(header + payload)

    async def read_until(self, kind: int, *, acknowledged: bool = False) -> bytes:
        """The payload of the next frame of this kind."""
        async with asyncio.timeout(AMPLE):
            while True:
                header = await self._reader.readexactly(9)
                payload = await self._reader.readexactly(int.from_bytes(header[:3]))
                if header[3] == kind and bool(header[4] & 1) == acknowledged:
                    return payload


@pytest.fixture
async def connection(platform: Platform) -> AsyncIterator[Connection]:
    host, _, port = platform.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        connection = Connection(reader, writer)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        connection.send(SETTINGS, b"")
        yield connection
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def test_too_many_pings_close_the_connection(
    platform: Platform, connection: Connection
) -> None:
    # The server tolerates `max_ping_strikes` pings that come too early.
    for _ in range(2 + platform.settings.server.max_ping_strikes):
        connection.send(PING, bytes(8))
    goaway = await connection.read_until(GOAWAY)
    assert int.from_bytes(goaway[4:8]) == ENHANCE_YOUR_CALM
    assert goaway[8:] == b"too_many_pings"


@pytest.mark.server(min_ping_interval_seconds=0.001)
async def test_pings_within_the_limit_are_answered(connection: Connection) -> None:
    loop = asyncio.get_running_loop()
    for number in range(10):
        # The interval has no event, so the test waits for its time.
        connection.send(PING, number.to_bytes(8))
        assert await connection.read_until(PING, acknowledged=True) == number.to_bytes(8)
        passed = loop.create_future()
        loop.call_later(0.005, passed.set_result, None)
        await passed


@pytest.mark.server(max_streams_per_connection=7)
async def test_stream_limit_is_announced(connection: Connection) -> None:
    settings = dict(struct.iter_unpack(">HI", await connection.read_until(SETTINGS)))
    max_concurrent_streams = 3
    assert settings[max_concurrent_streams] == 7


@pytest.mark.server(max_streams_per_connection=7)
async def test_calls_beyond_the_stream_limit_are_not_executed_in_part(
    platform: Platform, pool: Any
) -> None:
    await platform.publish()
    codes = await asyncio.gather(*(code_of(platform.publish()) for _ in range(60)))
    assert set(codes) <= {StatusCode.OK, StatusCode.UNAVAILABLE}
    assert await count_rows(pool) == 1 + codes.count(StatusCode.OK)


@pytest.mark.server(max_connection_age_seconds=0.2)
async def test_old_connection_is_closed(connection: Connection) -> None:
    goaway = await connection.read_until(GOAWAY)
    assert int.from_bytes(goaway[4:8]) == NO_ERROR


@pytest.mark.server(max_connection_idle_seconds=0.2)
async def test_idle_connection_is_closed(connection: Connection) -> None:
    goaway = await connection.read_until(GOAWAY)
    assert goaway[8:] == b"connection idle"


@pytest.mark.server(keepalive_seconds=0.1, keepalive_timeout_seconds=0.1)
async def test_connection_without_ping_response_is_closed(connection: Connection) -> None:
    assert await connection.read_until(PING)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await connection.read_until(GOAWAY + 100)


@pytest.mark.server(max_message_bytes=1_310_720)
async def test_too_large_message_is_refused(platform: Platform) -> None:
    event = event_pb2.EventInput(
        merchant_id="m_1", type="payment.succeeded", payload_text='"' + "x" * 250_000 + '"'
    )
    ok, too_large = StatusCode.OK, StatusCode.RESOURCE_EXHAUSTED
    for count, expected in ((5, ok), (6, too_large), (5, ok)):
        call = platform.as_producer().PublishEvents(events=[event] * count)
        assert await call.code() is expected, count


async def test_missing_message_is_not_an_internal_error(
    start_platform: Callable[..., Any], logged: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The token of an unknown caller is verified before the message is read."""
    async with start_platform(max_message_bytes=1_310_720) as platform:
        metadata = [
            bearer(platform.token("events:publish", subject=subject)) for subject in ("a", "b")
        ]
        big = platform.channel.unary_unary(PUBLISH)(b"\x0a" * 1_310_721, metadata=metadata[0])
        assert await big.code() is StatusCode.RESOURCE_EXHAUSTED
        empty = platform.channel.stream_unary(PUBLISH)(iter(()), metadata=metadata[1])
        async with refused(StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED"):
            await empty
    # Both calls are reported, because the server has stopped.
    reported = [(entry["code"], entry["reason"]) for entry in logged if entry["event"] == "rpc"]
    assert reported == [("INVALID_ARGUMENT", "REQUEST_MALFORMED")] * 2
    assert "rpc_broke" not in {entry["event"] for entry in logged}
    assert not caplog.records


@pytest.mark.server(max_concurrent_rpcs=1)
async def test_concurrent_calls_beyond_the_limit_are_refused(platform: Platform, pool: Any) -> None:
    async with locked(pool):
        held = asyncio.create_task(platform.publish())
        await until_blocked(pool)
        assert await code_of(platform.publish()) is StatusCode.RESOURCE_EXHAUSTED
        held.cancel()
