"""Look-ups: bounded in time and number, shared while they run, and judged all or nothing."""

import asyncio
import gc
import socket
import threading
from collections.abc import Sequence

import pytest

from core.addresses import AddressPolicy
from delivery.resolver import GuardedResolver

NOTHING_ALLOWED = AddressPolicy()
NAME = "hooks.shop.com"


async def test_a_silent_name_server_costs_the_time_limit_and_one_thread() -> None:
    answered = threading.Event()
    asked: list[str] = []

    def lookup(name: str) -> Sequence[str]:
        asked.append(name)
        answered.wait(60)
        return ["8.8.8.8"]

    resolver = GuardedResolver(NOTHING_ALLOWED, lookup=lookup, timeout_seconds=0.05)
    try:
        for _ in range(3):
            with pytest.raises(socket.gaierror) as caught:
                await resolver.resolve(NAME, 443)
            assert caught.value.errno == socket.EAI_AGAIN
        assert asked == [f"{NAME}."]
    finally:
        answered.set()
        await resolver.close()


async def test_a_lookup_that_fails_after_everybody_left_is_not_an_unseen_error() -> None:
    answered = threading.Event()
    looking: list[threading.Thread] = []
    unseen: list[object] = []

    def lookup(name: str) -> Sequence[str]:
        looking.append(threading.current_thread())
        answered.wait(60)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: unseen.append(context))
    resolver = GuardedResolver(NOTHING_ALLOWED, lookup=lookup, timeout_seconds=0.05)
    try:
        with pytest.raises(socket.gaierror, match="no answer"):
            await resolver.resolve(NAME, 443)
        answered.set()
        await resolver.close()
        # The loop hears of the lookup before it hears of the end of the thread that made it.
        await asyncio.to_thread(looking[0].join)
        gc.collect()
    finally:
        answered.set()
        loop.set_exception_handler(None)
    assert unseen == []


async def test_concurrent_lookups_of_one_name_are_one_and_later_ones_ask_again() -> None:
    asked: list[str] = []

    def lookup(name: str) -> Sequence[str]:
        asked.append(name)
        return ["8.8.8.8", "2606:4700::1111"]

    resolver = GuardedResolver(NOTHING_ALLOWED, lookup=lookup)
    found = await asyncio.gather(*(resolver.resolve(NAME, port) for port in (443, 8443)))
    assert [[(row["host"], row["port"]) for row in rows] for rows in found] == [
        [("8.8.8.8", 443), ("2606:4700::1111", 443)],
        [("8.8.8.8", 8443), ("2606:4700::1111", 8443)],
    ]
    assert len(asked) == 1
    await resolver.resolve(f"{NAME.upper()}.", 443)
    assert asked == [f"{NAME}."] * 2
    await resolver.close()
