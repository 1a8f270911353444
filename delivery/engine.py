"""The engine: claims, and for each delivery calls sign, send and record in this order.

All decisions of the delivery side meet here; the stages know nothing of each other. Bounds: so many
attempts in flight in all and per webhook config, counted until their result is on record.
"""

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from time import monotonic
from uuid import UUID

import structlog

from core import queue
from core.db import RETRYABLE_ERRORS, Pool
from core.ids import format_id
from core.keyring import KeyRing
from core.lifecycle import AttemptResult, Outcome
from core.queue import Chain, LeasedDelivery, Settled, Settlement
from delivery.backoff import backoff_schedule, next_backoff
from delivery.claim import claim
from delivery.config import DeliverySettings
from delivery.dialler import Dialler
from delivery.listen import Listener
from delivery.outcome import final_state
from delivery.rate_limit import RateLimits
from delivery.reclaim import admit_backlogs, promote_stranded, reclaim
from delivery.record import Recorder
from delivery.send import send
from delivery.sign import sign
from delivery.webhooks import Webhook, WebhookCache, forget_expired_secrets

_DATABASE_RETRY_SECONDS = 0.5
_SWEEP_SECONDS = 1.0
_SWEEPS_BETWEEN_CLEANING = 60
#: How long to wait for more free places before a claim for few.
_GATHER_SECONDS = 0.01
#: Results on their way into the database that do not hold back new attempts.
_UNSETTLED_FREE = 500

log = structlog.get_logger()


