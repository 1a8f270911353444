"""Writes the audit log: one entry per change, in the transaction of the change."""

from collections.abc import Iterable

from sqlalchemy.ext.asyncio import AsyncSession

from core.ids import new_id
from core.models import AuditEntry
from server.rpc.authenticate import principal
from server.rpc.call import current_call, origin


def record_change(
    session: AsyncSession,
    *,
    action: str,
    resource: str,
    merchant_id: str | None,
    changed_fields: Iterable[str] = (),
    comment: str = "",
) -> None:
    """Add the entry to the transaction of the session."""
    call = current_call()
    source = origin(call)
    session.add(
        AuditEntry(
            id=new_id(),
            actor=principal().subject,
            merchant_id=merchant_id,
            action=action,
            resource=resource,
            result="OK",
            changed_fields=sorted(changed_fields),
            comment=comment,
            request_id=call.request_id,
            caller_address=source.address,
            user_agent=source.user_agent,
        )
    )
