"""Log entries as they are written, for tests that wait for one."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import structlog

_TIMEOUT_SECONDS = 20.0


class EventLog:
    """A structlog processor that keeps every entry."""

    def __init__(self) -> None:
        self.entries: list[MutableMapping[str, Any]] = []
        self._arrived = asyncio.Event()

    def __call__(self, _: Any, level: str, entry: MutableMapping[str, Any]) -> Any:
        self.entries.append({**entry, "level": level})
        self._arrived.set()
        raise structlog.DropEvent

    def named(self, event: str) -> list[MutableMapping[str, Any]]:
        return [entry for entry in self.entries if entry["event"] == event]

    async def wait_for(self, event: str, count: int = 1) -> None:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            while len(self.named(event)) < count:
                self._arrived.clear()
                await self._arrived.wait()
