"""A resolver with fixed responses, for tests of other components."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence


class FakeDns:
    """Returns the addresses from `answer`, a function or coroutine function."""

    def __init__(self, answer: Callable[[str], Sequence[str] | Awaitable[Sequence[str]]]):
        self._answer = answer
        self.asked: list[str] = []
        self.was_asked = asyncio.Event()
        self.closed = False

    async def look_up(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        self.was_asked.set()
        answer = self._answer(name)
        return await answer if isinstance(answer, Awaitable) else answer

    async def close(self) -> None:
        self.closed = True
