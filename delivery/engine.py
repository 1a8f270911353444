"""The engine: claims, and for each delivery calls sign, send, report and record in this order.

All decisions of the delivery side meet here; the stages know nothing of each other. Bounds: so many
attempts in flight in all, counted until their result is on record, and of each webhook config as
many as `Places` gives it.
"""

import asyncio
import itertools
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from time import monotonic
from uuid import UUID

import structlog

from core import queue
from core.encryption import KeyRing
from core.ids import format_id
from core.lifecycle import AttemptResult, Outcome
from core.postgres.pool import RETRYABLE_ERRORS
from core.postgres.protocols import Pool
from core.queue import Chain, LeasedDelivery, Settlement, SettleResult
from core.tasks import cancel_and_wait, cancel_at
from core.tracing import TraceParent
from core.urls import UrlPolicy
from delivery.claim import UnansweredClaims, claim
from delivery.decide import decide, requested_pause_seconds
from delivery.fairness.admission import Admission
from delivery.fairness.breaker import Breaker
from delivery.fairness.capacity import Capacity
from delivery.fairness.concurrency import ConcurrencyLimiter, InFlightBudget
from delivery.fairness.rate_limit import RateLimits
from delivery.http.connector import Dialler
from delivery.http.outcome import receiver_works
from delivery.listen import Listener
from delivery.maintain import keep_clean, promote_stranded, reclaim
from delivery.metrics import EngineMetrics
from delivery.record import Recorder
from delivery.report import AttemptReports
from delivery.send import send
from delivery.settings import DeliverySettings
from delivery.sign import sign
from delivery.webhooks import Webhook, WebhookCache, forget_expired_secrets

_DATABASE_RETRY_SECONDS = 0.5
_SWEEP_SECONDS = 1.0
#: How long a stop waits for a claim under way. What one takes whose answer comes later is sent when
#: its lease has ended.
_LAST_CLAIM_SECONDS = 5.0
_SWEEPS_BETWEEN_CLEANING = 60

log = structlog.get_logger()


