"""Reads and changes webhook configs. Each change is one transaction with its audit entry.

Merchants' calls select by id and merchant together, so another merchant's id is unknown. No
transaction is open while a receiver is called.
"""

from collections.abc import Collection, Sequence
from datetime import timedelta
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
from server.webhooks.rules import FIELDS, check_prefix, etag_of

#: Why a merchant cannot resume a config that it did not pause.
_CANNOT_RESUME = {
    DeactivationReason.ADMIN: "the platform's operators deactivated this webhook config: ask them "
    "for the reason and to reactivate it",
    DeactivationReason.FAILURES: "this webhook config went inactive after consecutive failed "
    "deliveries: fix the receiver, then ask the platform's operators to reactivate it",
    DeactivationReason.GONE: "this webhook config went inactive because its URL answered 410 Gone: "
    "set another URL, then ask the platform's operators to reactivate it",
}


class WebhookStore:
    """Webhook configs of one merchant per call."""

    def __init__(
        self, sessions: Sessions, pool: Pool, keyring: KeyRing, max_webhooks_per_merchant: int
    ):
        self._sessions = sessions
        self._pool = pool
        self._keyring = keyring
        self._max_webhooks = max_webhooks_per_merchant

    async def get(self, merchant_id: str, text: str) -> WebhookConfig:
        """Return the config with the id `text`. Raises NotFound."""
        async with self._sessions() as session:
            return await load(session, text, merchant_id)

    async def list(
        self, merchant_id: str, after: UUID | None, limit: int
    ) -> Sequence[WebhookConfig]:
        """Return at most `limit` configs in the order of their ids."""
        query = select(WebhookConfig).where(
            WebhookConfig.merchant_id == merchant_id, WebhookConfig.deleted_at.is_(None)
        )
        if after is not None:
            query = query.where(WebhookConfig.id > after)
        async with self._sessions() as session:
            return (await session.scalars(query.order_by(WebhookConfig.id).limit(limit))).all()

    async def check_count(self, merchant_id: str) -> None:
        """Raise QuotaExceeded if the merchant has reached its limit of configs."""
        async with self._sessions() as session:
            await self._check_count(session, merchant_id)

    async def insert(
        self, webhook_id: UUID, merchant_id: str, draft: WebhookConfig, secret: str
    ) -> WebhookConfig:
        """Complete and store the draft. Raises QuotaExceeded."""
        row = draft
        row.id = webhook_id
        row.merchant_id = merchant_id
        row.secret_key_id, row.secret_ciphertext = self._keyring.encrypt(secret, webhook_id)
        row.public_key = public_key(secret)
        row.deactivation_reason = None if draft.active else DeactivationReason.PAUSED
        async with self._sessions.begin() as session:
            # Serialises the creates of a merchant across processes, so that the count holds.
            await session.execute(
                select(func.pg_advisory_xact_lock(func.hashtextextended(merchant_id, 0)))
            )
            await self._check_count(session, merchant_id)
            session.add(row)
            _record(session, "CreateWebhookConfig", row, FIELDS)
            await session.flush()
            await session.refresh(row)
        return row

    async def update(
        self,
        merchant_id: str,
        text: str,
        draft: WebhookConfig,
        *,
        fields: Collection[str],
        etag: str,
    ) -> WebhookConfig:
        """Copy the named fields of the draft to the config.

        Raises NotFound, Aborted, InvalidArgument, or FailedPrecondition if the merchant may not
        resume the config.
        """
        async with self._sessions.begin() as session:
            row = await load(session, text, merchant_id, lock=True)
            check_etag(row, etag)
            changed = [
                field
                for name, field in FIELDS.items()
                if name in fields and getattr(row, field.column) != getattr(draft, field.column)
            ]
            names = [field.name for field in changed]
            if "active" in names:
                _check_resumable(row)
                row.deactivation_reason = None if draft.active else DeactivationReason.PAUSED
                names.append("deactivation_reason")
            for field in changed:
                setattr(row, field.column, getattr(draft, field.column))
            if not {"headers", "header_prefix"}.isdisjoint(fields):
                # A concurrent update may have changed the other one of the two.
                check_prefix(row)
            if not changed:
                return row
            if "url" in names or ("active" in names and row.active):
                # The breaker's failures belong to the old URL, or the merchant has fixed the cause.
                row.breaker_open_until = None
                row.breaker_trips = 0
            _changed(session, "UpdateWebhookConfig", row, names)
            await session.flush()
            if "active" in names and not row.active:
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
        """Replace the secret and return the new one. None keeps the signature scheme.

        The previous secret signs as well during the overlap. A secret that was retired before it
        stops signing at once.
        """
        async with self._sessions.begin() as session:
            row = await load(session, text, merchant_id, lock=True)
            if overlap_seconds > 0:
                row.previous_secret_ciphertext = row.secret_ciphertext
                row.previous_secret_key_id = row.secret_key_id
                row.previous_secret_expires_at = func.now() + timedelta(seconds=overlap_seconds)
                row.previous_public_key = row.public_key
            else:
                _forget_previous_secret(row)
            current = SignatureScheme.ED25519 if row.public_key else SignatureScheme.HMAC_SHA256
            secret = new_secret(scheme or current)
            row.secret_key_id, row.secret_ciphertext = self._keyring.encrypt(secret, row.id)
            row.public_key = public_key(secret)
            names = ["secret"] if scheme in {None, current} else ["secret", "signature_scheme"]
            _changed(session, "RotateSecret", row, names)
            await session.flush()
            await session.refresh(row)
        return row, secret

    async def close_breaker(self, webhook_id: UUID) -> None:
        """Close the config's breaker after a successful ping."""
        async with self._sessions.begin() as session:
            await queue.close_breakers(await driver_connection(session), [webhook_id])

    async def delete(self, merchant_id: str, text: str) -> int:
        """Delete the config and return the number of cancelled deliveries. None is sent after."""
        async with self._sessions.begin() as session:
            row = await load(session, text, merchant_id, lock=True)
            row.deleted_at = func.now()
            row.version += 1
            row.secret_ciphertext = b""
            _forget_previous_secret(row)
            _record(session, "DeleteWebhookConfig", row)
        return await queue.cancel_webhook(self._pool, row.id)

    async def _check_count(self, session: AsyncSession, merchant_id: str) -> None:
        count = await session.scalar(
            select(func.count())
            .select_from(WebhookConfig)
            .where(WebhookConfig.merchant_id == merchant_id, WebhookConfig.deleted_at.is_(None))
        )
        if (count or 0) >= self._max_webhooks:
            raise QuotaExceeded(
                f"this merchant has {count} webhook configs, which is the limit: delete one, or "
                "add event types to an existing one",
                reason="WEBHOOK_CONFIG_LIMIT",
                subject=f"merchant:{merchant_id}",
            )


