"""The webhook configs as an engine needs them, decrypted and cached by version.

A claim names the version of each config at that moment, so a change is honoured by the next claim
without any invalidation message.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any
from uuid import UUID

import orjson
import structlog

from core.encryption import KeyRing, UndecryptableSecret
from core.postgres.protocols import Pool
from core.queue import LeasedDelivery
from core.urls import UrlPolicy, UrlRefused, parse_webhook_url
from delivery.http.request import Destination

_LOAD = """
SELECT id, version, url, secret_ciphertext, secret_key_id, previous_secret_ciphertext,
    previous_secret_key_id, previous_secret_expires_at, retry_schedule_seconds, headers,
    header_prefix, timeout_seconds, rate_limit, max_in_flight
FROM webhook_configs WHERE id = ANY ($1)
"""

_FORGET_EXPIRED_SECRETS = """
UPDATE webhook_configs c
SET previous_secret_ciphertext = NULL, previous_secret_key_id = NULL,
    previous_secret_expires_at = NULL, previous_public_key = NULL
FROM (
    SELECT id FROM webhook_configs WHERE previous_secret_expires_at <= now()
    FOR NO KEY UPDATE SKIP LOCKED
) expired
WHERE c.id = expired.id
"""

#: Configs kept in memory; past this the cache starts anew, which costs one query per claim.
_CACHE_SIZE = 50_000

#: Longer than any wait that a call of ours stores; NaN is no less and no more.
_WAIT_SECONDS_MAX = 86_400.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Webhook:
    """One version of a webhook config; `secret` is None when no key of ours reads it."""

    id: UUID
    version: int
    #: None when the stored URL does not pass: settings became stricter, or this release did, or
    #: other hands than ours stored it.
    destination: Destination | None
    #: Then, for the merchant, why.
    url_refusal: str
    secret: str | None = field(repr=False)
    #: The secret before, which signs beside it until then; it may be gone or past.
    previous_secret: str | None = field(repr=False)
    previous_secret_expires_at: datetime | None
    #: Under which id, timestamp and signature are sent, too; empty: under no other.
    header_prefix: str
    retry_schedule_seconds: Sequence[float]
    #: None and 0: as the operator set it; a rate of 0: as fast as it can take.
    timeout_seconds: float | None
    rate_limit: float
    max_in_flight: int

    def signing_secrets(self, at: datetime) -> list[str]:
        """What signs an attempt at that time of the database, the present secret first."""
        expires_at = self.previous_secret_expires_at
        overlaps = expires_at is not None and at < expires_at
        return [s for s in (self.secret, self.previous_secret if overlaps else None) if s]


class WebhookCache:
    """Loads what a batch of claimed deliveries needs in at most one query."""

    def __init__(self, pool: Pool, keyring: KeyRing, url_policy: UrlPolicy):
        self._pool = pool
        self._keyring = keyring
        self._url_policy = url_policy
        self._webhooks: dict[UUID, Webhook] = {}

    async def for_deliveries(self, deliveries: Collection[LeasedDelivery]) -> dict[UUID, Webhook]:
        """The config of each delivery, at the version of the claim or newer."""
        missing = {d.webhook_id for d in deliveries if not self._is_cached(d)}
        if missing:
            if len(self._webhooks) > _CACHE_SIZE:
                self._webhooks.clear()
            for row in await self._pool.fetch(_LOAD, list(missing)):
                self._webhooks[row["id"]] = self._webhook(row)
        return {d.webhook_id: self._webhooks[d.webhook_id] for d in deliveries}

    def cached(self, webhook_id: UUID) -> Webhook | None:
        """What was loaded of it last, if anything: good for estimates, not for sending."""
        return self._webhooks.get(webhook_id)

    def _webhook(self, row: Any) -> Webhook:
        previous = row["previous_secret_ciphertext"]
        url, url_refusal = self._judged_url(row["url"])
        return Webhook(
            id=row["id"],
            version=row["version"],
            destination=Destination(url, orjson.loads(row["headers"])) if url else None,
            url_refusal=url_refusal,
            secret=self._decrypt(row["id"], row["secret_key_id"], row["secret_ciphertext"]),
            previous_secret=None
            if previous is None
            else self._decrypt(row["id"], row["previous_secret_key_id"], previous),
            previous_secret_expires_at=row["previous_secret_expires_at"],
            header_prefix=row["header_prefix"],
            retry_schedule_seconds=_schedule(row["id"], row["retry_schedule_seconds"]),
            timeout_seconds=row["timeout_seconds"],
            rate_limit=row["rate_limit"],
            max_in_flight=row["max_in_flight"],
        )

    def _judged_url(self, text: str) -> tuple[str | None, str]:
        """What to call and an empty text, or None and why it is not called.

        The rules are the process's for life, so judging a version once judges each of its attempts.
        """
        try:
            return parse_webhook_url(text, self._url_policy).text, ""
        except UrlRefused as refused:
            return None, refused.message

    def _is_cached(self, delivery: LeasedDelivery) -> bool:
        cached = self._webhooks.get(delivery.webhook_id)
        if cached is None or cached.secret is None:
            # No key read it: by now the operator may have given us the one that does.
            return False
        return cached.version >= delivery.webhook_version

    def _decrypt(self, webhook_id: UUID, key_id: str, ciphertext: bytes) -> str | None:
        try:
            return self._keyring.decrypt(key_id, ciphertext, webhook_id)
        except UndecryptableSecret as error:
            log.error("secret_unreadable", webhook_id=str(webhook_id), reason=str(error))
            return None


def _schedule(webhook_id: UUID, waits: Sequence[float]) -> Sequence[float]:
    """The waits as they are; none, hence the operator's, where one could not be waited for."""
    if all(0 <= wait <= _WAIT_SECONDS_MAX for wait in waits):
        return waits
    log.error("retry_schedule_unreadable", webhook_id=str(webhook_id))
    return ()


async def forget_expired_secrets(pool: Pool) -> None:
    """Erase retired secrets that sign no more: what is not needed is not kept, even encrypted."""
    await pool.execute(_FORGET_EXPIRED_SECRETS)
