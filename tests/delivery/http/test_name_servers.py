"""Look-ups against a real name server on loopback, which answers or does not."""

import asyncio
import socket
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from core.addresses import AddressPolicy
from delivery.http.resolver import GuardedResolver, NameServers
from tests.support.name_server import FakeNameServer, serving_names

KNOWN = {
    "both.example": ["8.8.8.8", "2606:4700::1111"],
    "old.example": ["8.8.4.4"],
    "new.example": ["2606:4700::1001"],
}
NOTHING_ALLOWED = AddressPolicy()
AMPLE = 10.0


@pytest.fixture
async def server() -> AsyncIterator[FakeNameServer]:
    async with serving_names(KNOWN) as server:
        yield server


@pytest.fixture
async def names(server: FakeNameServer) -> AsyncIterator[NameServers]:
    names = NameServers([server.address])
    yield names
    await names.close()


@pytest.mark.parametrize("name", KNOWN)
async def test_a_name_has_its_addresses_of_both_kinds(names: NameServers, name: str) -> None:
    assert sorted(await names.look_up(name)) == sorted(KNOWN[name])


@pytest.mark.parametrize("name", ["unknown.example", "a_b.example", "x" * 63 + ".example"])
async def test_a_name_that_is_not_there_is_told_as_such(names: NameServers, name: str) -> None:
    with pytest.raises(socket.gaierror) as caught:
        await names.look_up(name)
    assert caught.value.errno == socket.EAI_NONAME


@pytest.mark.parametrize("name", ["x" * 64 + ".example", "a..example"])
async def test_a_name_that_is_none_is_an_error_of_its_own(
    names: NameServers, server: FakeNameServer, name: str
) -> None:
    with pytest.raises(socket.gaierror):
        await names.look_up(name)
    assert server.asked == []


async def test_names_are_absolute_whatever_the_system_would_append(
    server: FakeNameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCALDOMAIN", "svc.cluster.local")
    monkeypatch.setenv("RES_OPTIONS", "ndots:5")
    names = NameServers([server.address])
    await names.look_up("both.example")
    with pytest.raises(socket.gaierror):
        await names.look_up("unknown.example")
    await names.close()
    assert set(server.asked) == {"both.example", "unknown.example"}


@pytest.fixture
def listed() -> tuple[str, str]:
    """An address and a name that stand in /etc/hosts."""
    for line in Path("/etc/hosts").read_text().splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        for name in names:
            if "localhost" not in name and ip_address(address).version == 4:
                return address, name
    pytest.skip("/etc/hosts of this machine names nothing but localhost")


async def test_etc_hosts_is_read_before_anybody_is_asked(
    names: NameServers, server: FakeNameServer, listed: tuple[str, str]
) -> None:
    address, name = listed
    assert address in await names.look_up(name)
    assert server.asked == []


async def test_silent_name_server_delays_no_other_name(
    names: NameServers, server: FakeNameServer
) -> None:
    resolver = GuardedResolver(NOTHING_ALLOWED, names, timeout_seconds=AMPLE)
    # More than a pool of threads would have.
    silent = []
    for n in range(200):
        silent.append(asyncio.create_task(resolver.resolve(f"{n}.silent.example", 443)))
        # As fast as the server reads, or its socket drops some.
        await server.wait_until_asked(2 * len(silent))
    rows = await resolver.resolve("both.example", 443)
    assert {row["host"] for row in rows} == set(KNOWN["both.example"])
    assert not any(task.done() for task in silent)
    for task in silent:
        task.cancel()
    await asyncio.wait(silent)
    await resolver.close()


async def test_silent_server_costs_at_most_the_timeout(
    names: NameServers,
) -> None:
    resolver = GuardedResolver(NOTHING_ALLOWED, names, timeout_seconds=0.1)
    async with asyncio.timeout(1):
        with pytest.raises(socket.gaierror) as caught:
            await resolver.resolve("a.silent.example", 443)
    assert caught.value.errno == socket.EAI_AGAIN
    assert "within 0.1 s" in str(caught.value)


async def test_closing_does_not_wait_for_a_silent_server(
    server: FakeNameServer, names: NameServers
) -> None:
    resolver = GuardedResolver(NOTHING_ALLOWED, names)
    waiting = asyncio.create_task(resolver.resolve("b.silent.example", 443))
    await server.wait_until_asked(1)
    await resolver.close()
    async with asyncio.timeout(1):
        with pytest.raises((socket.gaierror, asyncio.CancelledError)):
            await waiting


async def test_answers_are_kept_for_so_many_look_ups_at_most(
    names: NameServers, server: FakeNameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long they are good for: c-ares keeps them whole, and as many as there are."""
    monkeypatch.setattr("delivery.http.resolver._LOOKUPS_PER_CHANNEL", 3)
    server.ttl = 3600
    for asked in (2, 2, 2, 4, 4, 4, 6):
        assert sorted(await names.look_up("both.example")) == sorted(KNOWN["both.example"])
        assert len(server.asked) == asked


async def test_pending_lookup_completes_after_a_channel_change(
    names: NameServers, server: FakeNameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delivery.http.resolver._LOOKUPS_PER_CHANNEL", 1)
    server.known = {**KNOWN, "late.silent.example": ["8.8.8.8"]}
    waiting = asyncio.create_task(names.look_up("late.silent.example"))
    await server.wait_until_asked(2)
    for name, addresses in KNOWN.items():
        assert sorted(await names.look_up(name)) == sorted(addresses)
    server.silent = "nothing.example"
    async with asyncio.timeout(AMPLE):
        assert await waiting == ["8.8.8.8"]


async def test_closing_ends_what_waits_since_before_others_began_anew(
    names: NameServers, server: FakeNameServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("delivery.http.resolver._LOOKUPS_PER_CHANNEL", 1)
    waiting = asyncio.create_task(names.look_up("silent.example"))
    await server.wait_until_asked(2)
    await names.look_up("both.example")
    await names.close()
    # Of itself it would wait for 5 s and more.
    async with asyncio.timeout(3):
        with pytest.raises(socket.gaierror):
            await waiting
