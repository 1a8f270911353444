"""Reads deliveries, open and finished, as one list; always of one merchant."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from core.ids import first_id_at
from core.lifecycle import OPEN_STATES, DeliveryState
from core.postgres.planner import equal, hidden
from core.postgres.protocols import Executor, Pool

_NEWEST = UUID(int=(1 << 128) - 1)


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """A delivery: from the queue, with `due_at`, or from the history, with `finished_at`."""

    id: UUID
    state: str
    webhook_id: UUID
    event_id: UUID
    event_type: str
    attempt_count: int
    created_at: datetime
    due_at: datetime | None
    finished_at: datetime | None
    redelivery_of: UUID | None


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt on record."""

    delivery_id: UUID
    number: int
    outcome: str
    status_code: int | None
    detail: str
    started_at: datetime
    duration_us: int
    dns_us: int | None
    connect_us: int | None
    tls_us: int | None
    first_byte_us: int | None
    remote_address: str | None
    response_excerpt: str


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """What to list; None does not filter. `before` is the id where the page before ended.

    The times are of the deliveries' ids, to the millisecond: `start_at` is included, `end_at` not.
    """

    webhook_id: UUID | None = None
    event_id: UUID | None = None
    state: DeliveryState | None = None
    event_type: str | None = None
    start_at: datetime | None = None
    end_at: datetime | None = None
    before: UUID | None = None


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of the queue, with the statement of a page of it, which one index has in its order."""

    states: frozenset[DeliveryState]
    page: str
    #: That an id is `than` an `argument`.
    id_is: str


# Newest first, a page from each of the places a delivery can be in; the pages merge to one.
# Ordered by the config as well: by the id alone all of the queue could be read, until a page was
# found.
_OF_CONFIGS = f"""(
    SELECT q.id, q.state, q.webhook_id, q.event_id, q.event_type, q.attempt_count, q.created_at,
        q.due_at, NULL::timestamptz AS finished_at, q.redelivery_of
    FROM webhook_configs c CROSS JOIN LATERAL (
        SELECT * FROM delivery_queue d
        WHERE {equal("d.webhook_id", "c.id")} AND PART{{filters}}
        ORDER BY d.webhook_id DESC, d.id DESC LIMIT $3
    ) q
    WHERE c.merchant_id = $1 AND c.deleted_at IS NULL{{of_webhook}}
)"""  # noqa: S608 - of constants
# In the words of its index, which no other statement has.
_OF_EVENT = f"""(
    SELECT d.id, d.state, d.webhook_id, d.event_id, d.event_type, d.attempt_count, d.created_at,
        d.due_at, NULL::timestamptz AS finished_at, d.redelivery_of
    FROM delivery_queue d JOIN webhook_configs c ON {equal("c.id", "d.webhook_id")}
    WHERE greatest(d.state) IN ('parked', 'blocked'){{filters}}
        AND c.merchant_id = $1 AND c.deleted_at IS NULL{{of_webhook}}
    ORDER BY d.event_id DESC, d.id DESC LIMIT $3
)"""  # noqa: S608 - of constants
_PARKED, _BLOCKED = (
    _Part(
        frozenset({state}),
        _OF_CONFIGS.replace("PART", f"d.state = '{state.value}'"),
        "(d.webhook_id, d.id) {than} (c.id, ${argument})",
    )
    for state in (DeliveryState.PARKED, DeliveryState.BLOCKED)
)
# By no index of ids: of a config there is little of these.
_UNDER_WAY = _Part(
    OPEN_STATES - _PARKED.states - _BLOCKED.states,
    _OF_CONFIGS.replace("PART", "d.state <> 'parked' AND d.due_at < 'infinity'"),
    hidden("d.id") + " {than} ${argument}",
)
# Whole backlogs would be read for it otherwise.
_WAITING_OF_EVENT = _Part(_PARKED.states | _BLOCKED.states, _OF_EVENT, _UNDER_WAY.id_is)
_FINISHED = """(
    SELECT d.id, d.state, d.webhook_id, d.event_id, d.event_type, d.attempt_count, d.created_at,
        NULL::timestamptz AS due_at, d.finished_at, d.redelivery_of
    FROM finished_deliveries d
    WHERE {merchant} = $1 AND d.id < $2{filters}
    ORDER BY {order}d.id DESC LIMIT $3
)"""

_ONE = """
SELECT id, state, webhook_id, event_id, event_type, attempt_count, created_at, due_at,
    NULL::timestamptz AS finished_at, redelivery_of
FROM delivery_queue WHERE id = $2 AND merchant_id = $1
UNION ALL
SELECT id, state, webhook_id, event_id, event_type, attempt_count, created_at,
    NULL::timestamptz, finished_at, redelivery_of
FROM finished_deliveries WHERE id = $2 AND merchant_id = $1
"""

_ATTEMPTS = """
SELECT delivery_id, number, outcome, status_code, detail, started_at, duration_us, dns_us,
    connect_us, tls_us, first_byte_us, remote_address, response_excerpt
