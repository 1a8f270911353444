"""The registered event types, remembered once seen: they are added to and never removed."""

import re
from collections.abc import Collection

from core.db import Pool
from core.errors import FieldViolation

_NAME = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_PREFIX = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*\.\*")
_NAME_LENGTH_MAX = 128


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
    """Answers which names are registered, asking the database only about new ones."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._known: set[str] = set()

    async def unknown(self, names: Collection[str]) -> set[str]:
        """Those of `names` that nobody has registered."""
        missing = set(names) - self._known
        askable = [name for name in missing if is_event_type_name(name)]
        if askable:
            rows = await self._pool.fetch(
                "SELECT name FROM event_types WHERE name = ANY ($1)", askable
            )
            self._known.update(row["name"] for row in rows)
            missing -= self._known
        return missing

    async def deprecated(self, names: Collection[str]) -> set[str]:
        """Those of `names` that nobody may newly subscribe to; asked anew, since it changes."""
        rows = await self._pool.fetch(
            "SELECT name FROM event_types WHERE name = ANY ($1) AND deprecated",
            [name for name in names if is_event_type_name(name)],
        )
        return {row["name"] for row in rows}


def unknown_event_type(field: str, name: str) -> FieldViolation:
    """The violation for a name that is not registered."""
    return FieldViolation(
        field,
        f"{name[:128]!r} is not a registered event type; "
        "WebhookConfigService.ListEventTypes lists them",
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
