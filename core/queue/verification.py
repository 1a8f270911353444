"""Looks for what breaks the invariants of a live queue, beside everything that goes on.

Reads only, a page a statement: no transaction stays open and nobody's lock is waited for. What a
page finds is looked at again later: some things are right for a moment, such as a backlog between
the end of one delivery and the next sweep.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from uuid import UUID

from core.queue.invariants import INVARIANTS, Invariant
from core.queue.records import Connection

_PAGE = 1000
#: So many suspects tell enough, and are as many as one second look takes.
_SUSPECTS_MAX = 10_000
#: Longer than engines take to sweep, and to be told of a change.
_SECOND_LOOK_SECONDS = 3.0
_NEWEST = UUID(int=(1 << 128) - 1)


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one invariant; `complete` when everything it is about was looked at."""

    invariant: Invariant
    examined: int
    broken: Sequence[UUID]
    complete: bool


async def check_invariants(connection: Connection, budget_seconds: float) -> list[Finding]:
    """Look for what breaks an invariant, newest first, for about so long; one finding for each.

    A page of every one is looked at, then another of each, until all have been seen or the time is
    over; suspects are then looked at again, which takes some seconds more when there are any.
    """
    deadline = monotonic() + budget_seconds
    walks = [_Walk(invariant) for invariant in INVARIANTS]
    while under_way := [walk for walk in walks if not walk.ended]:
        for walk in under_way:
            await walk.take_page(connection)
        if monotonic() >= deadline:
            break
    if any(walk.suspects for walk in walks):
        await asyncio.sleep(_SECOND_LOOK_SECONDS)
    return [await walk.conclude(connection) for walk in walks]


@dataclass(slots=True)
class _Walk:
    """How far one invariant has been looked at."""

    invariant: Invariant
    ended: bool = False
    complete: bool = False
    examined: int = 0
    suspects: dict[UUID, str] = field(default_factory=dict)
    _before: UUID = _NEWEST

    async def take_page(self, connection: Connection) -> None:
        row = await connection.fetchrow(self.invariant.page(_PAGE), self._before)
        self.examined += row["examined"]
        self.suspects |= _suspects(row)
        self._before = row["last_id"]
        self.complete = row["examined"] < _PAGE
        self.ended = self.complete or len(self.suspects) >= _SUSPECTS_MAX

    async def conclude(self, connection: Connection) -> Finding:
        broken = []
        if self.suspects:
            row = await connection.fetchrow(self.invariant.second_look(), list(self.suspects))
            broken = [id_ for id_, mark in _suspects(row).items() if self.suspects[id_] == mark]
        return Finding(self.invariant, self.examined, broken, self.complete)


def _suspects(row: Mapping[str, Sequence[object]]) -> dict[UUID, str]:
    return dict(zip(row["ids"], row["marks"], strict=True))  # type: ignore[arg-type]
