"""Reads the audit log, newest first, in the order of an index."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import Select, select

from core.errors import InvalidArgument
from core.ids import first_id_at
from core.models import AuditEntry
from server.database import Sessions

#: Upper bound between the server's clock (in an id) and the database's clock (`created_at`).
_CLOCK_SKEW_MAX = timedelta(days=1)
_TEXT_MAX = 256


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """The entries to list. Empty or None does not filter. `before` is the last id of a page."""

    actor: str
    resource: str
    start: datetime | None
    end: datetime | None
    before: UUID | None


async def list_audit_entries(
    sessions: Sessions, wanted: AuditFilter, limit: int
) -> Sequence[AuditEntry]:
    """Return at most `limit` entries, newest first. Raises InvalidArgument for a bad filter."""
    async with sessions() as session:
        return (await session.scalars(_page(wanted, limit))).all()


def _page(wanted: AuditFilter, limit: int) -> Select[Any]:
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    for field, column in (("actor", AuditEntry.actor), ("resource", AuditEntry.resource)):
        text = getattr(wanted, field)
        if len(text) > _TEXT_MAX or not text.isprintable():
            raise InvalidArgument.of(
                field, f"must be at most {_TEXT_MAX} printable characters", reason="FILTER_INVALID"
            )
        if text:
            query = query.where(column == text)
    # The ids limit the rows that are read. The times are exact.
    if wanted.start is not None:
        first = first_id_at(wanted.start, -_CLOCK_SKEW_MAX)
        query = query.where(AuditEntry.id >= first, AuditEntry.created_at >= wanted.start)
    if wanted.end is not None:
        last = first_id_at(wanted.end, _CLOCK_SKEW_MAX)
        query = query.where(AuditEntry.id < last, AuditEntry.created_at < wanted.end)
    if wanted.before is not None:
        query = query.where(AuditEntry.id < wanted.before)
    return query