class Engine:
    """One engine process. Any number of them share a database; they know nothing of each other."""

    def __init__(
        self,
        settings: DeliverySettings,
        pool: Pool,
        dialler: Dialler,
        keyring: KeyRing,
    ):
        self._settings = settings
        self._pool = pool
        self._dialler = dialler
        self._webhooks = WebhookCache(pool, keyring)
        self._listener = Listener(pool, settings.poll_seconds)
        self._recorder = Recorder(pool, settings.max_consecutive_failures, self._on_settled)
        self._stopping = False
        # Claimed and not yet settled, in all; requests open, per webhook config.
        self._in_flight = 0
        self._open: Counter[UUID] = Counter()
        self._attempts: dict[asyncio.Task[None], LeasedDelivery] = {}
        # Configs let in again as soon as they have room: those that were seen to have a backlog
        # since the last sweep or in the second before it.
        self._backlogged: set[UUID] = set()
        self._backlog_seen: set[UUID] = set()
        self._room_grew = asyncio.Event()
        self._rate_limits = RateLimits(pool, self._listener.expect_retry)

    def stop(self) -> None:
        """Claim nothing more; run() returns when what is in flight is settled or released."""
        self._stopping = True
        self._room_grew.set()
        self._listener.wake()

    async def run(self) -> None:
        """Deliver until stop(). Raises only for bugs; an absent database is waited for."""
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self._recorder.run()),
                group.create_task(self._listener.run()),
                group.create_task(self._sweep_forever()),
            ]
            await self._claim_until_stopped()
            await self._drain()
            for loop in loops:
                loop.cancel()
        await self._recorder.flush()

    async def _claim_until_stopped(self) -> None:
        while not self._stopping:
            limit = await self._wait_for_room()
            if limit <= 0:
                continue
            try:
                await self._admit_own_backlogs()
                claimed = await claim(self._pool, limit, self._settings.lease_seconds)
                await self._dispatch(claimed.deliveries)
            except RETRYABLE_ERRORS as error:
                log.warning("claim_retried", error=repr(error))
                await asyncio.sleep(_DATABASE_RETRY_SECONDS)
                continue
            if claimed.taken < limit:
                await self._listener.wait()

    async def _wait_for_room(self) -> int:
        """How many to claim: at once when many may be, else what is free after a short wait.

        Places become free one by one, and a claim costs nearly the same for one as for many.
        """
        worthwhile = max(min(self._settings.claim_batch, self._settings.max_in_flight) // 4, 1)
        with suppress(TimeoutError):
            async with asyncio.timeout(_GATHER_SECONDS):
                while self._room() < worthwhile and not self._stopping:
                    self._room_grew.clear()
                    await self._room_grew.wait()
        return min(self._room(), self._settings.claim_batch)

    def _room(self) -> int:
        """Attempts that may still begin. Results that wait for the database take places, too, but
        not before there are more of them than one settle takes."""
        unsettled = self._in_flight - len(self._attempts)
        return (
            self._settings.max_in_flight - len(self._attempts) - max(unsettled - _UNSETTLED_FREE, 0)
        )

    async def _admit_own_backlogs(self) -> None:
        """Refill the configs that wait for us to have room, well before the sweep comes round."""
        hungry = [
            w
            for w in self._backlogged
            if self._open[w] <= self._places(self._webhooks.cached(w)) // 2
            and not self._rate_limits.is_held(w)
        ]
        if hungry:
            # One that is not fed may lack room instead of a backlog, so it is asked for again.
            self._backlog_seen |= await queue.admit(
                self._pool, hungry, self._settings.max_in_flight_per_webhook
            )

    def _places(self, webhook: Webhook | None) -> int:
        """Attempts that one config may have open here: its own cap, and never above ours."""
        own = webhook.max_in_flight if webhook else 0
        most = self._settings.max_in_flight_per_webhook
        return min(own, most) if own else most

    async def _dispatch(self, deliveries: Sequence[LeasedDelivery]) -> None:
        """Begin an attempt for each delivery whose config can take it now; park the others."""
        if not deliveries:
            return
        claimed_at = monotonic()
        webhooks = await self._webhooks.for_deliveries(deliveries)
        granted = await self._rate_limits.grant(self._wanted(deliveries, webhooks))
        excess = []
        for delivery in deliveries:
            webhook = webhooks[delivery.webhook_id]
            within_rate = granted.get(webhook.id, 0) > 0 or not webhook.rate_limit
            if self._open[webhook.id] >= self._places(webhook) or not within_rate:
                excess.append(delivery)
                continue
            granted[webhook.id] -= 1
            self._begin(delivery, webhook, claimed_at)
        if excess:
            webhook_ids = {delivery.webhook_id for delivery in excess}
            self._backlogged |= webhook_ids
            self._backlog_seen |= webhook_ids
            await queue.park_leased(self._pool, excess)

    def _wanted(
        self, deliveries: Sequence[LeasedDelivery], webhooks: Mapping[UUID, Webhook]
    ) -> dict[UUID, int]:
        """What to ask of the rates: no more than there are places for, nothing while held."""
        claimed = Counter(
            d.webhook_id
            for d in deliveries
            if webhooks[d.webhook_id].rate_limit and not self._rate_limits.is_held(d.webhook_id)
        )
        wanted = {
            webhook_id: min(count, self._places(webhooks[webhook_id]) - self._open[webhook_id])
            for webhook_id, count in claimed.items()
        }
        return {webhook_id: count for webhook_id, count in wanted.items() if count > 0}

    def _begin(self, delivery: LeasedDelivery, webhook: Webhook, claimed_at: float) -> None:
        self._open[webhook.id] += 1
        self._in_flight += 1
        task = asyncio.create_task(self._attempt(delivery, webhook, claimed_at))
        self._attempts[task] = delivery
        task.add_done_callback(self._on_attempt_done)

    async def _attempt(self, delivery: LeasedDelivery, webhook: Webhook, claimed_at: float) -> None:
        # The database's time, carried on by our monotonic clock: one clock for all engines.
        started_at = delivery.claimed_at + timedelta(seconds=monotonic() - claimed_at)
        try:
            result = await self._request(delivery, webhook, started_at)
        except Exception:
            log.exception("attempt_broke", delivery_id=format_id("dlv", delivery.id))
            result = AttemptResult(
                Outcome.INTERNAL_ERROR, None, "Postrider could not make the request"
            )
        finally:
            self._free_place(delivery.webhook_id)
        settlement = self._judge(delivery, webhook, started_at, result)
        _log_attempt(delivery, settlement)
        self._recorder.put(settlement)

    async def _request(
        self, delivery: LeasedDelivery, webhook: Webhook, started_at: datetime
    ) -> AttemptResult:
        if webhook.secret is None:
            detail = "Postrider could not read the signing secret"
            return AttemptResult(Outcome.INTERNAL_ERROR, None, detail)
        if webhook.destination is None:
            return AttemptResult(Outcome.INTERNAL_ERROR, None, "Postrider could not read the URL")
        # By the database's time at the claim: what one engine signs with, every other does.
        secrets = webhook.signing_secrets(delivery.claimed_at)
        headers = sign(delivery, secrets, int(started_at.timestamp()))
        timeout = webhook.timeout_seconds or self._settings.delivery_timeout_seconds
        # Our lease is not the merchant's to outlive: one that ends meanwhile sends twice.
        timeout = min(timeout, self._settings.lease_seconds / 2)
        return await send(self._dialler, webhook.destination, headers, delivery.payload, timeout)

    def _judge(
        self,
        delivery: LeasedDelivery,
        webhook: Webhook,
        started_at: datetime,
        result: AttemptResult,
    ) -> Settlement:
        """Final state or another attempt: the one place where this is decided."""
        schedule = backoff_schedule(
            self._settings.retry_schedule_seconds,
            self._settings.max_retries,
            webhook.retry_schedule_seconds,
        )
        # Jitter keeps receivers from being called in step; nobody gains from predicting it.
        backoff = next_backoff(schedule, delivery.attempt_count + 1, random.random)
        state = final_state(result.outcome, backoff)
        return Settlement(
            delivery_id=delivery.id,
            lease_id=delivery.lease_id,
            outcome=result.outcome,
            status_code=result.status_code,
            detail=result.detail,
            started_at=started_at,
            duration_us=result.duration_us,
            final_state=state,
            retry_after_seconds=(backoff or 0) if state is None else 0,
            dns_us=result.dns_us,
            connect_us=result.connect_us,
            first_byte_us=result.first_byte_us,
            remote_address=result.remote_address,
            response_excerpt=result.response_excerpt,
        )

    def _on_attempt_done(self, task: asyncio.Task[None]) -> None:
        delivery = self._attempts.pop(task)
        self._room_grew.set()
        if not task.cancelled() and (error := task.exception()):
            # A bug, and no result to record: the lease will end, and the delivery be tried again.
            log.error("attempt_lost", delivery_id=format_id("dlv", delivery.id), exc_info=error)
            self._in_flight -= 1

    def _free_place(self, webhook_id: UUID) -> None:
        self._open[webhook_id] -= 1
        if not self._open[webhook_id]:
            del self._open[webhook_id]

    def _on_settled(self, batch: Sequence[Settlement], settled: Settled) -> None:
        self._in_flight -= len(batch)
        self._room_grew.set()
        for settlement in batch:
            if settlement.delivery_id not in settled.delivery_ids:
                # Another engine has it, or its config was deleted: it is theirs to record.
                log.warning("lease_lost", delivery_id=format_id("dlv", settlement.delivery_id))
            elif settlement.final_state is None:
                self._listener.expect_retry(settlement.retry_after_seconds)
        for webhook_id in settled.deactivated_webhook_ids:
            log.warning(
                "webhook_deactivated",
                webhook_id=format_id("wh", webhook_id),
                reason="failures",
                consecutive_failures=self._settings.max_consecutive_failures,
            )
        if self._backlogged or settled.ended_chains:
            self._listener.wake()

    async def _sweep_forever(self) -> None:
        """What every engine does for all, so that no engine's death strands anything."""
        looked_at: Chain | None = None
        for sweep in itertools.count():
            try:
                if sweep % _SWEEPS_BETWEEN_CLEANING == 0:
                    await forget_expired_secrets(self._pool)
                reclaimed = await reclaim(self._pool)
                promoted, looked_at = await promote_stranded(self._pool, looked_at)
                admitted = await admit_backlogs(
                    self._pool, self._settings.max_in_flight_per_webhook
                )
            except RETRYABLE_ERRORS as error:
                log.warning("sweep_retried", error=repr(error))
            else:
                if reclaimed:
                    log.warning("leases_reclaimed", deliveries=reclaimed)
                self._backlogged = self._backlog_seen | admitted
                self._backlog_seen = set()
                if reclaimed or promoted or admitted:
                    self._listener.wake()
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _drain(self) -> None:
        if self._attempts:
            log.info("draining", in_flight=len(self._attempts))
            await asyncio.wait(self._attempts, timeout=self._settings.delivery_drain_seconds)
        unfinished = dict(self._attempts)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
            # One that ended at the last moment has a result to record.
            released = [delivery for task, delivery in unfinished.items() if task.cancelled()]
            log.warning("released_unfinished", deliveries=len(released))
            try:
                await queue.release(self._pool, released)
            except RETRYABLE_ERRORS as error:
                # Their leases end by themselves; only later.
                log.warning("release_failed", error=repr(error))


def _log_attempt(delivery: LeasedDelivery, settlement: Settlement) -> None:
    """The one line of an attempt: ids and figures, never a payload or a secret."""
    log.info(
        "attempt",
        webhook_id=format_id("wh", delivery.webhook_id),
        event_id=format_id("evt", delivery.event_id),
        event_type=delivery.event_type,
        delivery_id=format_id("dlv", delivery.id),
        attempt=delivery.attempt_count + 1,
        outcome=settlement.outcome.value,
        status=settlement.status_code,
        duration_ms=settlement.duration_us / 1000,
        state=settlement.final_state.value if settlement.final_state else "ready",
        retry_seconds=settlement.retry_after_seconds or None,
    )
