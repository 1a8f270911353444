"""A live tail of recorded attempts. One reader per process serves all watches.

Attempts are read in the order of the transactions that recorded them, up to the oldest running
transaction. So a transaction that commits late is waited for, and a position (transaction,
delivery, attempt) has all earlier attempts before it, in every process.

A position is always that of an attempt. PostgreSQL reuses the numbers of transactions without
changes after a crash, and never those of a commit. Only a database that was set back (restored, or
failed over to a standby with a lag) can be behind a position, and then the watch gets an error.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self
from uuid import UUID

import structlog

from core.errors import InvalidArgument, PostriderError, QuotaExceeded, Unavailable
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Executor
from server.deliveries.store import DeliveryRow, RecordedAttempt

_POLL_SECONDS = 0.2
#: Attempts of all merchants in one read.
BATCH = 1000

_SNAPSHOT = "SELECT pg_current_snapshot()::text"

# Ordered by the index on transactions. The attempts of one transaction are sorted afterwards.
_NEWEST = """
SELECT recorded_xid, delivery_id, number FROM attempts
WHERE recorded_xid = (
    SELECT recorded_xid FROM attempts
    WHERE recorded_xid < pg_snapshot_xmin(pg_current_snapshot())::text::bigint
    ORDER BY recorded_xid DESC LIMIT 1
)
ORDER BY delivery_id DESC, number DESC LIMIT 1
"""

_READ = """
WITH horizon AS MATERIALIZED (
    SELECT pg_snapshot_xmin(pg_current_snapshot())::text::bigint AS xid
), last AS MATERIALIZED (
    SELECT max(recorded_xid) AS xid FROM (
        SELECT a.recorded_xid FROM attempts a
        WHERE a.recorded_xid >= $1 AND a.recorded_xid < (SELECT xid FROM horizon)
            AND (a.recorded_xid, a.delivery_id, a.number) > ($1, $2, $3)
        ORDER BY a.recorded_xid LIMIT $4
    ) a
), batch AS MATERIALIZED (
    SELECT * FROM attempts a
    WHERE a.recorded_xid >= $1 AND a.recorded_xid <= (SELECT xid FROM last)
        AND (a.recorded_xid, a.delivery_id, a.number) > ($1, $2, $3)
    ORDER BY a.recorded_xid, a.delivery_id, a.number
    LIMIT $4
), deliveries AS (
    SELECT id, state, webhook_id, event_id, event_type, attempt_count, created_at, due_at,
        NULL::timestamptz AS finished_at, redelivery_of, merchant_id
    FROM delivery_queue
    WHERE id = ANY (ARRAY(SELECT delivery_id FROM batch)) AND merchant_id = ANY ($5)
    UNION ALL
    SELECT id, state, webhook_id, event_id, event_type, attempt_count, created_at, NULL,
        finished_at, redelivery_of, merchant_id
    FROM finished_deliveries
    WHERE id = ANY (ARRAY(SELECT delivery_id FROM batch)) AND merchant_id = ANY ($5)
)
SELECT h.xid AS horizon, (SELECT count(*) FROM batch) AS scanned, l.last_xid, l.last_delivery,
    l.last_number, b.*, d.*