class Engine:
    """One engine process. Any number of them share a database; they know nothing of each other."""

    def __init__(
        self,
        settings: DeliverySettings,
        pool: Pool,
        dialler: Dialler,
        keyring: KeyRing,
        url_policy: UrlPolicy,
        *,
        metrics: EngineMetrics,
        reports: AttemptReports,
    ):
        self._settings = settings
        self._reports = reports
        self._pool = pool
        self._dialler = dialler
        self._webhooks = WebhookCache(pool, keyring, url_policy)
        self._listener = Listener(pool, settings.poll_seconds)
        self._metrics = metrics
        metrics.in_flight_limit = settings.max_in_flight
        self._recorder = Recorder(pool, settings, metrics, self._on_settled)
        self._slots = ConcurrencyLimiter(settings.max_in_flight, settings.max_in_flight_per_webhook)
        self._capacity = Capacity(
            self._webhooks, self._slots, RateLimits(pool, self._listener.expect_retry)
        )
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_failing_seconds)
        self._admission = Admission(pool)
        self._unanswered = UnansweredClaims()
        self._stopping = asyncio.Event()
        self._budget = InFlightBudget(
            settings.max_in_flight, self._slots.reserve, settings.claim_batch
        )
        self._attempts: dict[asyncio.Task[None], LeasedDelivery] = {}
        # The last claim brought as many as it asked for; or we stop.
        self._more_due = asyncio.Event()
        self._dispatching = asyncio.Lock()

    def stop(self) -> None:
        """Claim nothing more; run() returns when what is in flight is settled or released."""
        self._stopping.set()
        self._budget.close()
        self._more_due.set()
        self._listener.wake()

    async def run(self) -> None:
        """Deliver until stop(). Raises only for bugs; an absent database is waited for.

        After stop() it takes the drain time twice at most, whatever the database does: once for
        what is under way, once to tell the database of it.
        """
        now = asyncio.get_running_loop().time
        seconds = self._settings.delivery_drain_seconds
        async with asyncio.TaskGroup() as group:
            loops = [
                group.create_task(self._recorder.run()),
                group.create_task(self._listener.run()),
                group.create_task(self._sweep_forever()),
                group.create_task(keep_clean(self._pool)),
            ]
            claiming = group.create_task(self._claim_until_stopped())
            stopping = group.create_task(self._stopping.wait())
            await asyncio.wait({claiming, stopping}, return_when=asyncio.FIRST_COMPLETED)
            drained_by = now() + seconds
            await cancel_at(min(now() + _LAST_CLAIM_SECONDS, drained_by), claiming)
            await cancel_and_wait([stopping])
            released = await self._drain(drained_by)
            recorded_by = now() + seconds
            await self._release(released, recorded_by)
            await cancel_and_wait(loops)
        await self._record_the_rest(recorded_by)

    async def _claim_until_stopped(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._claim_beside())
            while not self._stopping.is_set():
                # Beside the claim, which others would have to wait for longer; the next has them.
                refilling = asyncio.create_task(self._refill())
                try:
                    found_all = await self._claim()
                finally:
                    admitted = await refilling
                if found_all and not admitted:
                    await self._listener.wait()

    async def _claim_beside(self) -> None:
        """A second claim at a time, while claims come back full.

        The attempts of one claim end nearly together; until the next one came back there would be
        nothing to do.
        """
        while not self._stopping.is_set():
            await self._more_due.wait()
            await self._claim()

    async def _claim(self) -> bool:
        """Claim what there is room for, and begin it; whether that was all that is due."""
        limit = await self._budget.wait()
        if limit <= 0 or self._stopping.is_set():
            return False
        try:
            # Until its attempts have begun, or the other claim would ask for the same room.
            with self._budget.asking_for(limit):
                claimed = await claim(
                    self._pool,
                    limit,
                    self._settings.lease_seconds,
                    self._metrics.claim,
                    self._unanswered,
                )
                self._metrics.database_reached()
                excess = await self._dispatch(claimed.deliveries)
            if excess:
                await queue.park_leased(self._pool, excess)
            if claimed.taken == limit and (bursts := _bursts(excess, limit)):
                await queue.park_due(self._pool, bursts)
        except RETRYABLE_ERRORS as error:
            log.warning("claim_retried", error=repr(error))
            await asyncio.sleep(_DATABASE_RETRY_SECONDS)
            return False
        if claimed.taken == limit:
            self._more_due.set()
            return False
        if not self._stopping.is_set():
            self._more_due.clear()
        return True

    async def _refill(self) -> bool:
        """Let parked deliveries in as there is room; whether there were any."""
        self._slots.survey()
        try:
            admitted = await self._admission.refill(
                self._capacity.wanted_now, busy=self._more_due.is_set()
            )
        except RETRYABLE_ERRORS as error:
            log.warning("refill_retried", error=repr(error))
            return False
        if admitted:
            self._expect_refill()
        return admitted

    def _expect_refill(self) -> None:
        """What was let in is all that may be for now; nothing else would wake us for more."""
        if rest := self._admission.rest_seconds():
            self._listener.expect_retry(rest)

    async def _dispatch(self, deliveries: Sequence[LeasedDelivery]) -> Sequence[LeasedDelivery]:
        """Begin an attempt for each delivery whose config can take it now; returns the others."""
        if not deliveries:
            return ()
        claimed_at = monotonic()
        # One claim after the other: it has to see what the one before took of places and rates.
        async with self._dispatching:
            webhooks = await self._webhooks.for_deliveries(deliveries)
            beginning, excess = await self._capacity.take(deliveries, webhooks)
            for delivery in beginning:
                self._begin(delivery, webhooks[delivery.webhook_id], claimed_at)
        self._admission.meet(d.webhook_id for d in deliveries if d.has_backlog)
        self._admission.meet(d.webhook_id for d in excess)
        self._admission.give_way_to(deliveries)
        return excess

    def _begin(self, delivery: LeasedDelivery, webhook: Webhook, claimed_at: float) -> None:
        self._budget.attempt_began()
        self._metrics.in_flight += 1
        task = asyncio.create_task(self._attempt(delivery, webhook, claimed_at))
        self._attempts[task] = delivery
        task.add_done_callback(self._on_attempt_done)

    async def _attempt(self, delivery: LeasedDelivery, webhook: Webhook, claimed_at: float) -> None:
        # The database's time, carried on by our monotonic clock: one clock for all engines.
        started_at = delivery.claimed_at + timedelta(seconds=monotonic() - claimed_at)
        works: bool | None = None
        report = self._reports.begin(delivery)
        try:
            result = await self._request(delivery, webhook, started_at, report.told_trace_parent)
            works = receiver_works(result.outcome, result.status_code)
        except Exception:
            log.exception("attempt_broke", delivery_id=format_id("dlv", delivery.id))
            result = AttemptResult(
                Outcome.INTERNAL_ERROR, None, "Postrider could not make the request"
            )
        finally:
            if rest := self._slots.end(webhook.id, works):
                self._listener.expect_retry(rest)
        settlement = decide(delivery, webhook, self._settings, started_at, result)
        report.end(settlement, webhook.destination)
        self._metrics.attempt_ended(delivery, settlement)
        asked = requested_pause_seconds(result, self._settings)
        self._recorder.put(settlement, self._breaker.decide(delivery, works, asked))

    async def _request(
        self,
        delivery: LeasedDelivery,
        webhook: Webhook,
        started_at: datetime,
        trace_parent: TraceParent | None,
    ) -> AttemptResult:
        if webhook.destination is None:
            return AttemptResult(Outcome.REFUSED, None, webhook.url_refusal)
        if webhook.secret is None:
            detail = "Postrider could not read the signing secret"
            return AttemptResult(Outcome.INTERNAL_ERROR, None, detail)
        # By the database's time at the claim: what one engine signs with, every other does.
        secrets = webhook.signing_secrets(delivery.claimed_at)
        now = int(started_at.timestamp())
        headers = sign(delivery, secrets, now, webhook.header_prefix, trace_parent)
        timeout = webhook.timeout_seconds or self._settings.delivery_timeout_seconds
        # Our lease is not the merchant's to outlive: one that ends meanwhile sends twice.
        timeout = min(timeout, self._settings.lease_seconds / 2)
        return await send(self._dialler, webhook.destination, headers, delivery.payload, timeout)

    def _on_attempt_done(self, task: asyncio.Task[None]) -> None:
        delivery = self._attempts.pop(task)
        self._metrics.in_flight -= 1
        self._budget.attempt_ended()
        if not task.cancelled() and (error := task.exception()):
            # A bug, and no result to record: the lease will end, and the delivery be tried again.
            log.error("attempt_lost", delivery_id=format_id("dlv", delivery.id), exc_info=error)
            self._budget.settled(1)

    def _on_settled(self, batch: Sequence[Settlement], settled: SettleResult) -> None:
        self._budget.settled(len(batch))
        for settlement in batch:
            if settlement.delivery_id not in settled.delivery_ids:
                # Another engine has it, or its config was deleted: it is theirs to record.
                self._metrics.leases_lost += 1
                log.warning("lease_lost", delivery_id=format_id("dlv", settlement.delivery_id))
                continue
            if settlement.delivery_id in settled.outdated:
                log.info("attempt_outdated", delivery_id=format_id("dlv", settlement.delivery_id))
                self._listener.wake()
                continue
            self._metrics.settled(settlement)
            if settlement.final_state is None:
                self._listener.expect_retry(settlement.next_attempt_in_seconds)
        for webhook_id, reason in settled.deactivated.items():
            self._metrics.deactivations[reason] += 1
            log.warning(
                "webhook_deactivated", webhook_id=format_id("wh", webhook_id), reason=reason.value
            )
        if settled.ended_chains or self._admission.concerns(s.webhook_id for s in batch):
            self._listener.wake()

    async def _sweep_forever(self) -> None:
        """What every engine does for all, so that no engine's death strands anything."""
        looked_at: Chain | None = None
        for sweep in itertools.count():
            try:
                if sweep % _SWEEPS_BETWEEN_CLEANING == 0:
                    await forget_expired_secrets(self._pool)
                released = await self._unanswered.give_back(self._pool)
                reclaimed = await reclaim(self._pool)
                promoted, looked_at = await promote_stranded(self._pool, looked_at)
                self._slots.survey()
                admitted = await self._admission.sweep(self._capacity.wanted)
            except RETRYABLE_ERRORS as error:
                log.warning("sweep_retried", error=repr(error))
            else:
                self._metrics.database_reached()
                if released:
                    log.warning("unanswered_claims_released", deliveries=released)
                if reclaimed:
                    self._metrics.leases_reclaimed += reclaimed
                    log.warning("leases_reclaimed", deliveries=reclaimed)
                if admitted:
                    self._expect_refill()
                if released or reclaimed or promoted or admitted:
                    self._listener.wake()
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _drain(self, deadline: float) -> Sequence[LeasedDelivery]:
        """Let attempts end until then; those that did not are given up, and returned."""
        if self._attempts:
            log.info("draining", in_flight=len(self._attempts))
            rest = deadline - asyncio.get_running_loop().time()
            await asyncio.wait(self._attempts, timeout=max(rest, 0))
        unfinished = dict(self._attempts)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
        # One that ended at the last moment has a result to record.
        return [delivery for task, delivery in unfinished.items() if task.cancelled()]

    async def _release(self, deliveries: Sequence[LeasedDelivery], deadline: float) -> None:
        if not deliveries:
            return
        log.warning("released_unfinished", deliveries=len(deliveries))
        releasing = asyncio.create_task(queue.release(self._pool, deliveries))
        await cancel_at(deadline, releasing)
        try:
            releasing.result()
        except (*RETRYABLE_ERRORS, asyncio.CancelledError) as error:
            # Their leases end by themselves; only later.
            log.warning("release_failed", error=repr(error))

    async def _record_the_rest(self, deadline: float) -> None:
        """Wait for the database, but not for ever: who stops us would kill us in the end."""
        recording = asyncio.create_task(self._recorder.flush())
        await cancel_at(deadline, recording)
        if not recording.cancelled():
            recording.result()
        if self._recorder.pending:
            # Sent a second time, under the same webhook-id, when their leases have ended.
            log.error("results_left_to_leases", deliveries=self._recorder.pending)


def _bursts(excess: Sequence[LeasedDelivery], limit: int) -> list[UUID]:
    """The configs for which at least half of a claim for so many was in vain.

    Their fan-out has parked what exceeds their room, but not what is due by its `not_before`.
    """
    return [w for w, count in Counter(d.webhook_id for d in excess).items() if 2 * count >= limit]
