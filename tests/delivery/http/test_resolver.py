"""Look-ups: bounded in time and number, shared while they run, and judged all or nothing."""

import asyncio
import gc
import socket
from collections.abc import Sequence

import pytest

from core.addresses import AddressPolicy
from delivery.http.guard import AddressRefused
from delivery.http.resolver import RACED_MAX, GuardedResolver
from tests.support.fake_dns import FakeDns

NOTHING_ALLOWED = AddressPolicy()
NAME = "hooks.shop.com"


async def never(_: str) -> Sequence[str]:
    await asyncio.Event().wait()
    return []


async def test_silent_name_server_costs_one_lookup_at_a_time() -> None:
    names = FakeDns(never)
    resolver = GuardedResolver(NOTHING_ALLOWED, names, timeout_seconds=0.05)
    resolving = [resolver.resolve(NAME, port) for port in (443, 8443, 9443)]
    errors = await asyncio.gather(*resolving, return_exceptions=True)
    assert [getattr(error, "errno", None) for error in errors] == [socket.EAI_AGAIN] * 3
    assert names.asked == [NAME]
    await resolver.close()


async def test_cancelled_attempt_keeps_the_shared_lookup() -> None:
    answered = asyncio.Event()

    async def later(_: str) -> Sequence[str]:
        await answered.wait()
        return ["8.8.8.8"]

    names = FakeDns(later)
    resolver = GuardedResolver(NOTHING_ALLOWED, names)
    first, second = (asyncio.create_task(resolver.resolve(NAME, 443)) for _ in range(2))
    await names.was_asked.wait()
    first.cancel()
    await asyncio.wait([first])
    answered.set()
    assert [row["host"] for row in await second] == ["8.8.8.8"]
    assert names.asked == [NAME]
    await resolver.close()


async def test_lookup_failure_without_waiters_is_retrieved() -> None:
    unseen: list[object] = []
    answered = asyncio.Event()

    async def fail(_: str) -> Sequence[str]:
        await answered.wait()
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    names = FakeDns(fail)
    resolver = GuardedResolver(NOTHING_ALLOWED, names)
    try:
        waiting = asyncio.create_task(resolver.resolve(NAME, 443))
        await names.was_asked.wait()
        waiting.cancel()
        await asyncio.wait([waiting])
        [looking] = resolver._running.values()
        answered.set()
        await asyncio.wait([looking])
        del looking
        gc.collect()
    finally:
        loop.set_exception_handler(None)
        await resolver.close()
    assert unseen == []


async def test_concurrent_lookups_of_a_name_are_shared() -> None:
    names = FakeDns(lambda _: ["8.8.8.8", "2606:4700::1111"])
    resolver = GuardedResolver(NOTHING_ALLOWED, names)
    found = await asyncio.gather(*(resolver.resolve(NAME, port) for port in (443, 8443)))
    assert [[(row["host"], row["port"]) for row in rows] for rows in found] == [
        [("8.8.8.8", 443), ("2606:4700::1111", 443)],
        [("8.8.8.8", 8443), ("2606:4700::1111", 8443)],
    ]
    assert len(names.asked) == 1
    await resolver.resolve(f"{NAME.upper()}.", 443)
    assert names.asked == [NAME] * 2
    await resolver.close()


async def test_concurrent_lookups_are_limited_within_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("delivery.http.resolver._LOOKUPS_MAX", 2)
    names = FakeDns(never)
    resolver = GuardedResolver(NOTHING_ALLOWED, names, timeout_seconds=0.05)
    resolving = [resolver.resolve(f"{n}.shop.com", 443) for n in range(3)]
    errors = await asyncio.gather(*resolving, return_exceptions=True)
    assert [getattr(error, "errno", None) for error in errors] == [socket.EAI_AGAIN] * 3
    assert len(names.asked) == 2
    await resolver.close()


async def test_attempts_get_different_few_addresses_of_each_family() -> None:
    public = [f"8.8.8.{n}" for n in range(50)] + [f"2606:4700::{n:x}" for n in range(1, 51)]
    resolver = GuardedResolver(NOTHING_ALLOWED, FakeDns(lambda _: public))
    seen: set[str] = set()
    for _ in range(5):
        given = [row["host"] for row in await resolver.resolve(NAME, 443)]
        assert sorted(":" in address for address in given) == [False] * 4 + [True] * 4
        assert given == [address for address in public if address in given]
        seen.update(given)
    assert len(seen) > RACED_MAX
    await resolver.close()


async def test_one_inner_address_among_very_many_refuses_the_name() -> None:
    answers = [f"8.8.8.{n}" for n in range(200)] + ["10.0.0.1"]
    resolver = GuardedResolver(NOTHING_ALLOWED, FakeDns(lambda _: answers))
    for _ in range(5):
        with pytest.raises(AddressRefused):
            await resolver.resolve(NAME, 443)
    await resolver.close()


async def test_an_address_that_came_twice_is_tried_once() -> None:
    resolver = GuardedResolver(NOTHING_ALLOWED, FakeDns(lambda _: ["8.8.8.8"] * 9))
    assert [row["host"] for row in await resolver.resolve(NAME, 443)] == ["8.8.8.8"]
    await resolver.close()


@pytest.mark.parametrize(("count", "asked"), [(100, 3), (101, 1)])
async def test_result_for_very_many_addresses_is_reused(count: int, asked: int) -> None:
    names = FakeDns(lambda _: [f"8.8.{n % 2}.{n}" for n in range(count)])
    resolver = GuardedResolver(NOTHING_ALLOWED, names)
    for host in (NAME, f"{NAME.upper()}.", NAME):
        assert len(await resolver.resolve(host, 443)) == 4
    assert names.asked == [NAME] * asked
    await resolver.close()


async def test_what_is_kept_of_a_name_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delivery.http.resolver._KEPT_SECONDS", 0.0)
    names = FakeDns(lambda _: [f"8.8.{n % 2}.{n}" for n in range(200)])
    resolver = GuardedResolver(NOTHING_ALLOWED, names)
    for _ in range(2):
        await resolver.resolve(NAME, 443)
    assert names.asked == [NAME] * 2
    await resolver.close()
