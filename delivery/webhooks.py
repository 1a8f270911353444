"""The webhook configs as an engine needs them, decrypted and cached by version.

A claim names the version of each config at that moment, so a change is honoured by the next claim
without any invalidation message.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from uuid import UUID

import structlog
from yarl import URL

from core.db import Pool
from core.keyring import KeyRing, UndecryptableSecret
from core.queue import LeasedDelivery

_LOAD = """
SELECT id, version, url, secret_ciphertext, secret_key_id, retry_schedule_seconds
FROM webhook_configs WHERE id = ANY ($1)
"""

#: Configs kept in memory; past this the cache starts anew, which costs one query per claim.
_CACHE_SIZE = 50_000

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Webhook:
    """One version of a webhook config; `secret` is None when no key of ours reads it."""

    id: UUID
    version: int
    url: URL
    secret: str | None = field(repr=False)
    retry_schedule_seconds: Sequence[float]


class WebhookCache:
    """Loads what a batch of claimed deliveries needs in at most one query."""

    def __init__(self, pool: Pool, keyring: KeyRing):
        self._pool = pool
        self._keyring = keyring
        self._webhooks: dict[UUID, Webhook] = {}

    async def for_deliveries(self, deliveries: Collection[LeasedDelivery]) -> dict[UUID, Webhook]:
        """The config of each delivery, at the version of the claim or newer."""
        missing = {d.webhook_id for d in deliveries if not self._is_cached(d)}
        if missing:
            if len(self._webhooks) > _CACHE_SIZE:
                self._webhooks.clear()
            for row in await self._pool.fetch(_LOAD, list(missing)):
                self._webhooks[row["id"]] = Webhook(
                    id=row["id"],
                    version=row["version"],
                    url=URL(row["url"], encoded=True),
                    secret=self._decrypt(row["id"], row["secret_key_id"], row["secret_ciphertext"]),
                    retry_schedule_seconds=row["retry_schedule_seconds"],
                )
        return {d.webhook_id: self._webhooks[d.webhook_id] for d in deliveries}

    def _is_cached(self, delivery: LeasedDelivery) -> bool:
        cached = self._webhooks.get(delivery.webhook_id)
        return cached is not None and cached.version >= delivery.webhook_version

    def _decrypt(self, webhook_id: UUID, key_id: str, ciphertext: bytes) -> str | None:
        try:
            return self._keyring.decrypt(key_id, ciphertext, webhook_id)
        except UndecryptableSecret as error:
            log.error("secret_unreadable", webhook_id=str(webhook_id), reason=str(error))
            return None
