"""Reads deliveries, open and finished, as one list. Every query names the merchant."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Self
from uuid import UUID

from core.ids import first_id_at
from core.lifecycle import ATTEMPT_COLUMNS, OPEN_STATES, AttemptResult, DeliveryState
from core.postgres.planner import equal, hidden
from core.postgres.protocols import Executor

_NEWEST = UUID(int=(1 << 128) - 1)


@dataclass(frozen=True, slots=True)
class DeliveryRow:
    """A delivery: an open one has `due_at`, a finished one `finished_at`."""

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
class RecordedAttempt:
    """One recorded attempt."""

    delivery_id: UUID
    number: int
    started_at: datetime
    result: AttemptResult

    @classmethod
    def of(cls, row: Any) -> Self:
        """Read a row with all columns of `attempts`."""
        columns = {name: row[name] for name in ATTEMPT_COLUMNS}
        return cls(row["delivery_id"], row["number"], row["started_at"], AttemptResult(**columns))


@dataclass(frozen=True, slots=True)
class DeliveryFilter:
    """The deliveries to list. None does not filter. `before` is the last id of the previous page.

    The times apply to the deliveries' ids, in milliseconds. `start_at` is inclusive and `end_at`
    exclusive.
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
    """A part of the queue that one index serves in the order of the list."""

    states: frozenset[DeliveryState]
    page: str
    #: A condition that compares the id with a parameter.
    id_condition: str


# A page is merged from a page of each part, newest first. The order includes the config, because an
# order by id alone could read the whole queue until it finds a page.
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
# greatest() is the expression of a partial index that only this statement uses.
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
        "(d.webhook_id, d.id) {operator} (c.id, ${argument})",
    )
    for state in (DeliveryState.PARKED, DeliveryState.BLOCKED)
)
# Without an index by id, because a config has few of these.
_READY_OR_LEASED = _Part(
    OPEN_STATES - _PARKED.states - _BLOCKED.states,
    _OF_CONFIGS.replace("PART", "d.state <> 'parked' AND d.due_at < 'infinity'"),
    hidden("d.id") + " {operator} ${argument}",
)
# Otherwise whole backlogs would be read.
_WAITING_OF_EVENT = _Part(
    _PARKED.states | _BLOCKED.states, _OF_EVENT, _READY_OR_LEASED.id_condition
)
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

_ATTEMPTS = f"""
SELECT delivery_id, number, started_at, {", ".join(ATTEMPT_COLUMNS)}
FROM attempts WHERE delivery_id = ANY ($1) ORDER BY delivery_id, number
"""  # noqa: S608 - of constants


async def find_delivery(
    database: Executor, merchant_id: str, delivery_id: UUID
) -> DeliveryRow | None:
    """Return a delivery of the merchant, open or finished, or None."""
    row = await database.fetchrow(_ONE, merchant_id, delivery_id)
    return DeliveryRow(**row) if row else None


async def has_webhook(database: Executor, merchant_id: str, webhook_id: UUID) -> bool:
    """Return whether a webhook config is or was the merchant's."""
    found: bool = await database.fetchval(
        "SELECT EXISTS (SELECT 1 FROM webhook_configs WHERE id = $2 AND merchant_id = $1)",
        merchant_id,
        webhook_id,
    )
    return found


async def list_deliveries(
    database: Executor, merchant_id: str, wanted: DeliveryFilter, limit: int
) -> list[DeliveryRow]:
    """Return at most `limit` deliveries of a merchant, newest first."""
    statement, arguments = _page(merchant_id, wanted, limit)
    return [DeliveryRow(**row) for row in await database.fetch(statement, *arguments)]


def _page(merchant_id: str, wanted: DeliveryFilter, limit: int) -> tuple[str, list[object]]:
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
    # A subquery, because a single branch would have two ORDER BY.
    whole = " UNION ALL ".join(branches)
    statement = f"SELECT * FROM ({whole}) d ORDER BY id DESC LIMIT $3"  # noqa: S608 - of constants
    return statement, arguments


def _open_branches(
    state: DeliveryState | None, of_webhook: str, of_event: str, filters: str, start: int | None
) -> list[str]:
    """Return the parts of the queue that may have deliveries of this state."""
    branches = []
    for part in (
        (_WAITING_OF_EVENT, _READY_OR_LEASED) if of_event else (_PARKED, _BLOCKED, _READY_OR_LEASED)
    ):
        if state is not None and state not in part.states:
            continue
        more = f"{filters} AND {part.id_condition.format(operator='<', argument=2)}"
        if start is not None:
            more += f" AND {part.id_condition.format(operator='>=', argument=start)}"
        if state is not None and len(part.states) > 1:
            # hidden(), because the indexes of due and leased rows would read too many.
            more += f" AND {hidden('d.state')} = '{state.value}'"
        of_config = f" AND c.id = {of_webhook}" if of_webhook else ""
        branches.append(part.page.format(filters=more, of_webhook=of_config))
    return branches


def _finished_branch(
    state: DeliveryState | None, of_webhook: str, of_event: str, filters: str, start: int | None
) -> str:
    """Use the index of the event, else of the config, else of the merchant.

    With the index of the merchant alone, a large merchant would be read to the end for the few
    deliveries of one config or event.
    """
    merchant, order = "d.merchant_id", ""
    if of_event:
        merchant, order = hidden("d.merchant_id"), "d.event_id DESC, "
        filters += f" AND {hidden('d.webhook_id')} = {of_webhook}" if of_webhook else ""
    elif of_webhook and start is None and state in (None, DeliveryState.DELIVERED):
        order = "d.webhook_id DESC, "
        filters += f" AND {equal('d.webhook_id', f'{of_webhook}::uuid')}"
    elif of_webhook:
        # Failed deliveries, and those of a time range, are few in the other indexes too.
        filters += f" AND d.webhook_id = {of_webhook}"
    if state is not None:
        # A constant, because the planner cannot match a parameter with a partial index.
        filters += f" AND d.state = '{state.value}'"
    if start is not None:
        filters += f" AND d.id >= ${start}"
    return _FINISHED.format(merchant=merchant, filters=filters, order=order)


async def attempts_of(
    database: Executor, delivery_ids: Sequence[UUID]
) -> dict[UUID, list[RecordedAttempt]]:
    """Return the attempts of these deliveries, oldest first."""
    attempts: dict[UUID, list[RecordedAttempt]] = {}
    for row in await database.fetch(_ATTEMPTS, delivery_ids):
        attempts.setdefault(row["delivery_id"], []).append(RecordedAttempt.of(row))
    return attempts
