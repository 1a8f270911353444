"""The changes of webhook configs: each is one transaction with its audit entry.

A merchant's config is found by its id and its merchant together, so another merchant's id is an
unknown one. No transaction here waits for a receiver.
"""

from collections.abc import Collection
from datetime import timedelta
from typing import Any
from uuid import UUID

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from core import queue
from core.encryption import KeyRing
from core.errors import Aborted, FailedPrecondition, QuotaExceeded
from core.ids import format_id
from core.lifecycle import DeactivationReason
from core.models import WebhookConfig
from core.postgres.protocols import Pool
from core.signing import SignatureScheme, new_secret, public_key
from server.database import Sessions, driver_connection
from server.rpc.audit import record_change
from server.rpc.ids import id_of, not_found
from server.webhooks.convert import etag_of
from server.webhooks.rules import UPDATABLE_FIELDS, WebhookDraft, check_prefix

#: Columns whose name says their unit, which their field's does not.
_UNIT = "_seconds"


class WebhookChanges:
    """Creates, updates, rotates and deletes, always for one merchant."""

    def __init__(
        self, sessions: Sessions, pool: Pool, keyring: KeyRing, max_webhooks_per_merchant: int
    ):
        self._sessions = sessions
        self._pool = pool
        self._keyring = keyring
        self._max_webhooks = max_webhooks_per_merchant

    async def require_room(self, merchant_id: str) -> None:
        """QuotaExceeded when the merchant has all the configs it may have."""
        async with self._sessions() as session:
            await self._require_room(session, merchant_id)

    async def insert(
        self, webhook_id: UUID, merchant_id: str, url: str, draft: WebhookDraft, secret: str
    ) -> WebhookConfig:
        key_id, ciphertext = self._keyring.encrypt(secret, webhook_id)
        async with self._sessions.begin() as session:
            # One create of a merchant at a time from here on, in any process: the count holds.
            await session.execute(
                select(func.pg_advisory_xact_lock(func.hashtextextended(merchant_id, 0)))
            )
            await self._require_room(session, merchant_id)
            row = WebhookConfig(
                id=webhook_id,
                merchant_id=merchant_id,
                secret_ciphertext=ciphertext,
                secret_key_id=key_id,
                public_key=public_key(secret),
                active=draft.active,
                deactivation_reason=None if draft.active else DeactivationReason.PAUSED,
                **_values(url, draft, UPDATABLE_FIELDS),
            )
            session.add(row)
            _record(session, "CreateWebhookConfig", row, UPDATABLE_FIELDS)
            await session.flush()
            await session.refresh(row)
        return row

    async def update(
        self,
        merchant_id: str,
        text: str,
        url: str,
        draft: WebhookDraft,
        *,
        fields: Collection[str],
        etag: str,
    ) -> WebhookConfig:
        async with self._sessions.begin() as session:
            row = await load(session, merchant_id, text, lock=True)
            check_etag(row, etag)
            if not {"headers", "header_prefix"}.isdisjoint(fields):
                # Of two updates at once, the second meets here what the first made of the other.
                check_prefix(
                    draft.header_prefix if "header_prefix" in fields else row.header_prefix,
                    draft.headers if "headers" in fields else row.headers,
                )
            changed = _changes(row, url, draft, fields)
            for column, value in changed.items():
                setattr(row, column, value)
            if not changed:
                return row
            if "url" in changed or changed.get("active"):
                # What was held against it may be over: it was pinged, or somebody says so.
                row.breaker_open_until = None
                row.breaker_trips = 0
            row.version += 1
            row.updated_at = func.now()
            names = [column.removesuffix(_UNIT) for column in changed]
            _record(session, "UpdateWebhookConfig", row, names)
            await session.flush()
            if changed.get("active") is False:
                await queue.park_webhooks(await driver_connection(session), [row.id])
            await session.refresh(row)
        return row

    async def rotate(
        self,
        merchant_id: str,
        text: str,
        scheme: SignatureScheme | None,
        overlap_seconds: float,
    ) -> tuple[WebhookConfig, str]:
        """Make a new secret the one that signs, None: by the scheme before, and return it, too.

        The one before signs beside it for the overlap.

        A secret that was retired earlier signs no more: of two overlaps the latest counts.
        """
        async with self._sessions.begin() as session:
            row = await load(session, merchant_id, text, lock=True)
            if overlap_seconds > 0:
                row.previous_secret_ciphertext = row.secret_ciphertext
                row.previous_secret_key_id = row.secret_key_id
                row.previous_secret_expires_at = func.now() + timedelta(seconds=overlap_seconds)
                row.previous_public_key = row.public_key
            else:
                _forget_previous_secret(row)
            present = SignatureScheme.ED25519 if row.public_key else SignatureScheme.HMAC_SHA256
            secret = new_secret(scheme or present)
            row.secret_key_id, row.secret_ciphertext = self._keyring.encrypt(secret, row.id)
            row.public_key = public_key(secret)
            row.version += 1
            row.updated_at = func.now()
            changed = ["secret"] if scheme in {None, present} else ["secret", "signature_scheme"]
            _record(session, "RotateSecret", row, changed)
            await session.flush()
            await session.refresh(row)
        return row, secret

    async def found_working(self, webhook_id: UUID) -> None:
        """A ping came through: what its breaker holds back may go out."""
        async with self._sessions.begin() as session:
            await queue.close_breakers(await driver_connection(session), [webhook_id])

    async def delete(self, merchant_id: str, text: str) -> int:
        """Returns how many deliveries were cancelled; from its commit on none is sent."""
        async with self._sessions.begin() as session:
            row = await load(session, merchant_id, text, lock=True)
            row.deleted_at = func.now()
            row.version += 1
            # Nothing will be signed for it again.
            row.secret_ciphertext = b""
            _forget_previous_secret(row)
            _record(session, "DeleteWebhookConfig", row)
        return await queue.cancel_webhook(self._pool, row.id)

    async def _require_room(self, session: AsyncSession, merchant_id: str) -> None:
        count = await session.scalar(
            select(func.count())
            .select_from(WebhookConfig)
            .where(WebhookConfig.merchant_id == merchant_id, WebhookConfig.deleted_at.is_(None))
        )
        if (count or 0) >= self._max_webhooks:
            raise QuotaExceeded(
                f"this merchant has {count} webhook configs, the most there can be: delete one, or "
                "add event types to an existing one",
                reason="WEBHOOK_CONFIG_LIMIT",
                subject=f"merchant:{merchant_id}",
            )


