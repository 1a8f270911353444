"""Reads, caches and changes the registered event types.

Event types are added and changed, never removed. `EventTypes` caches them for one second, so that
publishing does not query the database. `EventTypeRegister` writes changes with an audit entry.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass
from time import monotonic
from typing import Any

import structlog
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from core.errors import AlreadyExists, NotFound
from core.models import EventType
from core.postgres.protocols import Executor
from server.database import Sessions
from server.event_types.rules import (
    UPDATABLE_FIELDS,
    EventTypeDraft,
    check_fields,
    check_name,
    is_event_type_name,
)
from server.event_types.schema import PayloadSchema, SchemaRefused
from server.rpc.audit import record_change
from server.rpc.validation import check_mask

#: A call that begins this long after the commit of a change uses the change.
MAX_AGE_SECONDS = 1.0

# xmin is the transaction that wrote the row. A new value means that the row has changed.
_ALL = "SELECT name, xmin::text AS revision, enforce_schema FROM event_types"
_SOME = f"{_ALL} WHERE name = ANY ($1)"
_SCHEMAS = """
SELECT name, xmin::text AS revision, enforce_schema, json_schema
FROM event_types WHERE name = ANY ($1)
"""
_DEPRECATED = "SELECT name FROM event_types WHERE name = ANY ($1) AND deprecated"

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _CachedType:
    revision: str
    #: None unless the type enforces its schema.
    schema: PayloadSchema | None


class EventTypes:
    """Cache of the registered names and enforced schemas."""

    def __init__(self, pool: Executor, clock: Callable[[], float] = monotonic):
        self._pool = pool
        self._clock = clock
        self._cached: dict[str, _CachedType] = {}
        self._read_at = float("-inf")
        self._invalidations = 0
        # One reader at a time, so that an older answer never replaces a newer one.
        self._reading = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    def invalidate(self) -> None:
        """Read again at the next call. Call it after this process has changed a type."""
        self._read_at = float("-inf")
        self._invalidations += 1

    def are_known(self, names: Set[str]) -> bool:
        """Whether the cache is fresh and holds all names. If so, skip `unknown`."""
        return self._is_fresh() and names <= self._cached.keys()

    async def unknown(self, names: Collection[str]) -> set[str]:
        """Return the names that are not registered. The cache then holds all others."""
        if not self._is_fresh():
            await self._refresh()
        missing = set(names) - self._cached.keys()
        if not missing:
            return missing
        possible = [name for name in missing if is_event_type_name(name)]
        if possible:
            async with self._reading:
                await self._cache(await self._pool.fetch(_SOME, possible))
        return missing - self._cached.keys()

    def payload_violation(self, name: str, document: object) -> str | None:
        """Return the first violation of the schema that this type enforces, or None."""
        schema = self._cached[name].schema
        return schema.violation(document) if schema else None

    def enforces_schema(self, name: str) -> bool:
        """Whether payloads of this type must match a schema. Call `unknown` first."""
        return self._cached[name].schema is not None

    async def deprecated(self, names: Collection[str]) -> set[str]:
        """Return the deprecated ones among the names. Never cached."""
        possible = [name for name in names if is_event_type_name(name)]
        return {row["name"] for row in await self._pool.fetch(_DEPRECATED, possible)}

    async def _refresh(self) -> None:
        # Concurrent callers share one read and its failure. One after the other, each would wait
        # for a database that is down.
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._read_all())
            self._refreshing.add_done_callback(self._refreshed)
        await asyncio.shield(self._refreshing)

    async def _read_all(self) -> None:
        async with self._reading:
            # Before the query, because later commits may be missing from the answer.
            began, invalidations = self._clock(), self._invalidations
            await self._cache(await self._pool.fetch(_ALL))
            if invalidations == self._invalidations:
                self._read_at = began

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshing = None
        # Callers get the exception. Retrieve it here in case all of them were cancelled.
        if not task.cancelled():
            task.exception()

    def _is_fresh(self) -> bool:
        return self._clock() - self._read_at < MAX_AGE_SECONDS

    async def _cache(self, rows: Collection[Any]) -> None:
        changed = [
            row
            for row in rows
            if row["name"] not in self._cached
            or self._cached[row["name"]].revision != row["revision"]
        ]
        enforced = [row["name"] for row in changed if row["enforce_schema"]]
        schemas = await self._pool.fetch(_SCHEMAS, enforced) if enforced else []
        for row in (*(row for row in changed if not row["enforce_schema"]), *schemas):
            # Between the two queries the type may have stopped to enforce its schema.
            schema = _compiled(row) if row["enforce_schema"] else None
            self._cached[row["name"]] = _CachedType(row["revision"], schema)


def _compiled(row: Any) -> PayloadSchema | None:
    try:
        return PayloadSchema(row["json_schema"])
    except SchemaRefused as refused:
        # An older release accepted this schema. Publishing goes on without it.
        log.error("schema_unusable", event_type=row["name"], fault=str(refused))
        return None


async def list_event_types(
    sessions: Sessions, after: str | None, limit: int
) -> Sequence[EventType]:
    """Return at most `limit` types in the order of their names."""
    query = select(EventType).order_by(EventType.name).limit(limit)
    if after is not None:
        query = query.where(EventType.name > after)
    async with sessions() as session:
        return (await session.scalars(query)).all()


class EventTypeRegister:
    """Creates and updates event types. This process uses a change at once, others within 1 s."""

    def __init__(self, sessions: Sessions, event_types: EventTypes):
        self._sessions = sessions
        self._event_types = event_types

    async def create(self, draft: EventTypeDraft) -> EventType:
        """Raises InvalidArgument, or AlreadyExists if the name is taken."""
        check_name(draft.name)
        check_fields(draft)
        fields = {field: getattr(draft, field) for field in UPDATABLE_FIELDS}
        row = EventType(name=draft.name, **fields)
        try:
            async with self._sessions.begin() as session:
                session.add(row)
                record_change(
                    session,
                    action="CreateEventType",
                    resource=draft.name,
                    merchant_id=None,
                    changed_fields={"name", "description"} | {f for f in fields if fields[f]},
                )
                await session.flush()
                await session.refresh(row)
        except IntegrityError:
            raise AlreadyExists(
                f"the event type {draft.name} is registered already: change it with "
                "UpdateEventType",
                reason="EVENT_TYPE_EXISTS",
            ) from None
        self._event_types.invalidate()
        return row

    async def update(self, draft: EventTypeDraft, fields: Collection[str]) -> EventType:
        """Change the named fields. Raises InvalidArgument, or NotFound for an unknown name."""
        check_mask(fields, UPDATABLE_FIELDS)
        async with self._sessions.begin() as session:
            row = None
            if is_event_type_name(draft.name):
                query = select(EventType).where(EventType.name == draft.name).with_for_update()
                row = await session.scalar(query)
            if row is None:
                raise NotFound(
                    f"there is no event type {draft.name[:128]!r}", reason="EVENT_TYPE_NOT_FOUND"
                )
            wanted = {
                field: getattr(draft if field in fields else row, field)
                for field in UPDATABLE_FIELDS
            }
            # All fields together, because the example must match the schema.
            check_fields(EventTypeDraft(draft.name, **wanted))
            changed = [field for field in UPDATABLE_FIELDS if getattr(row, field) != wanted[field]]
            for field in changed:
                setattr(row, field, wanted[field])
            if changed:
                record_change(
                    session,
                    action="UpdateEventType",
                    resource=row.name,
                    merchant_id=None,
                    changed_fields=changed,
                )
        self._event_types.invalidate()
        return row
