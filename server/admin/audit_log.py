"""Reads the audit log, newest first, in the order of one of its indexes."""

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

#: Ids begin with a server's time and `created_at` is the database's: how far they may be apart.
_CLOCKS_APART = timedelta(days=1)
_TEXT_MAX = 256


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """What to list; empty or None does not filter. `before` is where the page before ended."""

    actor: str
    resource: str
    start: datetime | None
    end: datetime | None
    before: UUID | None


async def list_audit_entries(
    sessions: Sessions, wanted: AuditFilter, limit: int
) -> Sequence[AuditEntry]:
    """At most `limit` entries, newest first; InvalidArgument for a filter nothing can match."""
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
    # The ids bound what is read, the times decide.
    if wanted.start is not None:
        first = first_id_at(wanted.start, -_CLOCKS_APART)
        query = query.where(AuditEntry.id >= first, AuditEntry.created_at >= wanted.start)
    if wanted.end is not None:
        last = first_id_at(wanted.end, _CLOCKS_APART)
        query = query.where(AuditEntry.id < last, AuditEntry.created_at < wanted.end)
    if wanted.before is not None:
        query = query.where(AuditEntry.id < wanted.before)
    return query