async def load(
    session: AsyncSession, merchant_id: str, text: str, *, lock: bool = False
) -> WebhookConfig:
    """The merchant's config with this id; NotFound for every other id."""
    query = select(WebhookConfig).where(
        WebhookConfig.id == id_of("wh", text),
        WebhookConfig.merchant_id == merchant_id,
        WebhookConfig.deleted_at.is_(None),
    )
    row = await session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise not_found("wh", text)
    return row


def check_etag(row: WebhookConfig, etag: str) -> None:
    """Aborted when the caller read another version; an empty etag asks for no check."""
    if etag and etag != etag_of(row):
        raise Aborted(
            "the webhook config has changed since it was read: get it again and repeat the change "
            "with its new etag",
            reason="ETAG_MISMATCH",
        )


def _record(
    session: AsyncSession, action: str, row: WebhookConfig, changed_fields: Collection[str] = ()
) -> None:
    record_change(
        session,
        action=action,
        resource=format_id("wh", row.id),
        merchant_id=row.merchant_id,
        changed_fields=changed_fields,
    )


def _forget_previous_secret(row: WebhookConfig) -> None:
    row.previous_secret_ciphertext = None
    row.previous_secret_key_id = None
    row.previous_secret_expires_at = None
    row.previous_public_key = None


def _values(url: str, draft: WebhookDraft, fields: Collection[str]) -> dict[str, Any]:
    """Column values of the named fields, but `active`, which has rules of its own."""
    values = {
        "url": url,
        "events": list(draft.events),
        "description": draft.description,
        "retry_schedule_seconds": list(draft.retry_schedule_seconds),
        "headers": dict(draft.headers),
        "timeout_seconds": draft.timeout_seconds,
        "rate_limit": draft.rate_limit,
        "max_in_flight": draft.max_in_flight,
        "ordered": draft.ordered,
        "header_prefix": draft.header_prefix,
    }
    return {name: value for name, value in values.items() if name.removesuffix(_UNIT) in fields}


def _changes(
    row: WebhookConfig, url: str, draft: WebhookDraft, fields: Collection[str]
) -> dict[str, Any]:
    """New column values, only where they differ; FailedPrecondition where the merchant may not."""
    wanted = _values(url, draft, fields)
    if "active" in fields and draft.active != row.active:
        if row.deactivation_reason == DeactivationReason.ADMIN:
            raise FailedPrecondition(
                "the platform's operators deactivated this webhook config; ask them why, and to "
                "reactivate it",
                reason="WEBHOOK_CONFIG_DEACTIVATED",
            )
        if row.deactivation_reason == DeactivationReason.FAILURES:
            raise FailedPrecondition(
                "this webhook config went inactive after consecutive failed deliveries; mend the "
                "receiver, then ask the platform's operators to reactivate it",
                reason="WEBHOOK_CONFIG_DEACTIVATED",
            )
        if row.deactivation_reason == DeactivationReason.GONE:
            raise FailedPrecondition(
                "this webhook config went inactive because its URL answered 410 Gone; give it "
                "another URL, then ask the platform's operators to reactivate it",
                reason="WEBHOOK_CONFIG_DEACTIVATED",
            )
        wanted["active"] = draft.active
        wanted["deactivation_reason"] = None if draft.active else DeactivationReason.PAUSED
    return {column: value for column, value in wanted.items() if getattr(row, column) != value}
