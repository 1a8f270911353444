"""Invariants of accepted events and deliveries: a table of named checks, and the run of them.

A check only reads. Each page is one statement and sees one moment, so that a delivery that moves is
seen once. Suspects are checked again some seconds later, because some states are normal for a
moment, for example a backlog between the end of a delivery and the next sweep.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from uuid import UUID

from core.ids import IdKind
from core.postgres.protocols import Executor

#: Several sweeps of an engine, and longer than any load explains.
_SOON = "interval '10 seconds'"
_LONG = "interval '60 seconds'"
#: An event's `not_before` is at most 30 days ahead, and no other wait is longer.
_LONGEST_WAIT = "interval '31 days'"

_REPORT = "a bug, or a manual SQL change: keep the ids and their rows, and report them"
_LOOK_AT_ENGINES = (
    "probably no engine runs or reaches the database: see docs/operate/runbook.md, The queue grows"
)


@dataclass(frozen=True, slots=True)
class Invariant:
    """One check. `rows` are read in the order of `key`, newest first, where `only` is true.

    `suspects` selects (id, mark) of a page. A suspect is broken if a second check finds it with the
    same mark.
    """

    name: str
    says: str
    #: The kind of the suspects' ids.
    ids: IdKind
    rows: str
    suspects: str
    key: str = "id"
    only: str = "true"
    #: The advice for operators.
    advice: str = _REPORT

    def page(self, limit: int) -> str:
        """Return the statement for a page of rows before the key $1."""
        # A constant, so that the planner knows that a page is small.
        which = f"{self.key} < $1 ORDER BY {self.key} DESC LIMIT {limit}"
        # An event and its deliveries are created by one statement, well within a second.
        return self._statement(which, slack_seconds=1)

    def second_look(self) -> str:
        """Return the statement that checks the keys $1 again, without the time limits of pages."""
        return self._statement(f"{self.key} = ANY ($1)", slack_seconds=10_000_000_000)

    def _statement(self, which: str, slack_seconds: int) -> str:
        suspects = self.suspects.format(slack=f"interval '{slack_seconds} seconds'")
        return f"""
        WITH page AS MATERIALIZED (
            {self.rows} WHERE {self.only} AND {which}
        ), suspects AS ({suspects})
        SELECT (SELECT count(*) FROM page) AS examined,
            (SELECT id FROM page ORDER BY id LIMIT 1) AS last_id,
            ARRAY(SELECT id FROM suspects ORDER BY id DESC) AS ids,
            ARRAY(SELECT mark FROM suspects ORDER BY id DESC) AS marks
        """  # noqa: S608 - of constants


# The smallest id of a delivery that was created at this time of the database.
_ID_AT = """(
    lpad(to_hex(greatest(extract(epoch FROM {moment}) * 1000, 0)::bigint), 12, '0')
    || repeat('0', 20)
)::uuid"""
_CREATED_WITH_PAGE = f"""
    id >= (SELECT {_ID_AT.format(moment="min(created_at) - {slack}")} FROM page)
    AND id < (SELECT {_ID_AT.format(moment="max(created_at) + {slack}")} FROM page)
