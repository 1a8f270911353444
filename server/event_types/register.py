"""The register of event types: what one may be, and its changes with their audit entries."""

from collections.abc import Collection
from dataclasses import dataclass

import orjson
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from core.errors import AlreadyExists, FieldViolation, InvalidArgument, NotFound
from core.models import EventType
from server.database import Sessions
from server.event_types.cache import EventTypes, is_event_type_name
from server.event_types.schema import PayloadSchema, SchemaRefused
from server.rpc.audit import record_change
from server.rpc.validation import check_mask
from server.webhooks.rules import description_violations

UPDATABLE_FIELDS = ("description", "json_schema", "enforce_schema", "example", "deprecated")

#: As much as a payload may have by default.
_EXAMPLE_BYTES_MAX = 256 * 1024


@dataclass(frozen=True, slots=True)
class EventTypeDraft:
    """An event type as an operator sent it, nothing of it checked."""

    name: str
    description: str = ""
    json_schema: str = ""
    enforce_schema: bool = False
    example: str = ""
    deprecated: bool = False


class EventTypeRegister:
    """What is changed here is honoured by this process at once, by others within a second."""

    def __init__(self, sessions: Sessions, event_types: EventTypes):
        self._sessions = sessions
        self._event_types = event_types

    async def create(self, draft: EventTypeDraft) -> EventType:
        if not is_event_type_name(draft.name):
            raise InvalidArgument.of(
                "event_type.name",
                "must be words of a-z 0-9 _ joined by dots, such as payment.succeeded, at most 128 "
                "characters",
                reason="EVENT_TYPE_NAME_INVALID",
            )
        _check(draft)
        row = EventType(name=draft.name)
        for field in UPDATABLE_FIELDS:
            setattr(row, field, getattr(draft, field))
        given = {field for field in UPDATABLE_FIELDS if getattr(draft, field)}
        try:
            async with self._sessions.begin() as session:
                session.add(row)
                record_change(
                    session,
                    action="CreateEventType",
                    resource=draft.name,
                    merchant_id=None,
                    changed_fields={"name", "description"} | given,
                )
                await session.flush()
                await session.refresh(row)
        except IntegrityError:
            raise AlreadyExists(
                f"the event type {draft.name} is registered already: change it with "
                "UpdateEventType",
                reason="EVENT_TYPE_EXISTS",
            ) from None
        self._event_types.forget()
        return row

    async def update(self, draft: EventTypeDraft, fields: Collection[str]) -> EventType:
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
            # As a whole: an example must match the schema, whichever of the two is new.
            _check(EventTypeDraft(name=draft.name, **wanted))
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
        self._event_types.forget()
        return row


def _check(draft: EventTypeDraft) -> None:
    """InvalidArgument with every violation."""
    violations = description_violations("event_type.description", draft.description)
    schema = None
    if draft.json_schema:
        try:
            schema = PayloadSchema(draft.json_schema)
        except SchemaRefused as refused:
            violations.append(
                FieldViolation("event_type.json_schema", str(refused), "JSON_SCHEMA_INVALID")
            )
    elif draft.enforce_schema:
        violations.append(
            FieldViolation(
                "event_type.enforce_schema",
                "needs a schema to enforce: set json_schema, too",
                "JSON_SCHEMA_MISSING",
            )
        )
    if draft.example:
        violations += _example_violations(draft.example, schema)
    if violations:
        raise InvalidArgument(*violations)


def _example_violations(example: str, schema: PayloadSchema | None) -> list[FieldViolation]:
    field = "event_type.example"
    if len(example.encode()) > _EXAMPLE_BYTES_MAX:
        text = f"has more than {_EXAMPLE_BYTES_MAX} bytes"
        return [FieldViolation(field, text, "EXAMPLE_INVALID")]
    try:
        document = orjson.loads(example)
    except orjson.JSONDecodeError as error:
        return [FieldViolation(field, f"is not JSON: {error}", "EXAMPLE_INVALID")]
    if schema and (fault := schema.fault(document)):
        text = f"does not match json_schema: {fault}"
        return [FieldViolation(field, text, "EXAMPLE_INVALID")]
    return []
