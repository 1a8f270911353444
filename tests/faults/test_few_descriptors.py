"""An engine with fewer file descriptors than places keeps fewer in flight, and fails nothing."""

import asyncio

import pytest
import trustme

from tests.support.raw_receiver import RawReceiver, server_tls
from tests.support.system_under_load import PATIENT, Conclude, SystemUnderLoad

LIMIT = 256
#: By the command that sh runs in its place.
LIMITED = ("sh", "-c", f'ulimit -n {LIMIT} && exec "$0" "$@"')
PLACES = 500


@pytest.mark.slow
async def test_fewer_descriptors_than_slots(system: SystemUnderLoad, conclude: Conclude) -> None:
    # Each slot needs its own connection.
    engine = await system.engine(
        under=LIMITED, **PATIENT, max_in_flight=PLACES, max_in_flight_per_webhook=PLACES
    )
    [told] = engine.named("fewer_in_flight")
    assert (told["wanted"], told["open_files"]) == (PLACES, LIMIT)
    system.load.window = 2 * PLACES
    system.load.seconds = (0.2, 0.3)
    async with system.load.running() as load:
        await load.arrived_more(2000, timeout=60)
    await conclude(system, f"{LIMIT} descriptors for {PLACES} places", 0)
    assert engine.lives
    assert not {a["outcome"] for a in engine.named("attempt")} & {"connection_error", "dns_error"}


@pytest.mark.slow
async def test_more_receivers_than_descriptors(
    system: SystemUnderLoad, conclude: Conclude, authority: trustme.CA
) -> None:
    async def ok(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    hosts = [f"127.0.1.{number}" for number in range(1, LIMIT)]
    receiver = RawReceiver(*[ok] * 1000)
    tls = server_tls(authority.issue_cert(*hosts))
    server = await asyncio.start_server(receiver.serve, "0.0.0.0", 0, ssl=tls)  # noqa: S104
    port = server.sockets[0].getsockname()[1]
    engine = await system.engine(under=LIMITED, **PATIENT)
    async with server:
        for host in hosts:
            await system.register(host.replace(".", "_"), f"https://{host}:{port}/hook")
        for host in hosts:
            await system.platform.publish(merchant_id=host.replace(".", "_"))
        await system.drained()
        await conclude(system, f"{LIMIT} descriptors, {len(hosts)} receivers", 0)
        for writer in receiver.writers:
            writer.transport.abort()
    assert {attempt["outcome"] for attempt in engine.named("attempt")} == {"succeeded"}
