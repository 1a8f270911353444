"""An event as its producer sends it, and the rules that its fields must keep."""

import re
from collections.abc import Set
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import NamedTuple

import orjson

from core.errors import FieldViolation
from server.event_types.rules import unknown_event_type
from server.event_types.store import EventTypes
from server.rpc.ids import is_merchant_id, wrong_merchant_id

#: Of idempotency and of ordering.
_KEY = re.compile(r"[ -~]{1,128}")
# ASCII, since ignoring case alone takes ſ for s and the Kelvin sign for k.
_ANY_CASE = re.ASCII | re.IGNORECASE
_CONTENT_TYPE = re.compile(r"[a-z0-9.+-]+/[a-z0-9.+-]+(; ?charset=[a-z0-9-]+)?", _ANY_CASE)
_JSON_TYPE = re.compile(r"application/(json|[a-z0-9.-]+\+json)\b", _ANY_CASE)
DEFAULT_CONTENT_TYPE = "application/json"
_NOT_BEFORE_MAX = timedelta(days=30)


class EventDraft(NamedTuple):
    """An event as a producer sent it, nothing of it checked; `payload` None when there was none."""

    merchant_id: str
    type: str
    content_type: str
    payload: bytes | None
    idempotency_key: str
    #: `datetime.max` stands for a time that is none.
    not_before: datetime | None = None
    ordering_key: str = ""


class EventRules:
    """The rules of one server: its largest payload, and the schemas that types enforce."""

    def __init__(self, event_types: EventTypes, max_payload_bytes: int):
        self._event_types = event_types
        self._max_payload_bytes = max_payload_bytes

    def violations(self, draft: EventDraft, unknown_types: Set[str]) -> list[FieldViolation]:
        """What is wrong with the draft, by its own fields; nothing when it is accepted.

        `unknown_types` are those of its call that may not be published.
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
                f"has {len(draft.payload)} bytes, at most {self._max_payload_bytes} are accepted: "
                "send a smaller payload that says where the rest is"
            )
            return [FieldViolation("payload", description, "PAYLOAD_TOO_LARGE")]
        document = None
        if is_json:
            try:
                document = orjson.loads(draft.payload)
            except orjson.JSONDecodeError as error:
                # The error tells rule and place, and nothing of the payload.
                description = (
                    f"is not JSON, which its content type {content_type} says it is: {error}"
                )
                return [FieldViolation("payload", description, "PAYLOAD_NOT_JSON")]
        fault = None
        if is_known and self._event_types.enforces_schema(draft.type):
            # A schema says nothing of what is not JSON, so that does not pass it.
            fault = f"it is {content_type}, not JSON"
            if is_json:
                fault = self._event_types.payload_fault(draft.type, document)
        if fault is None:
            return []
        description = f"does not match the schema of {draft.type}: {fault}"
        return [FieldViolation("payload", description, "PAYLOAD_SCHEMA")]


@lru_cache(maxsize=256)
def _is_json(content_type: str) -> bool | None:
    """Whether payloads of this type are JSON; None when it is no media type at all."""
    if not _CONTENT_TYPE.fullmatch(content_type):
        return None
    return _JSON_TYPE.match(content_type) is not None
