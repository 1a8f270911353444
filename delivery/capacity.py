"""Decides which claimed deliveries start now, by free slots and rate limits."""

from collections import Counter
from collections.abc import Mapping, Sequence
from uuid import UUID

from core.queue import LeasedDelivery
from delivery.fairness.concurrency import ConcurrencyLimiter
from delivery.fairness.rate_limit import RateLimits
from delivery.webhooks import Webhook, WebhookCache


class Capacity:
    """The slots and rates of all webhook configs in this engine."""

    def __init__(self, webhooks: WebhookCache, slots: ConcurrencyLimiter, rate_limits: RateLimits):
        self._webhooks = webhooks
        self._slots = slots
        self._rate_limits = rate_limits

    def admission_size(self, webhook_id: UUID) -> int:
        """Return how many deliveries of a backlog may be ready or open. 0 means admit none."""
        webhook = self._webhooks.cached(webhook_id)
        return self._slots.admission_size(webhook_id, webhook.max_in_flight if webhook else 0)

    def admission_size_within_rate(self, webhook_id: UUID) -> int:
        """Do the same, and return 0 while the config's rate is known to be used up."""
        if self._rate_limits.is_paused(webhook_id):
            return 0
        return self.admission_size(webhook_id)

    async def select(
        self, deliveries: Sequence[LeasedDelivery], webhooks: Mapping[UUID, Webhook]
    ) -> tuple[list[LeasedDelivery], list[LeasedDelivery]]:
        """Return the deliveries that start now, whose slots are then taken, and the others."""
        self._slots.refresh()
        for webhook_id in {d.webhook_id for d in deliveries if d.is_probe}:
            self._slots.reset_to_probe(webhook_id)
        granted = await self._rate_limits.take(self._rate_requests(deliveries, webhooks))
        starting, excess = [], []
        for delivery in deliveries:
            webhook = webhooks[delivery.webhook_id]
            within_rate = granted.get(webhook.id, 0) > 0 or not webhook.rate_limit
            if within_rate and self._slots.available(webhook.id, webhook.max_in_flight):
                granted[webhook.id] -= 1
                self._slots.started(webhook.id)
                starting.append(delivery)
            else:
                excess.append(delivery)
        return starting, excess

    def _rate_requests(
        self, deliveries: Sequence[LeasedDelivery], webhooks: Mapping[UUID, Webhook]
    ) -> dict[UUID, int]:
        """Return the webhooks to request from each rate limit: at most one per free slot."""
        claimed = Counter(
            d.webhook_id
            for d in deliveries
            if webhooks[d.webhook_id].rate_limit and not self._rate_limits.is_paused(d.webhook_id)
        )
        wanted = {
            webhook_id: min(
                count, self._slots.available(webhook_id, webhooks[webhook_id].max_in_flight)
            )
            for webhook_id, count in claimed.items()
        }
        return {webhook_id: count for webhook_id, count in wanted.items() if count}
