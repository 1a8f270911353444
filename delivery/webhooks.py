"""The webhook configs that an engine needs, decrypted and cached by version.

A claim returns the current version of each config, so the cache needs no invalidation messages.
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
from delivery.http.request import RequestTemplate

_LOAD = """
SELECT id, version, url, secret_ciphertext, secret_key_id, previous_secret_ciphertext,
    previous_secret_key_id, previous_secret_expires_at, retry_schedule_seconds, headers,
    header_prefix, timeout_seconds, rate_limit, max_in_flight
FROM webhook_configs WHERE id = ANY ($1)
"""

_ERASE_EXPIRED_SECRETS = """
UPDATE webhook_configs c
SET previous_secret_ciphertext = NULL, previous_secret_key_id = NULL,
    previous_secret_expires_at = NULL, previous_public_key = NULL
FROM (
    SELECT id FROM webhook_configs WHERE previous_secret_expires_at <= now()
    FOR NO KEY UPDATE SKIP LOCKED
) expired
WHERE c.id = expired.id
"""

#: Cached configs. Above this number the cache is cleared, which costs one query per claim.
_CACHE_SIZE = 50_000

#: Longer than any wait that the API stores. Comparisons with NaN are false.
_WAIT_SECONDS_MAX = 86_400.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Webhook:
    """One version of a webhook config. `secret` is None if no configured key decrypts it."""

    id: UUID
    version: int
    #: None if the stored URL is not allowed: the settings or the rules became stricter, or it was
    #: stored by hand.
    request_template: RequestTemplate | None
    #: The reason, for the merchant.
    url_refusal: str
    secret: str | None = field(repr=False)
    #: The secret before the rotation, which also signs until it expires.
    previous_secret: str | None = field(repr=False)
    previous_secret_expires_at: datetime | None
    #: A second prefix for the id, timestamp and signature headers. Empty for none.
    header_prefix: str
    retry_schedule_seconds: Sequence[float]
    #: None and 0 select the operator's setting. A rate of 0 means no limit.
    timeout_seconds: float | None
    rate_limit: float
    max_in_flight: int

    def signing_secrets(self, at: datetime) -> list[str]:
        """Return the secrets that sign at this time of the database, the current one first."""
        expires_at = self.previous_secret_expires_at
        overlaps = expires_at is not None and at < expires_at
        return [s for s in (self.secret, self.previous_secret if overlaps else None) if s]


class WebhookCache:
    """Loads the configs of a batch of claimed deliveries in at most one query."""

    def __init__(self, pool: Pool, keyring: KeyRing, url_policy: UrlPolicy):
        self._pool = pool
        self._keyring = keyring
        self._url_policy = url_policy
        self._webhooks: dict[UUID, Webhook] = {}

    async def for_deliveries(self, deliveries: Collection[LeasedDelivery]) -> dict[UUID, Webhook]:
        """Return the config of each delivery, at the version of the claim or newer."""
        missing = {d.webhook_id for d in deliveries if not self._is_cached(d)}
        if missing:
            if len(self._webhooks) > _CACHE_SIZE:
                self._webhooks.clear()
            for row in await self._pool.fetch(_LOAD, list(missing)):
                self._webhooks[row["id"]] = self._webhook(row)
        return {d.webhook_id: self._webhooks[d.webhook_id] for d in deliveries}

    def cached(self, webhook_id: UUID) -> Webhook | None:
        """Return the config that was loaded last, if any. It may be outdated."""
        return self._webhooks.get(webhook_id)

    def _webhook(self, row: Any) -> Webhook:
        previous = row["previous_secret_ciphertext"]
        url, url_refusal = self._checked_url(row["url"])
        return Webhook(
            id=row["id"],
            version=row["version"],
            request_template=RequestTemplate(url, orjson.loads(row["headers"])) if url else None,
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

    def _checked_url(self, text: str) -> tuple[str | None, str]:
        """Return the URL to call, or None and the reason against it.

        The rules do not change while the process runs, so each version is checked once.
        """
        try:
            return parse_webhook_url(text, self._url_policy).text, ""
        except UrlRefused as refused:
            return None, refused.message

    def _is_cached(self, delivery: LeasedDelivery) -> bool:
        cached = self._webhooks.get(delivery.webhook_id)
        if cached is None or cached.secret is None:
            # No key decrypted the secret. The operator may have added the key since.
            return False
        return cached.version >= delivery.webhook_version

    def _decrypt(self, webhook_id: UUID, key_id: str, ciphertext: bytes) -> str | None:
        try:
            return self._keyring.decrypt(key_id, ciphertext, webhook_id)
        except UndecryptableSecret as error:
            log.error("secret_unreadable", webhook_id=str(webhook_id), reason=str(error))
            return None


def _schedule(webhook_id: UUID, waits: Sequence[float]) -> Sequence[float]:
    """Return the waits, or none to select the operator's schedule if one is not usable."""
    if all(0 <= wait <= _WAIT_SECONDS_MAX for wait in waits):
        return waits
    log.error("retry_schedule_unreadable", webhook_id=str(webhook_id))
    return ()


async def erase_expired_secrets(pool: Pool) -> None:
    """Erase old secrets that no longer sign."""
    await pool.execute(_ERASE_EXPIRED_SECRETS)
