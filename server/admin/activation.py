"""Deactivates, reactivates and lists webhook configs of all merchants, for operators."""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core import queue
from core.errors import InvalidArgument
from core.ids import format_id
from core.lifecycle import DeactivationReason
from core.models import WebhookConfig
from server.database import Sessions, driver_connection
from server.rpc.audit import record_change
from server.webhooks.store import load

_REASON_MAX = 500


def check_reason(reason: str) -> None:
    """Raise InvalidArgument unless the reason is printable text of bounded length."""
    if not (0 < len(reason) <= _REASON_MAX and reason.isprintable() and reason.strip()):
        raise InvalidArgument.of(
            "reason",
            f"must be 1 to {_REASON_MAX} printable characters, for the audit log",
            reason="REASON_INVALID",
        )


async def deactivate(sessions: Sessions, text: str, reason: str) -> WebhookConfig:
    """Deactivate a config and park its ready deliveries. Raises NotFound."""
    async with sessions.begin() as session:
        row = await load(session, text, lock=True)
        if row.deactivation_reason == DeactivationReason.ADMIN:
            return row
        changed = {"deactivation_reason"} | ({"active"} if row.active else set())
        row.active = False
        row.deactivation_reason = DeactivationReason.ADMIN
        await _finish(session, row, "DeactivateWebhookConfig", changed, reason)
        await queue.park_webhooks(await driver_connection(session), [row.id])
    return row


async def reactivate(sessions: Sessions, text: str) -> WebhookConfig:
    """Activate a config and reset its failure count and its breaker. Raises NotFound."""
    async with sessions.begin() as session:
        row = await load(session, text, lock=True)
        if row.active:
            return row
        row.active = True
        row.deactivation_reason = None
        row.consecutive_failures = 0
        row.breaker_open_until = None
        row.breaker_trips = 0
        changed = {"active", "consecutive_failures", "deactivation_reason"}
        await _finish(session, row, "ReactivateWebhookConfig", changed, "")
    return row


@dataclass(frozen=True, slots=True)
class WebhookConfigFilter:
    """The configs to list. Empty or None does not filter. `before` is the last id of a page."""

    merchant_id: str
    inactive_only: bool
    deactivation: DeactivationReason | None
    before: UUID | None


async def list_webhook_configs(
    sessions: Sessions, wanted: WebhookConfigFilter, limit: int
) -> Sequence[WebhookConfig]:
    """Return at most `limit` configs of all merchants, newest first."""
    query = select(WebhookConfig).where(WebhookConfig.deleted_at.is_(None))
    if wanted.merchant_id:
        query = query.where(WebhookConfig.merchant_id == wanted.merchant_id)
    if wanted.inactive_only or wanted.deactivation:
        query = query.where(~WebhookConfig.active)
    if wanted.deactivation:
        query = query.where(WebhookConfig.deactivation_reason == wanted.deactivation)
    if wanted.before is not None:
        query = query.where(WebhookConfig.id < wanted.before)
    async with sessions() as session:
        return (await session.scalars(query.order_by(WebhookConfig.id.desc()).limit(limit))).all()


async def _finish(
    session: AsyncSession, row: WebhookConfig, action: str, changed: set[str], reason: str
) -> None:
    row.version += 1
    row.updated_at = func.now()
    record_change(
        session,
        action=action,
        resource=format_id("wh", row.id),
        merchant_id=row.merchant_id,
        changed_fields=changed,
        comment=reason,
    )
    await session.flush()
    await session.refresh(row)
