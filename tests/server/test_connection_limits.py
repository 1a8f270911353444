"""What one connection may not do: flood us with pings, send too much at once, or stay for ever."""

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from postrider.v1 import event_pb2, event_service_pb2
from tests.support.platform import Platform, bearer
from tests.support.refused_calls import refused

GOAWAY, PING, SETTINGS = 7, 6, 4
NO_ERROR, ENHANCE_YOUR_CALM = 0, 11
AMPLE = 10
PUBLISH = "/postrider.v1.EventService/PublishEvent"


class Connection:
    """HTTP/2 by hand: enough of it to misbehave."""

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


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Connection]:
    host, _, port = address.rpartition(":")
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


async def settings_of(connection: Connection) -> dict[int, int]:
    payload = await connection.read_until(SETTINGS)
    return dict(struct.iter_unpack(">HI", payload))


async def test_a_ping_flood_is_told_to_calm_down_and_cut_off(platform: Platform) -> None:
    async with connected(platform.address) as connection:
        # The first that are too close are forgiven: as many as there are strikes.
        for _ in range(2 + platform.settings.server.max_ping_strikes):
            connection.send(PING, bytes(8))
        goaway = await connection.read_until(GOAWAY)
        assert int.from_bytes(goaway[4:8]) == ENHANCE_YOUR_CALM
        assert goaway[8:] == b"too_many_pings"


async def test_pings_no_closer_than_the_limit_are_answered(
    start_platform: Callable[..., Any],
) -> None:
    async with (
        start_platform(min_ping_interval_seconds=0.001) as platform,
        connected(platform.address) as connection,
    ):
        loop = asyncio.get_running_loop()
        for number in range(10):
            # Waits for the answer, and then for the interval; there is no signal for its end.
            connection.send(PING, number.to_bytes(8))
            assert await connection.read_until(PING, acknowledged=True) == number.to_bytes(8)
            passed = loop.create_future()
            loop.call_later(0.005, passed.set_result, None)
            await passed


async def test_a_connection_is_told_how_many_streams_it_may_open(
    start_platform: Callable[..., Any],
) -> None:
    async with (
        start_platform(max_streams_per_connection=7) as platform,
        connected(platform.address) as connection,
    ):
        max_concurrent_streams = 3
        assert (await settings_of(connection))[max_concurrent_streams] == 7


async def test_a_burst_beyond_the_streams_is_carried_out_or_refused_before_it_begins(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    async with start_platform(max_streams_per_connection=7) as platform:
        await platform.publish()
        calls = (platform.publish() for _ in range(60))
        answers = await asyncio.gather(*calls, return_exceptions=True)
    refusals = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {error.code() for error in refusals} <= {StatusCode.UNAVAILABLE}
    assert await pool.fetchval("SELECT count(*) FROM events") == 1 + 60 - len(refusals)


async def test_a_connection_that_is_too_old_is_asked_to_leave(
    start_platform: Callable[..., Any],
) -> None:
    async with (
        start_platform(max_connection_age_seconds=0.2) as platform,
        connected(platform.address) as connection,
    ):
        goaway = await connection.read_until(GOAWAY)
        assert int.from_bytes(goaway[4:8]) == NO_ERROR


async def test_an_idle_connection_is_asked_to_leave(start_platform: Callable[..., Any]) -> None:
    async with (
        start_platform(max_connection_idle_seconds=0.2) as platform,
        connected(platform.address) as connection,
    ):
        goaway = await connection.read_until(GOAWAY)
        assert goaway[8:] == b"connection idle"


async def test_a_silent_peer_is_asked_whether_it_is_there(
    start_platform: Callable[..., Any],
) -> None:
    async with (
        start_platform(keepalive_seconds=0.1, keepalive_timeout_seconds=0.1) as platform,
        connected(platform.address) as connection,
    ):
        assert await connection.read_until(PING)
        # It never answers, so the connection ends.
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await connection.read_until(GOAWAY + 100)


async def test_a_message_that_is_too_big_is_refused(start_platform: Callable[..., Any]) -> None:
    async with start_platform(max_message_bytes=1_310_720) as platform:
        event = event_pb2.EventInput(
            merchant_id="m_1", type="payment.succeeded", payload_text='"' + "x" * 250_000 + '"'
        )
        for count, expected in ((5, StatusCode.OK), (6, StatusCode.RESOURCE_EXHAUSTED)):
            request = event_service_pb2.PublishEventsRequest(events=[event] * count)
            call = platform.events.PublishEvents(request, metadata=platform.producer())
            assert await call.code() is expected, count


async def test_a_message_that_never_arrives_is_no_fault_of_ours(
    start_platform: Callable[..., Any], logged: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Of a caller that was not known a moment ago: the message is read after its token."""
    async with start_platform(max_message_bytes=1_310_720) as platform:
        metadata = [
            bearer(platform.token("events:publish", subject=subject)) for subject in ("a", "b")
        ]
        big = platform.channel.unary_unary(PUBLISH)(b"\x0a" * 1_310_721, metadata=metadata[0])
        assert await big.code() is StatusCode.RESOURCE_EXHAUSTED
        none = platform.channel.stream_unary(PUBLISH)(iter(()), metadata=metadata[1])
        async with refused(StatusCode.INVALID_ARGUMENT, "REQUEST_MALFORMED"):
            await none
    # Told when the calls have ended, as they have with the server.
    told = [(entry["code"], entry["reason"]) for entry in logged if entry["event"] == "rpc"]
    assert told == [("INVALID_ARGUMENT", "REQUEST_MALFORMED")] * 2
    assert "rpc_broke" not in {entry["event"] for entry in logged}
    assert not caplog.records


async def test_more_calls_at_once_than_allowed_are_refused(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    async with (
        start_platform(max_concurrent_rpcs=1) as platform,
        pool.acquire() as other,
        other.transaction(),
    ):
        await other.execute("LOCK TABLE events")
        held = asyncio.create_task(platform.publish())
        await _waits_for_a_lock(other)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await platform.publish()
        assert refused.value.code() is StatusCode.RESOURCE_EXHAUSTED
        held.cancel()


async def _waits_for_a_lock(connection: Any) -> None:
    async with asyncio.timeout(AMPLE):
        while not await connection.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
            pass
