"""The engine: claims deliveries and runs each one through sign, send, decide, report and record.

This module calls the stages in order and makes the decisions between them; the stages do not know
each other. Two limits bound the open attempts: the in-flight budget of the engine, which counts an
attempt until its result is recorded, and the concurrency limit of each webhook config.
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
from delivery.capacity import Capacity
from delivery.claim import UnansweredClaims, claim
from delivery.decide import decide, requested_pause_seconds
from delivery.fairness.admission import Admission
from delivery.fairness.breaker import Breaker
from delivery.fairness.concurrency import ConcurrencyLimiter, InFlightBudget
from delivery.fairness.rate_limit import RateLimits
from delivery.http.client import WebhookClient
from delivery.http.outcome import endpoint_works
from delivery.listen import Listener
from delivery.maintain import keep_clean, promote_stranded, reclaim
from delivery.metrics import EngineMetrics
from delivery.record import Recorder
from delivery.report import AttemptReports
from delivery.send import send
from delivery.settings import DeliverySettings
from delivery.sign import sign
from delivery.webhooks import Webhook, WebhookCache, erase_expired_secrets

_DATABASE_RETRY_SECONDS = 0.5
_SWEEP_SECONDS = 1.0
#: How long a stop waits for a claim under way. If the response comes later, the deliveries are sent
#: after their lease expires.
_LAST_CLAIM_SECONDS = 5.0
_SWEEPS_BETWEEN_CLEANING = 60

log = structlog.get_logger()


class Engine:
    """One engine process. Engines share a database and coordinate through it alone."""

    def __init__(
        self,
        settings: DeliverySettings,
        pool: Pool,
        client: WebhookClient,
        keyring: KeyRing,
        url_policy: UrlPolicy,
        *,
        metrics: EngineMetrics,
        reports: AttemptReports,
    ):
        self._settings = settings
        self._reports = reports
        self._pool = pool
        self._client = client
        self._webhooks = WebhookCache(pool, keyring, url_policy)
        self._listener = Listener(pool, settings.poll_seconds)
        self._metrics = metrics
        metrics.in_flight_limit.set(settings.max_in_flight)
        self._recorder = Recorder(pool, settings, metrics, self._on_settled)
        self._slots = ConcurrencyLimiter(settings.max_in_flight, settings.max_in_flight_per_webhook)
        rate_limits = RateLimits(pool, self._listener.wake_in)
        self._capacity = Capacity(self._webhooks, self._slots, rate_limits)
        self._breaker = Breaker(settings.breaker_failures, settings.breaker_failing_seconds)
        self._admission = Admission(pool)
        self._unanswered = UnansweredClaims()
        self._stopping = asyncio.Event()
        self._budget = InFlightBudget(
            settings.max_in_flight, self._slots.reserve, settings.claim_batch
        )
        self._attempts: dict[asyncio.Task[None], LeasedDelivery] = {}
        # Set while the last claim was full, and when the engine stops.
        self._more_due = asyncio.Event()
        self._starting = asyncio.Lock()

    def stop(self) -> None:
        """Claim no more. run() returns once open attempts are settled or released."""
        self._stopping.set()
        self._budget.close()
        self._more_due.set()
        self._listener.wake()

    async def run(self) -> None:
        """Deliver until stop(). Waits for an unavailable database, and raises only for bugs.

        After stop() it takes at most twice the drain time: once for the open attempts, and once for
        writing their results.
        """
        now = asyncio.get_running_loop().time
        drain_seconds = self._settings.delivery_drain_seconds
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
            drained_by = now() + drain_seconds
            await cancel_at(min(now() + _LAST_CLAIM_SECONDS, drained_by), claiming)
            await cancel_and_wait([stopping])
            unfinished = await self._drain(drained_by)
            recorded_by = now() + drain_seconds
            await self._release(unfinished, recorded_by)
            await cancel_and_wait(loops)
        await self._record_the_rest(recorded_by)

    async def _claim_until_stopped(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._claim_while_more_is_due())
            while not self._stopping.is_set():
                # The refill runs beside this claim and feeds the next one.
                refilling = asyncio.create_task(self._refill())
                try:
                    claimed_all = await self._claim()
                finally:
                    admitted = await refilling
                if claimed_all and not admitted:
                    await self._listener.wait()

    async def _claim_while_more_is_due(self) -> None:
        """Run a second claim at a time while claims are full.

        The attempts of one claim end at nearly the same time, so that the engine would idle until
        the next claim returns.
        """
        while not self._stopping.is_set():
            await self._more_due.wait()
            await self._claim()

    async def _claim(self) -> bool:
        """Claim as many deliveries as the budget allows and start them.

        Returns whether no more are due.
        """
        limit = await self._budget.claim_size()
        if limit <= 0 or self._stopping.is_set():
            return False
        try:
            # Reserved until the attempts started, so that the other claim does not take the slots.
            with self._budget.claiming(limit):
                claimed = await claim(
                    self._pool,
                    limit,
                    self._settings.lease_seconds,
                    self._metrics,
                    self._unanswered,
                )
                self._metrics.database_reached()
                excess = await self._start(claimed.deliveries)
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
        """Admit parked deliveries, and return whether there were any."""
        self._slots.refresh()
        try:
            admitted = await self._admission.refill(
                self._capacity.admission_size_within_rate, busy=self._more_due.is_set()
            )
        except RETRYABLE_ERRORS as error:
            log.warning("refill_retried", error=repr(error))
            return False
        if admitted:
            self._wake_for_refill()
        return admitted

    def _wake_for_refill(self) -> None:
        """Wake the engine when the rate allows the next admission, because nothing else would."""
        if seconds := self._admission.seconds_until_next():
            self._listener.wake_in(seconds)

    async def _start(self, deliveries: Sequence[LeasedDelivery]) -> Sequence[LeasedDelivery]:
        """Start an attempt for each delivery whose config has a free slot; return the others."""
        if not deliveries:
            return ()
        claimed_at = monotonic()
        # One claim after the other, because each must see the slots and rates that are taken.
        async with self._starting:
            webhooks = await self._webhooks.for_deliveries(deliveries)
            starting, excess = await self._capacity.select(deliveries, webhooks)
            for delivery in starting:
                self._start_attempt(delivery, webhooks[delivery.webhook_id], claimed_at)
        self._admission.backlogs_met(d.webhook_id for d in deliveries if d.has_backlog)
        self._admission.backlogs_met(d.webhook_id for d in excess)
        self._admission.claimed(deliveries)
        return excess

    def _start_attempt(self, delivery: LeasedDelivery, webhook: Webhook, claimed_at: float) -> None:
        self._budget.attempt_started()
        self._metrics.in_flight.inc()
        task = asyncio.create_task(self._attempt(delivery, webhook, claimed_at))
        self._attempts[task] = delivery
        task.add_done_callback(self._on_attempt_done)

    async def _attempt(self, delivery: LeasedDelivery, webhook: Webhook, claimed_at: float) -> None:
        """Run one attempt: sign, send, decide, report, record."""
        # Database time plus the elapsed monotonic time, so that all engines use one clock.
        started_at = delivery.claimed_at + timedelta(seconds=monotonic() - claimed_at)
        works: bool | None = None
        report = self._reports.begin(delivery)
        try:
            result = await self._request(delivery, webhook, started_at, report.sent_trace_parent)
            works = endpoint_works(result.outcome, result.status_code)
        except Exception:
            log.exception("attempt_broke", delivery_id=format_id("dlv", delivery.id))
            detail = "Postrider could not make the request"
            result = AttemptResult(Outcome.INTERNAL_ERROR, None, detail)
        finally:
            if pause := self._slots.finished(webhook.id, works):
                self._listener.wake_in(pause)
        settlement = decide(delivery, webhook, self._settings, started_at, result)
        report.end(settlement, webhook.request_template)
        self._metrics.attempt_ended(delivery, settlement)
        pause = requested_pause_seconds(result, self._settings)
        self._recorder.put(settlement, self._breaker.decide(delivery, works, pause))

    async def _request(
        self,
        delivery: LeasedDelivery,
        webhook: Webhook,
        started_at: datetime,
        trace_parent: TraceParent | None,
    ) -> AttemptResult:
        """Sign and send. An unusable URL or secret ends the attempt without a request."""
        if webhook.request_template is None:
            return AttemptResult(Outcome.REFUSED, None, webhook.url_refusal)
        # Chosen by the database's time at the claim, so that all engines sign with the same keys.
        secrets = webhook.signing_secrets(delivery.claimed_at)
        if webhook.secret is None:
            detail = "Postrider could not read the signing secret"
            return AttemptResult(Outcome.INTERNAL_ERROR, None, detail)
        timestamp = int(started_at.timestamp())
        headers = sign(delivery, secrets, timestamp, webhook.header_prefix, trace_parent)
        timeout = webhook.timeout_seconds or self._settings.delivery_timeout_seconds
        # Below half of the lease: if the lease expired during the request, another engine would
        # send the event again.
        timeout = min(timeout, self._settings.lease_seconds / 2)
        return await send(
            self._client, webhook.request_template, headers, delivery.payload, timeout
        )

    def _on_attempt_done(self, task: asyncio.Task[None]) -> None:
        delivery = self._attempts.pop(task)
        self._metrics.in_flight.dec()
        self._budget.attempt_ended()
        if not task.cancelled() and (error := task.exception()):
            # A bug left no result to record. The lease expires and the delivery is retried.
            log.error("attempt_lost", delivery_id=format_id("dlv", delivery.id), exc_info=error)
            self._budget.results_recorded(1)

    def _on_settled(self, batch: Sequence[Settlement], settled: SettleResult) -> None:
        self._budget.results_recorded(len(batch))
        for settlement in batch:
            delivery_id = format_id("dlv", settlement.delivery_id)
            if settlement.delivery_id not in settled.delivery_ids:
                # Another engine has the delivery, or its config was deleted.
                self._metrics.leases_lost.inc()
                log.warning("lease_lost", delivery_id=delivery_id)
                continue
            if settlement.delivery_id in settled.outdated:
                log.info("attempt_outdated", delivery_id=delivery_id)
                self._listener.wake()
                continue
            self._metrics.settled(settlement)
            if settlement.final_state is None:
                self._listener.wake_in(settlement.next_attempt_in_seconds)
        for webhook_id, reason in settled.deactivated.items():
            self._metrics.deactivations[reason].inc()
            log.warning(
                "webhook_deactivated", webhook_id=format_id("wh", webhook_id), reason=reason.value
            )
        if settled.ended_chains or self._admission.can_refill(s.webhook_id for s in batch):
            self._listener.wake()

    async def _sweep_forever(self) -> None:
        """Run the work that every engine does for all, so that a dead engine leaves none undone."""
        last_chain: Chain | None = None
        for sweep in itertools.count():
            try:
                if sweep % _SWEEPS_BETWEEN_CLEANING == 0:
                    await erase_expired_secrets(self._pool)
                released = await self._unanswered.release(self._pool)
                reclaimed = await reclaim(self._pool)
                promoted, last_chain = await promote_stranded(self._pool, last_chain)
                self._slots.refresh()
                admitted = await self._admission.sweep(self._capacity.admission_size)
            except RETRYABLE_ERRORS as error:
                log.warning("sweep_retried", error=repr(error))
            else:
                self._metrics.database_reached()
                if released:
                    log.warning("unanswered_claims_released", deliveries=released)
                if reclaimed:
                    self._metrics.leases_reclaimed.inc(reclaimed)
                    log.warning("leases_reclaimed", deliveries=reclaimed)
                if admitted:
                    self._wake_for_refill()
                if released or reclaimed or promoted or admitted:
                    self._listener.wake()
            await asyncio.sleep(_SWEEP_SECONDS)

    async def _drain(self, deadline: float) -> Sequence[LeasedDelivery]:
        """Wait for open attempts until the deadline, then cancel the others and return them."""
        if self._attempts:
            log.info("draining", in_flight=len(self._attempts))
            remaining = deadline - asyncio.get_running_loop().time()
            await asyncio.wait(self._attempts, timeout=max(remaining, 0))
        unfinished = dict(self._attempts)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
        # An attempt that ended just before its cancellation has a result to record.
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
            # The leases expire later.
            log.warning("release_failed", error=repr(error))

    async def _record_the_rest(self, deadline: float) -> None:
        """Wait for the database until the deadline, because a supervisor would kill the process."""
        recording = asyncio.create_task(self._recorder.flush())
        await cancel_at(deadline, recording)
        if not recording.cancelled():
            recording.result()
        if self._recorder.pending:
            # These events are sent again with the same webhook-id after their leases expire.
            log.error("results_left_to_leases", deliveries=self._recorder.pending)


def _bursts(excess: Sequence[LeasedDelivery], limit: int) -> list[UUID]:
    """Return the configs that made up at least half of a full claim without a free slot.

    Enqueue parks bursts, but not events that become due at one `not_before`.
    """
    return [w for w, count in Counter(d.webhook_id for d in excess).items() if 2 * count >= limit]
