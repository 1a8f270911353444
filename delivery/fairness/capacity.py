"""What each webhook config can take now: its free places, within the rate it asked for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from uuid import UUID

from core.queue import LeasedDelivery
from delivery.fairness.concurrency import ConcurrencyLimiter
from delivery.fairness.rate_limit import RateLimits
from delivery.webhooks import Webhook, WebhookCache


class Capacity:
    """Decides which of the claimed deliveries begin, and how many a backlog may let in."""

    def __init__(self, webhooks: WebhookCache, places: ConcurrencyLimiter, rate_limits: RateLimits):
        self._webhooks = webhooks
        self._slots = places
        self._rate_limits = rate_limits

    def wanted(self, webhook_id: UUID) -> int:
        """How many deliveries a config with a backlog could have on their way; 0: none more."""
        webhook = self._webhooks.cached(webhook_id)
        return self._slots.wanted(webhook_id, webhook.max_in_flight if webhook else 0)

    def wanted_now(self, webhook_id: UUID) -> int:
        """The same, and 0 while its rate is known to be used up."""
        return 0 if self._rate_limits.breaker_is_open(webhook_id) else self.wanted(webhook_id)

    async def take(
        self, deliveries: Sequence[LeasedDelivery], webhooks: Mapping[UUID, Webhook]
    ) -> tuple[list[LeasedDelivery], list[LeasedDelivery]]:
        """Those that begin now, whose places are taken herewith, and those in excess."""
        self._slots.survey()
        for webhook_id in {d.webhook_id for d in deliveries if d.is_probe}:
            self._slots.restart(webhook_id)
        granted = await self._rate_limits.grant(self._rate_wanted(deliveries, webhooks))
        beginning, excess = [], []
        for delivery in deliveries:
            webhook = webhooks[delivery.webhook_id]
            within_rate = granted.get(webhook.id, 0) > 0 or not webhook.rate_limit
            if within_rate and self._slots.free(webhook.id, webhook.max_in_flight):
                granted[webhook.id] -= 1
                self._slots.begin(webhook.id)
                beginning.append(delivery)
            else:
                excess.append(delivery)
        return beginning, excess

    def _rate_wanted(
        self, deliveries: Sequence[LeasedDelivery], webhooks: Mapping[UUID, Webhook]
    ) -> dict[UUID, int]:
        """What to ask of the rates: no more than there are places for, nothing while held."""
        claimed = Counter(
            d.webhook_id
            for d in deliveries
            if webhooks[d.webhook_id].rate_limit
            and not self._rate_limits.breaker_is_open(d.webhook_id)
        )
        wanted = {
            webhook_id: min(count, self._slots.free(webhook_id, webhooks[webhook_id].max_in_flight))
            for webhook_id, count in claimed.items()
        }
        return {webhook_id: count for webhook_id, count in wanted.items() if count}