"""  # noqa: S608 - of constants

# Silent attempts occupy slots, and an engine gives only a part of its slots to silent and unproven
# configs. Other such configs wait for a slot, possibly for several timeouts. The database does not
# know the number of slots, so 16 silent attempts count as a shortage. A lease id starts with the
# time of its claim.
_SLOTS_MAY_BE_SHORT = f"""(
    SELECT count(*) = 16 FROM (
        SELECT FROM delivery_queue
        WHERE state = 'leased' AND lease_until > now()
            AND lease_id < {_ID_AT.format(moment="now() - interval '2 seconds'")}
        LIMIT 16
    ) silent
)"""  # noqa: S608 - of constants

# Deliveries that ended before this time may have been removed by retention.
_REMOVED_BEFORE = """coalesce((
    SELECT removed_before FROM retention_runs
    WHERE removed_before IS NOT NULL ORDER BY removed_before DESC LIMIT 1
), '-infinity')"""

_DENSE = """
SELECT p.id, '' AS mark FROM page p CROSS JOIN LATERAL (
    SELECT count(*) AS attempts, coalesce(max(a.number), 0) AS last
    FROM attempts a WHERE a.delivery_id = p.id
) t
WHERE t.attempts <> p.attempt_count OR t.last <> p.attempt_count
"""

_CONFIG_UNKNOWN = """
SELECT p.id, '' AS mark FROM page p
WHERE NOT EXISTS (SELECT FROM webhook_configs c WHERE c.id = p.webhook_id)
"""

_EVENT_UNKNOWN = """
SELECT p.id, '' AS mark FROM page p
WHERE (SELECT true FROM events e WHERE e.id = p.event_id LIMIT 1) IS NULL
"""

INVARIANTS: tuple[Invariant, ...] = (
    Invariant(
        name="event_has_deliveries",
        says="every accepted event has all its deliveries, open, finished or past their retention",
        ids="evt",
        rows="SELECT id, delivery_count, created_at FROM events",
        # The queue has no index by event. Ids start with the time.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p LEFT JOIN (
                SELECT event_id FROM delivery_queue
                WHERE event_id = ANY (ARRAY(SELECT id FROM page)) AND redelivery_of IS NULL
                AND {_CREATED_WITH_PAGE}
                UNION ALL
                SELECT event_id FROM finished_deliveries
                WHERE event_id = ANY (ARRAY(SELECT id FROM page)) AND redelivery_of IS NULL
                AND {_CREATED_WITH_PAGE}
            ) d ON d.event_id = p.id
            GROUP BY p.id, p.delivery_count, p.created_at
            HAVING count(d.event_id) > p.delivery_count
                OR count(d.event_id) < p.delivery_count AND p.created_at >= {_REMOVED_BEFORE}
        """,  # noqa: S608 - of constants
        advice="missing deliveries are not sent: publish the event again with another "
        f"idempotency key; {_REPORT}",
    ),
    Invariant(
        name="open_or_finished",
        says="no delivery is both in the queue and finished",
        ids="dlv",
        rows="SELECT id FROM delivery_queue",
        # A subquery per row, so that the planner does not read whole days.
        suspects="""
            SELECT p.id, '' AS mark FROM page p
            WHERE (SELECT true FROM finished_deliveries f WHERE f.id = p.id LIMIT 1)
        """,
    ),
    Invariant(
        name="open_event_stored",
        says="every delivery in the queue has its event",
        ids="dlv",
        rows="SELECT id, event_id FROM delivery_queue",
        suspects=_EVENT_UNKNOWN,
    ),
    Invariant(
        name="open_config_known",
        says="every delivery in the queue has its webhook config",
        ids="dlv",
        rows="SELECT id, webhook_id FROM delivery_queue",
        suspects=_CONFIG_UNKNOWN,
    ),
    Invariant(
        name="open_attempts_dense",
        says="the attempts of every delivery in the queue are numbered 1 to its attempt count",
        ids="dlv",
        rows="SELECT id, attempt_count FROM delivery_queue",
        suspects=_DENSE,
    ),
    Invariant(
        name="lease_taken_back",
        says="no lease that ended 10 s ago or longer is still held",
        ids="dlv",
        rows="SELECT id, lease_until FROM delivery_queue",
        only="state = 'leased'",
        suspects=f"SELECT p.id, '' AS mark FROM page p WHERE p.lease_until < now() - {_SOON}",  # noqa: S608
        advice=_LOOK_AT_ENGINES,
    ),
    Invariant(
        name="waits_end",
        says="no delivery in the queue is due, and no lease ends, later than in 31 days",
        ids="dlv",
        rows="SELECT id, state, due_at, lease_until FROM delivery_queue",
        # A clock that was ahead leaves such rows. Blocked deliveries have no due time, and the due
        # time of a leased one has passed.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p
            WHERE CASE p.state WHEN 'leased' THEN p.lease_until WHEN 'blocked' THEN now()
                ELSE p.due_at END > now() + {_LONGEST_WAIT}
        """,  # noqa: S608 - of constants
        advice="the database's clock was ahead, or a manual SQL change: set due_at, or lease_until "
        "if it is set, to now(), and engines claim the deliveries",
    ),
    Invariant(
        name="due_claimed",
        says="no delivery that may be sent has been due for 60 s or longer",
        ids="dlv",
        rows="SELECT id, webhook_id, state, due_at FROM delivery_queue",
        # Free slots do not matter, because a claim takes the delivery and parks it. The deliveries
        # of a deleted config are cancelled by a claim.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p JOIN webhook_configs c ON c.id = p.webhook_id
            WHERE p.state = 'ready' AND p.due_at < now() - {_LONG}
            AND (c.active OR c.deleted_at IS NOT NULL)
        """,  # noqa: S608 - of constants
        advice=_LOOK_AT_ENGINES,
    ),
    Invariant(
        name="inactive_parked",
        says="no ready delivery of an inactive webhook config has been due for 10 s or longer",
        ids="dlv",
        rows="SELECT id, webhook_id, state, due_at FROM delivery_queue",
        # A retry with a later due time may be ready, and is parked by its claim.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p JOIN webhook_configs c ON c.id = p.webhook_id
            WHERE p.state = 'ready' AND p.due_at < now() - {_SOON}
            AND NOT c.active AND c.deleted_at IS NULL
        """,  # noqa: S608 - of constants
        advice=_LOOK_AT_ENGINES,
    ),
    Invariant(
        name="backlog_let_in",
        says="no webhook config that may receive has a backlog and no due or leased delivery",
        ids="wh",
        rows="""
            SELECT id, active, deleted_at, rate_limit, rate_used_until, breaker_open_until
            FROM webhook_configs
        """,
        # This lists every reason for which a backlog may wait. The mark is the version of the first
        # parked row: while it stays the same, no delivery was admitted.
        suspects=f"""
            SELECT c.id, concat(head.id, ' ', head.written_by) AS mark
            FROM page c CROSS JOIN LATERAL (
                SELECT q.id, q.xmin AS written_by FROM delivery_queue q
                WHERE q.webhook_id = c.id AND q.state = 'parked'
                -- A half-open breaker admits due deliveries, and an open one none.
                AND (c.breaker_open_until IS NULL OR q.due_at <= now())
                ORDER BY q.id LIMIT 1
            ) head
            WHERE (c.active OR c.deleted_at IS NOT NULL)
            AND (c.rate_limit = 0 OR c.rate_used_until IS NULL
                OR (now() - c.rate_used_until) * c.rate_limit >= interval '1 second')
            AND (c.breaker_open_until IS NULL OR c.breaker_open_until <= now())
            AND NOT EXISTS (
                SELECT FROM delivery_queue q
                WHERE q.webhook_id = c.id AND q.state <> 'parked' AND q.due_at <= now()
            )
            AND NOT {_SLOTS_MAY_BE_SHORT}
        """,  # noqa: S608 - of constants
        advice=_LOOK_AT_ENGINES,
    ),
    Invariant(
        name="chain_has_first",
        says="no chain of an ordering key waits without a first that is ready, parked or leased",
        ids="dlv",
        rows="""
            SELECT id, webhook_id, ordering_key, ordering_position FROM delivery_queue
        """,
        only="state = 'blocked'",
        # The delivery that comes next.
        suspects="""
            SELECT p.id, '' AS mark FROM page p
            WHERE (
                SELECT true FROM delivery_queue q
                WHERE q.webhook_id = p.webhook_id AND q.ordering_key = p.ordering_key
                AND q.state <> 'blocked' LIMIT 1
            ) IS NULL AND (
                SELECT true FROM delivery_queue q
                WHERE q.webhook_id = p.webhook_id AND q.ordering_key = p.ordering_key
                AND q.state = 'blocked' AND q.ordering_position < p.ordering_position LIMIT 1
            ) IS NULL
        """,
        advice=_LOOK_AT_ENGINES,
    ),
    Invariant(
        name="finished_config_known",
        says="every finished delivery has its webhook config, which may be deleted",
        ids="dlv",
        rows="SELECT id, webhook_id FROM finished_deliveries",
        suspects=_CONFIG_UNKNOWN,
    ),
    Invariant(
        name="finished_event_stored",
        says="every finished delivery has its event",
        ids="dlv",
        rows="SELECT id, event_id FROM finished_deliveries",
        suspects=_EVENT_UNKNOWN,
    ),
    Invariant(
        name="finished_attempts_dense",
        says="the attempts of every finished delivery are numbered 1 to its attempt count",
        ids="dlv",
        rows="SELECT id, attempt_count FROM finished_deliveries",
        suspects=_DENSE,
    ),
    Invariant(
        name="finished_as_attempted",
        says="a finished delivery is delivered if and only if its last attempt succeeded",
        ids="dlv",
        rows="SELECT id, state, attempt_count FROM finished_deliveries",
        suspects="""
            SELECT p.id, '' AS mark FROM page p WHERE (p.state = 'delivered') <> coalesce((
                SELECT a.outcome = 'succeeded' FROM attempts a
                WHERE a.delivery_id = p.id AND a.number = p.attempt_count
            ), false)
        """,
    ),
    Invariant(
        name="attempt_has_delivery",
        says="every attempt is of a delivery that is in the queue or finished",
        ids="dlv",
        rows="SELECT DISTINCT delivery_id AS id FROM attempts",
        key="delivery_id",
        suspects="""
            SELECT p.id, '' AS mark FROM page p
            WHERE (SELECT true FROM delivery_queue q WHERE q.id = p.id LIMIT 1) IS NULL
            AND (SELECT true FROM finished_deliveries f WHERE f.id = p.id LIMIT 1) IS NULL
        """,
    ),
)


_PAGE = 1000
#: A walk ends at this number of suspects, which one second check can take.
_SUSPECTS_MAX = 10_000
#: Longer than an engine takes to sweep.
_SECOND_LOOK_SECONDS = 3.0
_NEWEST = UUID(int=(1 << 128) - 1)


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `complete` if all rows were read."""

    invariant: Invariant
    examined: int
    broken: Sequence[UUID]
    complete: bool


async def check_invariants(connection: Executor, budget_seconds: float) -> list[Finding]:
    """Run all checks for about `budget_seconds`, and return one finding for each.

    The checks read pages in turn, newest rows first, until all rows are read or the time is over.
    Checking suspects again takes some more seconds.
    """
    deadline = monotonic() + budget_seconds
    walks = [_Walk(invariant) for invariant in INVARIANTS]
    while running := [walk for walk in walks if not walk.ended]:
        for walk in running:
            await walk.take_page(connection)
        if monotonic() >= deadline:
            break
    if any(walk.suspects for walk in walks):
        await asyncio.sleep(_SECOND_LOOK_SECONDS)
    return [await walk.conclude(connection) for walk in walks]


@dataclass(slots=True)
class _Walk:
    """The progress of one check."""

    invariant: Invariant
    ended: bool = False
    complete: bool = False
    examined: int = 0
    suspects: dict[UUID, str] = field(default_factory=dict)
    _before: UUID = _NEWEST

    async def take_page(self, connection: Executor) -> None:
        row = await connection.fetchrow(self.invariant.page(_PAGE), self._before)
        self.examined += row["examined"]
        self.suspects |= _suspects(row)
        self._before = row["last_id"]
        self.complete = row["examined"] < _PAGE
        self.ended = self.complete or len(self.suspects) >= _SUSPECTS_MAX

    async def conclude(self, connection: Executor) -> Finding:
        broken = []
        if self.suspects:
            row = await connection.fetchrow(self.invariant.second_look(), list(self.suspects))
            broken = [id_ for id_, mark in _suspects(row).items() if self.suspects[id_] == mark]
        return Finding(self.invariant, self.examined, broken, self.complete)


def _suspects(row: Mapping[str, Sequence[object]]) -> dict[UUID, str]:
    return dict(zip(row["ids"], row["marks"], strict=True))  # type: ignore[arg-type]
