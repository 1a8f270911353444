"""The registered event types as they were at most a second ago, in any process.

They are added to and changed, never removed. What is remembered is read again by the first call
after that second: publishing does not ask the database, and a change needs no message.
"""

import asyncio
import re
from collections.abc import Callable, Collection, Set
from dataclasses import dataclass
from time import monotonic
from typing import Any

import structlog

from core.errors import FieldViolation
from core.postgres.protocols import Executor
from server.event_types.schema import PayloadSchema, SchemaRefused

#: A change is honoured by every call that begins this long after its commit.
MAX_AGE_SECONDS = 1.0

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_PREFIX = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*\.\*")
_NAME_LENGTH_MAX = 128

# xmin is the transaction that wrote a row: it tells a changed row without reading its schema.
_ALL = "SELECT name, xmin::text AS revision, enforce_schema FROM event_types"
_SOME = f"{_ALL} WHERE name = ANY ($1)"
_SCHEMAS = """
SELECT name, xmin::text AS revision, enforce_schema, json_schema
FROM event_types WHERE name = ANY ($1)
"""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class KnownType:
    """An event type as last read; `schema` only while it is enforced."""

    revision: str
    schema: PayloadSchema | None


def is_event_type_name(name: str) -> bool:
    """Whether a name could be registered: dotted, lower case, at most 128 characters."""
    return len(name) <= _NAME_LENGTH_MAX and _NAME.fullmatch(name) is not None


def is_event_type_prefix(text: str) -> bool:
    """Whether it stands for every type that begins so: segments and a star, as in `payment.*`."""
    return len(text) <= _NAME_LENGTH_MAX and _PREFIX.fullmatch(text) is not None


def event_type_name(text: str) -> str:
    """The text itself; ValueError when no event type can have that name."""
    if not is_event_type_name(text):
        raise ValueError("not the name of an event type")
    return text


class EventTypes:
    """Answers which names are registered, and which schemas are enforced."""

    def __init__(self, pool: Executor, clock: Callable[[], float] = monotonic):
        self._pool = pool
        self._clock = clock
        self._known: dict[str, KnownType] = {}
        self._read_at = float("-inf")
        self._forgotten = 0
        # One reader at a time: an older answer never replaces a newer one.
        self._reading = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None

    def forget(self) -> None:
        """Read anew at the next call: this process has just changed a type."""
        self._read_at = float("-inf")
        self._forgotten += 1

    def are_known(self, names: Set[str]) -> bool:
        """Whether all of these are registered, so that nobody has to wait for unknown()."""
        return self._is_fresh() and names <= self._known.keys()

    async def unknown(self, names: Collection[str]) -> set[str]:
        """Those of `names` that nobody has registered. The others may then be asked about."""
        if not self._is_fresh():
            await self._refresh()
        missing = set(names) - self._known.keys()
        if not missing:
            return missing
        askable = [name for name in missing if is_event_type_name(name)]
        if askable:
            async with self._reading:
                await self._learn(await self._pool.fetch(_SOME, askable))
        return missing - self._known.keys()

    def payload_fault(self, name: str, document: object) -> str | None:
        """What a parsed payload breaks of the schema this type enforces; None when nothing."""
        schema = self._known[name].schema
        return schema.fault(document) if schema else None

    def enforces_schema(self, name: str) -> bool:
        """Whether payloads of this type, which unknown() has met, must match a schema."""
        return self._known[name].schema is not None

    async def deprecated(self, names: Collection[str]) -> set[str]:
        """Those of `names` that nobody may newly subscribe to; asked anew, since it changes."""
        rows = await self._pool.fetch(
            "SELECT name FROM event_types WHERE name = ANY ($1) AND deprecated",
            [name for name in names if is_event_type_name(name)],
        )
        return {row["name"] for row in rows}

    async def _refresh(self) -> None:
        # All who come meanwhile share the answer, and the failure: in a row they would wait for a
        # database that is away one after the other.
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._read_all())
            self._refreshing.add_done_callback(self._refreshed)
        await asyncio.shield(self._refreshing)

    async def _read_all(self) -> None:
        async with self._reading:
            # Before the query: what is committed after it began may not be in the answer.
            began, forgotten = self._clock(), self._forgotten
            await self._learn(await self._pool.fetch(_ALL))
            if forgotten == self._forgotten:
                self._read_at = began

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshing = None
        # Whoever waits hears of a failure; with nobody waiting it is nobody's.
        if not task.cancelled():
            task.exception()

    def _is_fresh(self) -> bool:
        return self._clock() - self._read_at < MAX_AGE_SECONDS

    async def _learn(self, rows: Collection[Any]) -> None:
        changed = [
            row
            for row in rows
            if row["name"] not in self._known
            or self._known[row["name"]].revision != row["revision"]
        ]
        enforced = [row["name"] for row in changed if row["enforce_schema"]]
        schemas = await self._pool.fetch(_SCHEMAS, enforced) if enforced else []
        for row in (*(row for row in changed if not row["enforce_schema"]), *schemas):
            self._known[row["name"]] = KnownType(
                revision=row["revision"],
                # By now it may be enforced no longer.
                schema=_compiled(row) if row["enforce_schema"] else None,
            )


def _compiled(row: Any) -> PayloadSchema | None:
    try:
        return PayloadSchema(row["json_schema"])
    except SchemaRefused as refused:
        # It was accepted once, by an older release: publishing goes on, somebody has to look.
        log.error("schema_unusable", event_type=row["name"], fault=str(refused))
        return None


def unknown_event_type(field: str, name: str) -> FieldViolation:
    """The violation for a name that is not registered."""
    return FieldViolation(
        field,
        f"{name[:128]!r} is not a registered event type; "
        "WebhookConfigService.ListEventTypes lists them",
        "EVENT_TYPE_UNKNOWN",
    )


def unknown_subscription(field: str, name: str) -> FieldViolation:
    """The violation for what a webhook config may not name: no such type, nor a prefix of any."""
    return FieldViolation(
        field,
        f"{name[:128]!r} is neither a registered event type, as "
        "WebhookConfigService.ListEventTypes lists them, nor a prefix such as 'payment.*'",
        "EVENT_TYPE_UNKNOWN",
    )


def deprecated_event_type(field: str, name: str) -> FieldViolation:
    """The violation for a new subscription to a type that is being given up."""
    return FieldViolation(
        field,
        f"{name!r} is deprecated and takes no new subscriptions; "
        "WebhookConfigService.ListEventTypes lists what there is",
        "EVENT_TYPE_DEPRECATED",
    )