async def load(
    session: AsyncSession, text: str, merchant_id: str | None = None, *, lock: bool = False
) -> WebhookConfig:
    """Return the config with the id `text`, of this merchant unless None. Raises NotFound."""
    query = select(WebhookConfig).where(
        WebhookConfig.id == id_of("wh", text), WebhookConfig.deleted_at.is_(None)
    )
    if merchant_id is not None:
        query = query.where(WebhookConfig.merchant_id == merchant_id)
    row = await session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise not_found("wh", text)
    return row


def check_etag(row: WebhookConfig, etag: str) -> None:
    """Raise Aborted if the etag is of another version. An empty etag skips the check."""
    if etag and etag != etag_of(row):
        raise Aborted(
            "the webhook config has changed since it was read: get it again and repeat the change "
            "with its new etag",
            reason="ETAG_MISMATCH",
        )


def _check_resumable(row: WebhookConfig) -> None:
    if row.deactivation_reason in _CANNOT_RESUME:
        raise FailedPrecondition(
            _CANNOT_RESUME[DeactivationReason(row.deactivation_reason)],
            reason="WEBHOOK_CONFIG_DEACTIVATED",
        )


def _changed(
    session: AsyncSession, action: str, row: WebhookConfig, fields: Collection[str]
) -> None:
    row.version += 1
    row.updated_at = func.now()
    _record(session, action, row, fields)


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