FROM attempts WHERE delivery_id = ANY ($1) ORDER BY delivery_id, number
"""


async def find_delivery(pool: Executor, merchant_id: str, delivery_id: UUID) -> DeliveryRow | None:
    """One delivery of a merchant, wherever it stands."""
    row = await pool.fetchrow(_ONE, merchant_id, delivery_id)
    return DeliveryRow(**row) if row else None


async def has_webhook(pool: Pool, merchant_id: str, webhook_id: UUID) -> bool:
    """Whether a webhook config is the merchant's, or was before it was deleted."""
    found: bool = await pool.fetchval(
        "SELECT EXISTS (SELECT 1 FROM webhook_configs WHERE id = $2 AND merchant_id = $1)",
        merchant_id,
        webhook_id,
    )
    return found


async def list_deliveries(
    pool: Pool, merchant_id: str, wanted: DeliveryFilter, limit: int
) -> list[DeliveryRow]:
    """At most `limit` deliveries of a merchant, newest first."""
    statement, arguments = _page(merchant_id, wanted, limit)
    return [DeliveryRow(**row) for row in await pool.fetch(statement, *arguments)]


def _page(merchant_id: str, wanted: DeliveryFilter, limit: int) -> tuple[str, list[object]]:
    """The statement of a page, with its arguments."""
    bounds = [_NEWEST, wanted.before, first_id_at(wanted.end_at) if wanted.end_at else None]
    arguments: list[object] = [merchant_id, min(bound for bound in bounds if bound), limit]
    of_webhook = of_event = filters = ""
    start: int | None = None
    if wanted.webhook_id is not None:
        arguments.append(wanted.webhook_id)
        of_webhook = f"${len(arguments)}"
    if wanted.event_id is not None:
        arguments.append(wanted.event_id)
        of_event = f"${len(arguments)}"
        filters += f" AND {equal('d.event_id', f'{of_event}::uuid')}"
    if wanted.event_type is not None:
        arguments.append(wanted.event_type)
        filters += f" AND d.event_type = ${len(arguments)}"
    if wanted.start_at is not None:
        arguments.append(first_id_at(wanted.start_at))
        start = len(arguments)
    branches = []
    if wanted.state is None or wanted.state in OPEN_STATES:
        branches = _open_branches(wanted.state, of_webhook, of_event, filters, start)
    if wanted.state is None or wanted.state not in OPEN_STATES:
        branches.append(_finished_branch(wanted.state, of_webhook, of_event, filters, start))
    # As a subquery: a single branch would have two ORDER BY.
    whole = " UNION ALL ".join(branches)
    statement = f"SELECT * FROM ({whole}) d ORDER BY id DESC LIMIT $3"  # noqa: S608 - of our own parts
    return statement, arguments


def _open_branches(
    state: DeliveryState | None, of_webhook: str, of_event: str, filters: str, start: int | None
) -> list[str]:
    """Of the parts of the queue, those that may have deliveries of this state."""
    branches = []
    for part in (_WAITING_OF_EVENT, _UNDER_WAY) if of_event else (_PARKED, _BLOCKED, _UNDER_WAY):
        if state is not None and state not in part.states:
            continue
        more = f"{filters} AND {part.id_is.format(than='<', argument=2)}"
        if start is not None:
            more += f" AND {part.id_is.format(than='>=', argument=start)}"
        if state is not None and len(part.states) > 1:
            # No reason to read the index of all that are due, or leased.
            more += f" AND {hidden('d.state')} = '{state.value}'"
        of_config = f" AND c.id = {of_webhook}" if of_webhook else ""
        branches.append(part.page.format(filters=more, of_webhook=of_config))
    return branches


def _finished_branch(
    state: DeliveryState | None, of_webhook: str, of_event: str, filters: str, start: int | None
) -> str:
    """By the index of the event, else of the config, else of the merchant: who has most of what
    there is would be read to the end otherwise, for the few of a config or an event.
    """
    merchant, order = "d.merchant_id", ""
    if of_event:
        merchant, order = hidden("d.merchant_id"), "d.event_id DESC, "
        filters += f" AND {hidden('d.webhook_id')} = {of_webhook}" if of_webhook else ""
    elif of_webhook and start is None and state in (None, DeliveryState.DELIVERED):
        order = "d.webhook_id DESC, "
        filters += f" AND {equal('d.webhook_id', f'{of_webhook}::uuid')}"
    elif of_webhook:
        # Of what went wrong, or of a time, there is little by the other indexes as well.
        filters += f" AND d.webhook_id = {of_webhook}"
    if state is not None:
        # Not an argument: only of a constant does the planner know whether a partial index has it.
        filters += f" AND d.state = '{state.value}'"
    if start is not None:
        filters += f" AND d.id >= ${start}"
    return _FINISHED.format(merchant=merchant, filters=filters, order=order)


async def attempts_of(pool: Pool, delivery_ids: Sequence[UUID]) -> dict[UUID, list[AttemptRow]]:
    """The attempts of these deliveries, oldest first."""
    attempts: dict[UUID, list[AttemptRow]] = {}
    for row in await pool.fetch(_ATTEMPTS, delivery_ids):
        attempts.setdefault(row["delivery_id"], []).append(AttemptRow(**row))
    return attempts
