"""Rules for the fields of a published event."""

import re
from collections.abc import Set
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

import orjson

from core.errors import FieldViolation
from core.ids import is_merchant_id
from server.event_types.rules import unknown_event_type
from server.event_types.store import EventTypes
from server.rpc.ids import wrong_merchant_id

#: Idempotency keys and ordering keys.
_KEY = re.compile(r"[ -~]{1,128}")
# ASCII, because IGNORECASE alone matches ſ as s and the Kelvin sign as k.
_ANY_CASE = re.ASCII | re.IGNORECASE
_CONTENT_TYPE = re.compile(r"[a-z0-9.+-]+/[a-z0-9.+-]+(; ?charset=[a-z0-9-]+)?", _ANY_CASE)
_JSON_TYPE = re.compile(r"application/(json|[a-z0-9.-]+\+json)\b", _ANY_CASE)
DEFAULT_CONTENT_TYPE = "application/json"
_NOT_BEFORE_MAX = timedelta(days=30)


class EventDraft(NamedTuple):
    """An unchecked event. `payload` is None if the producer sent none."""

    merchant_id: str
    type: str
    content_type: str
    payload: bytes | None
    idempotency_key: str
    #: `datetime.max` stands for an invalid time.
    not_before: datetime | None = None
    ordering_key: str = ""


class EventRules:
    """The rules of one server, with its payload limit and the schemas of event types."""

    def __init__(self, event_types: EventTypes, max_payload_bytes: int):
        self._event_types = event_types
        self._max_payload_bytes = max_payload_bytes

    def violations(self, draft: EventDraft, unknown_types: Set[str]) -> list[FieldViolation]:
        """Return the violations of the draft, by field. Empty if it is accepted.

        `unknown_types` are the types of the call that are not registered.
        """
        found = []
        if not is_merchant_id(draft.merchant_id):
            found.append(wrong_merchant_id("merchant_id"))
        is_known = draft.type not in unknown_types
        if not is_known:
            found.append(unknown_event_type("type", draft.type))
        description = "must be at most 128 printable ASCII characters"
        if draft.idempotency_key and not _KEY.fullmatch(draft.idempotency_key):
            found.append(FieldViolation("idempotency_key", description, "IDEMPOTENCY_KEY_INVALID"))
        if draft.ordering_key and not _KEY.fullmatch(draft.ordering_key):
            found.append(FieldViolation("ordering_key", description, "ORDERING_KEY_INVALID"))
        if draft.not_before and draft.not_before > datetime.now(UTC) + _NOT_BEFORE_MAX:
            found.append(
                FieldViolation(
                    "not_before",
                    "must be a time at most 30 days ahead, or unset to deliver at once",
                    "NOT_BEFORE_INVALID",
                )
            )
        found += self._payload_violations(draft, is_known)
        return found

    def _payload_violations(self, draft: EventDraft, is_known: bool) -> list[FieldViolation]:
        content_type = draft.content_type or DEFAULT_CONTENT_TYPE
        is_json = _is_json(content_type) if len(content_type) <= 128 else None
        if is_json is None:
            description = "must be a media type such as application/json, or empty for that"
            return [FieldViolation("content_type", description, "CONTENT_TYPE_INVALID")]
        if draft.payload is None:
            description = "is required: set payload (bytes) or payload_text"
            return [FieldViolation("payload", description, "PAYLOAD_MISSING")]
        if len(draft.payload) > self._max_payload_bytes:
            description = (
                f"has {len(draft.payload)} bytes, the limit is {self._max_payload_bytes}: send a "
                "smaller payload with a link to the rest"
            )
            return [FieldViolation("payload", description, "PAYLOAD_TOO_LARGE")]
        document = None
        if is_json:
            try:
                document = orjson.loads(draft.payload)
            except orjson.JSONDecodeError as error:
                # The error has the rule and the position, and no part of the payload.
                description = f"is not valid JSON, but its content type is {content_type}: {error}"
                return [FieldViolation("payload", description, "PAYLOAD_NOT_JSON")]
        problem = None
        if is_known and self._event_types.enforces_schema(draft.type):
            # A payload that is not JSON cannot match a schema.
            problem = f"it is {content_type}, not JSON"
            if is_json:
                problem = self._event_types.payload_violation(draft.type, document)
        if problem is None:
            return []
        description = f"does not match the schema of {draft.type}: {problem}"
        return [FieldViolation("payload", description, "PAYLOAD_SCHEMA")]


@lru_cache(maxsize=256)
def _is_json(content_type: str) -> bool | None:
    """Return whether payloads of this type are JSON, or None for a malformed media type."""
    if not _CONTENT_TYPE.fullmatch(content_type):
        return None
    return _JSON_TYPE.match(content_type) is not None