FROM horizon h
LEFT JOIN (
    SELECT recorded_xid AS last_xid, delivery_id AS last_delivery, number AS last_number
    FROM batch ORDER BY recorded_xid DESC, delivery_id DESC, number DESC LIMIT 1
) l ON true
LEFT JOIN (batch b JOIN deliveries d ON d.id = b.delivery_id) ON true
ORDER BY b.recorded_xid, b.delivery_id, b.number
"""

_DELIVERY_COLUMNS = tuple(field.name for field in fields(DeliveryRow))

_NO_ID = UUID(int=0)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A position among the attempts. All attempts up to it were read."""

    xid: int
    delivery_id: UUID = _NO_ID
    number: int = 0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The transactions that had ended at a moment."""

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(map(int, running.split(",") if running else ())))

    def has(self, xid: int) -> bool:
        return xid < self.xmax and xid not in self.running


@dataclass(frozen=True, slots=True)
class Recorded:
    """A recorded attempt with the current state of its delivery."""

    position: Position
    merchant_id: str
    delivery: DeliveryRow
    attempt: RecordedAttempt


@dataclass(frozen=True, slots=True)
class Batch:
    """The attempts of one read, its end, and whether the batch is full."""

    recorded: Sequence[Recorded]
    end: Position
    full: bool


async def take_snapshot(pool: Executor) -> Snapshot:
    return Snapshot.parse(await pool.fetchval(_SNAPSHOT))


async def newest_position(pool: Executor) -> Position:
    """Return the position of the newest attempt below the oldest running transaction."""
    row = await pool.fetchrow(_NEWEST)
    return Position(*row) if row else Position(0)


async def read_recorded(
    pool: Executor, after: Position, merchant_ids: Sequence[str], limit: int = BATCH
) -> Batch:
    """Return the next attempts of these merchants, after reading at most `limit` of all merchants.

    Raises InvalidArgument if the database was set back behind the position.
    """
    rows = await pool.fetch(
        _READ, after.xid, after.delivery_id, after.number, limit, list(merchant_ids)
    )
    first = rows[0]
    if first["horizon"] < after.xid:
        raise _set_back()
    end = after
    if first["scanned"]:
        end = Position(first["last_xid"], first["last_delivery"], first["last_number"])
    recorded = [_recorded(row) for row in rows if row["id"] is not None]
    return Batch(recorded, end, first["scanned"] == limit)


def _recorded(row: Any) -> Recorded:
    return Recorded(
        Position(row["recorded_xid"], row["delivery_id"], row["number"]),
        row["merchant_id"],
        DeliveryRow(**{name: row[name] for name in _DELIVERY_COLUMNS}),
        RecordedAttempt.of(row),
    )


class Watcher:
    """The pending attempts of one watch. The number is limited, so that a slow watch ends."""

    def __init__(
        self, merchant_id: str, webhook_id: UUID | None, event_type: str | None, backlog: int
    ):
        self.merchant_id = merchant_id
        self._webhook_id = webhook_id
        self._event_type = event_type
        self._backlog = backlog
        self.pending: list[Recorded] = []
        #: Whether the tail adds its attempts here.
        self.joined = False
        self.ended: PostriderError | None = None
        self.news = asyncio.Event()

    def wants(self, recorded: Recorded) -> bool:
        delivery = recorded.delivery
        return self._webhook_id in (None, delivery.webhook_id) and self._event_type in (
            None,
            delivery.event_type,
        )

    def join(self) -> None:
        if not self.joined:
            self.joined = True
            self.news.set()

    def put(self, recorded: Recorded) -> None:
        if self.ended is None and self.wants(recorded):
            self.pending.append(recorded)
            self.news.set()
            if len(self.pending) > self._backlog:
                self.end(_too_slow(self.merchant_id, self._backlog))

    def end(self, error: PostriderError) -> None:
        self.ended = error
        self.pending.clear()
        self.news.set()


class Tail:
    """Reads for all watchers of this process."""

    def __init__(self, pool: Executor):
        self._pool = pool
        #: Held while a watch that catches up reads a page, because all calls use the same database.
        self.catching_up = asyncio.Lock()
        self._watchers: set[Watcher] = set()
        self._watched = asyncio.Event()
        self._stopped = False
        #: Every joined watcher has the attempts up to here. None without watchers.
        self.position: Position | None = None

    def add(self, watcher: Watcher) -> None:
        if self._stopped:
            watcher.end(_stopping())
        self._watchers.add(watcher)
        self._watched.set()

    def remove(self, watcher: Watcher) -> None:
        self._watchers.discard(watcher)

    def stop(self) -> None:
        """End every watch, including later ones, because the process stops."""
        self._stopped = True
        for watcher in self._watchers:
            watcher.end(_stopping())

    async def run(self) -> None:
        """Read until cancelled. While the database is unavailable there are no attempts."""
        while True:
            await self._watched.wait()
            try:
                await self._poll()
            except RETRYABLE_ERRORS as error:
                log.warning("tail_retried", error=repr(error))
            await asyncio.sleep(_POLL_SECONDS)

    async def _poll(self) -> None:
        if not self._watchers:
            self._watched.clear()
            self.position = None
            return
        if self.position is None:
            self.position = await newest_position(self._pool)
        # A watcher that is added during the read joins in the next round.
        watchers = list(self._watchers)
        for watcher in watchers:
            watcher.join()
        more = True
        while more:
            merchant_ids = list({watcher.merchant_id for watcher in watchers})
            try:
                batch = await read_recorded(self._pool, self.position, merchant_ids)
            except InvalidArgument as error:
                self.position = None
                for watcher in watchers:
                    watcher.end(error)
                return
            for recorded in batch.recorded:
                for watcher in watchers:
                    if watcher.merchant_id == recorded.merchant_id:
                        watcher.put(recorded)
            self.position = batch.end
            more = batch.full


def _set_back() -> InvalidArgument:
    return InvalidArgument.of(
        "resume_token",
        "is newer than the database, which was set back to an earlier state: leave it empty, and "
        "list the deliveries of the time in between",
        reason="RESUME_TOKEN_INVALID",
    )


def _too_slow(merchant_id: str, backlog: int) -> QuotaExceeded:
    return QuotaExceeded(
        f"more than {backlog} attempts are unread: read faster or narrow the filters, and continue "
        "with the last resume_token",
        reason="WATCH_TOO_SLOW",
        subject=f"merchant:{merchant_id}",
    )


def _stopping() -> Unavailable:
    return Unavailable(
        "this server is stopping: watch again, with the last resume_token",
        reason="SERVER_STOPPING",
    )
