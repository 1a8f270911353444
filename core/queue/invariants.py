"""What must hold of everything accepted, as one table of named checks; core/queue/verification
makes them.

Each is one statement a page and sees one moment, so a delivery that is settled meanwhile is seen
once, wherever it stands.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from uuid import UUID

from core.ids import IdKind
from core.postgres.protocols import Executor

#: Several sweeps of an engine; and what nobody would call busy any more.
_SOON = "interval '10 seconds'"
_LONG = "interval '60 seconds'"
#: An event's `not_before` is at most 30 days ahead, and nothing else waits so long.
_EVER = "interval '31 days'"

_REPORT = "a bug of ours, or somebody's SQL: keep the ids and what they belong to, and report them"
_LOOK_AT_ENGINES = (
    "mostly no engine runs, or none reaches the database; docs/operate/runbook.md, The queue grows"
)


@dataclass(frozen=True, slots=True)
class Invariant:
    """`rows` are walked by `key`, newest first, `only` some; `suspects` of a page are (id, mark).

    A suspect is broken when a second look finds it with the same mark: what a mark is made of must
    have stayed as it was in between.
    """

    name: str
    says: str
    #: What the suspects' ids are of.
    ids: IdKind
    rows: str
    suspects: str
    key: str = "id"
    only: str = "true"
    #: What whoever finds it broken does then.
    advice: str = _REPORT

    def page(self, limit: int) -> str:
        """The statement that takes a page of at most so many, before the key $1."""
        # Not an argument: the planner has to know that a page is small.
        which = f"{self.key} < $1 ORDER BY {self.key} DESC LIMIT {limit}"
        # A second is far more than an event and its deliveries, of one statement, lie apart.
        return self._statement(which, slack_seconds=1)

    def second_look(self) -> str:
        """The statement that looks at the keys $1 again, taking no short cut."""
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


# The least id that a delivery may have which was made at that time of the database.
_ID_AT = """(
    lpad(to_hex(greatest(extract(epoch FROM {moment}) * 1000, 0)::bigint), 12, '0')
    || repeat('0', 20)
)::uuid"""
_MADE_WITH_PAGE = f"""
    id >= (SELECT {_ID_AT.format(moment="min(created_at) - {slack}")} FROM page)
    AND id < (SELECT {_ID_AT.format(moment="max(created_at) + {slack}")} FROM page)
"""  # noqa: S608 - of constants

# Attempts that nobody has answered for a while hold places, and an engine gives only a part of its
# places to such configs and to those it has heard nothing good of: the others wait for one, which
# may take as long as a timeout, and again. How many places there are is the engines' to know; in so
# many attempts they may be short. A lease's id begins with the time of its claim.
_PLACES_MAY_BE_SHORT = f"""(
    SELECT count(*) = 16 FROM (
        SELECT FROM delivery_queue
        WHERE state = 'leased' AND lease_until > now()
            AND lease_id < {_ID_AT.format(moment="now() - interval '2 seconds'")}
        LIMIT 16
    ) silent
)"""  # noqa: S608 - of constants

# What ended before it may have been removed by retention; an event stays for what is left of it.
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
        # The queue has no index by event; its ids begin with the time, as finished ones do.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p LEFT JOIN (
                SELECT event_id FROM delivery_queue
                WHERE event_id = ANY (ARRAY(SELECT id FROM page)) AND redelivery_of IS NULL
                AND {_MADE_WITH_PAGE}
                UNION ALL
                SELECT event_id FROM finished_deliveries
                WHERE event_id = ANY (ARRAY(SELECT id FROM page)) AND redelivery_of IS NULL
                AND {_MADE_WITH_PAGE}
            ) d ON d.event_id = p.id
            GROUP BY p.id, p.delivery_count, p.created_at
            HAVING count(d.event_id) > p.delivery_count
                OR count(d.event_id) < p.delivery_count AND p.created_at >= {_REMOVED_BEFORE}
        """,  # noqa: S608 - of constants
        advice="what is missing is not sent any more: have the event published again, under "
        f"another idempotency key; {_REPORT}",
    ),
    Invariant(
        name="open_or_finished",
        says="no delivery is both in the queue and finished",
        ids="dlv",
        rows="SELECT id FROM delivery_queue",
        # One by one, for which the planner could not think of reading whole days instead.
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
        says="nothing in the queue is due, and no lease ends, later than in 31 days",
        ids="dlv",
        rows="SELECT id, state, due_at, lease_until FROM delivery_queue",
        # As a clock that was years ahead leaves them, once it is right. Of what is blocked no time
        # is said, and what is leased is beyond its own.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p
            WHERE CASE p.state WHEN 'leased' THEN p.lease_until WHEN 'blocked' THEN now()
                ELSE p.due_at END > now() + {_EVER}
        """,  # noqa: S608 - of constants
        advice="the database's clock was ahead, or somebody's SQL: set due_at, or lease_until "
        "where there is one, to now(), and engines take them",
    ),
    Invariant(
        name="due_claimed",
        says="nothing that may be sent has been due for 60 s or longer",
        ids="dlv",
        rows="SELECT id, webhook_id, state, due_at FROM delivery_queue",
        # Whether its config has room does not matter: a claim takes it, and parks what has none.
        # The claim of what belongs to a deleted config cancels it.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p JOIN webhook_configs c ON c.id = p.webhook_id
            WHERE p.state = 'ready' AND p.due_at < now() - {_LONG}
            AND (c.active OR c.deleted_at IS NOT NULL)
        """,  # noqa: S608 - of constants
        advice=_LOOK_AT_ENGINES,
    ),
    Invariant(
        name="inactive_parked",
        says="nothing of an inactive webhook config is ready and has been due for 10 s or longer",
        ids="dlv",
        rows="SELECT id, webhook_id, state, due_at FROM delivery_queue",
        # What is due later may be there: a retry whose config went inactive waits for its claim.
        suspects=f"""
            SELECT p.id, '' AS mark FROM page p JOIN webhook_configs c ON c.id = p.webhook_id
            WHERE p.state = 'ready' AND p.due_at < now() - {_SOON}
            AND NOT c.active AND c.deleted_at IS NULL
        """,  # noqa: S608 - of constants
        advice=_LOOK_AT_ENGINES,
    ),
    Invariant(
        name="backlog_let_in",
        says="no webhook config that may be sent to has a backlog and nothing due or leased",
        ids="wh",
        rows="""
            SELECT id, active, deleted_at, rate_limit, rate_used_until, breaker_open_until
            FROM webhook_configs
        """,
        # Whatever else may make a backlog wait belongs here. The mark is the first parked row as it
        # was written: as long as nobody has touched it, nothing was let in.
        suspects=f"""
            SELECT c.id, concat(head.id, ' ', head.written_by) AS mark
            FROM page c CROSS JOIN LATERAL (
                SELECT q.id, q.xmin AS written_by FROM delivery_queue q
                WHERE q.webhook_id = c.id AND q.state = 'parked'
                -- A half-open breaker lets in what is due, and an open one nothing.
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
            AND NOT {_PLACES_MAY_BE_SHORT}
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
        # The one whose turn it is.
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
        says="exactly the delivered ones have a last attempt that succeeded",
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


# Looks for what breaks the invariants of a live queue, beside everything that goes on.
#
# Reads only, a page a statement: no transaction stays open and nobody's lock is waited for. What a
# page finds is looked at again later: some things are right for a moment, such as a backlog between
# the end of one delivery and the next sweep.

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


async def check_invariants(connection: Executor, budget_seconds: float) -> list[Finding]:
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
