"""DeliveryService: lists, shows, watches and redelivers a merchant's deliveries."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any
from uuid import UUID

import grpc

from core import queue
from core.encryption import KeyRing
from core.errors import FailedPrecondition
from core.ids import format_id
from core.lifecycle import OPEN_STATES
from core.postgres.protocols import Pool
from postrider.v1 import delivery_service_pb2, delivery_service_pb2_grpc
from server.auth.principal import Scope
from server.auth.rate_limits import StreamSlots
from server.database import Sessions, driver_connection
from server.deliveries.convert import (
    delivery_message,
    delivery_messages,
    delivery_state_filter,
    watch_message,
)
from server.deliveries.store import (
    DeliveryFilter,
    DeliveryRow,
    attempts_of,
    find_delivery,
    has_webhook,
    list_deliveries,
)
from server.deliveries.tail import Tail, Watcher, newest_position, take_snapshot
from server.deliveries.watch import ResumeTokens, Watch
from server.event_types.rules import event_type_filter
from server.metrics import ServerMetrics
from server.notify import Notifier
from server.rpc.audit import record_change
from server.rpc.authenticate import principal
from server.rpc.ids import id_of, not_found, optional_id_of
from server.rpc.pagination import fitting, page_size, page_token, parse_page_token
from server.rpc.times import time_range

type Context = grpc.aio.ServicerContext[Any, Any]
pb = delivery_service_pb2


class DeliveryService(delivery_service_pb2_grpc.DeliveryServiceServicer):
    """Every query names the merchant, so another merchant's id is an unknown id."""

    def __init__(
        self,
        pool: Pool,
        sessions: Sessions,
        notifier: Notifier,
        *,
        tail: Tail,
        metrics: ServerMetrics,
        keyring: KeyRing,
        stream_slots: StreamSlots,
        watch_keep_alive_seconds: float,
        watch_backlog: int,
    ):
        self._pool = pool
        self._sessions = sessions
        self._notifier = notifier
        self._tail = tail
        self._metrics = metrics
        self._keyring = keyring
        self._stream_slots = stream_slots
        self._watch_keep_alive_seconds = watch_keep_alive_seconds
        self._watch_backlog = watch_backlog

    async def GetDelivery(
        self, request: pb.GetDeliveryRequest, context: Context
    ) -> pb.GetDeliveryResponse:
        merchant_id = _merchant()
        row = await self._find(merchant_id, request.id)
        attempts = await attempts_of(self._pool, [row.id])
        [delivery] = delivery_messages([row], attempts)
        return pb.GetDeliveryResponse(delivery=delivery)

    async def ListDeliveries(
        self, request: pb.ListDeliveriesRequest, context: Context
    ) -> pb.ListDeliveriesResponse:
        merchant_id = _merchant()
        size = page_size(request.page_size, default=50, maximum=100)
        start_at, end_at = time_range(request)
        identity = (
            "deliveries",
            merchant_id,
            request.webhook_id,
            request.event_id,
            request.state,
            request.event_type,
            start_at,
            end_at,
        )
        before = parse_page_token(request.page_token, UUID, *identity)
        wanted = DeliveryFilter(
            webhook_id=optional_id_of("wh", request.webhook_id, "webhook_id"),
            event_id=optional_id_of("evt", request.event_id, "event_id"),
            state=delivery_state_filter(request.state),
            event_type=event_type_filter(request.event_type),
            start_at=start_at,
            end_at=end_at,
            before=before,
        )
        rows = await list_deliveries(self._pool, merchant_id, wanted, size + 1)
        attempts = await attempts_of(self._pool, [row.id for row in rows[:size]])
        page = fitting(delivery_messages(rows[:size], attempts))
        more = len(rows) > len(page)
        return pb.ListDeliveriesResponse(
            deliveries=page,
            next_page_token=page_token(rows[len(page) - 1].id.hex, *identity) if more else "",
        )

    async def RedeliverDelivery(
        self, request: pb.RedeliverDeliveryRequest, context: Context
    ) -> pb.RedeliverDeliveryResponse:
        merchant_id = _merchant()
        row = await self._find(merchant_id, request.id)
        if row.state in OPEN_STATES:
            raise FailedPrecondition(
                f"this delivery is {row.state} and will be attempted without a redelivery: wait "
                "until it is finished",
                reason="DELIVERY_OPEN",
            )
        # Completed even if the caller cancels, because it would not know whether it is sent.
        made = await asyncio.shield(asyncio.create_task(self._redeliver(merchant_id, row.id)))
        self._notifier.notify()
        return pb.RedeliverDeliveryResponse(delivery=delivery_message(made, ()))

    async def WatchDeliveries(
        self, request: pb.WatchDeliveriesRequest, context: Context
    ) -> AsyncIterator[pb.WatchDeliveriesResponse]:
        merchant_id = _merchant()
        webhook_id = optional_id_of("wh", request.webhook_id, "webhook_id")
        event_type = event_type_filter(request.event_type)
        tokens = ResumeTokens(self._keyring, merchant_id, webhook_id, event_type)
        resumed = tokens.open(request.resume_token) if request.resume_token else None
        if webhook_id is not None and not await has_webhook(self._pool, merchant_id, webhook_id):
            raise not_found("wh", request.webhook_id)
        start = resumed or await newest_position(self._pool)
        since = await take_snapshot(self._pool) if resumed is None else None
        watch = Watch(
            self._pool,
            self._tail,
            Watcher(merchant_id, webhook_id, event_type, self._watch_backlog),
            since=since,
            keep_alive_seconds=self._watch_keep_alive_seconds,
            expires_at=principal().expires_at,
        )
        with self._stream_slots.slot(merchant_id):
            self._metrics.watchers.inc()
            try:
                async with aclosing(watch.follow(start)) as items:
                    async for news in items:
                        yield watch_message(news.recorded, tokens.seal(news.position))
            finally:
                self._metrics.watchers.dec()

    async def _find(self, merchant_id: str, text: str) -> DeliveryRow:
        row = await find_delivery(self._pool, merchant_id, id_of("dlv", text))
        if row is None:
            raise not_found("dlv", text)
        return row

    async def _redeliver(self, merchant_id: str, delivery_id: UUID) -> DeliveryRow:
        async with self._sessions.begin() as session:
            record_change(
                session,
                action="RedeliverDelivery",
                resource=format_id("dlv", delivery_id),
                merchant_id=merchant_id,
            )
            await session.flush()
            connection = await driver_connection(session)
            made = await queue.redeliver(connection, merchant_id, delivery_id)
            row = await find_delivery(connection, merchant_id, made) if made else None
            if row is None:
                raise FailedPrecondition(
                    "this delivery cannot be repeated: its webhook config is deleted, or its event "
                    "is no longer stored: publish the event again",
                    reason="REDELIVERY_IMPOSSIBLE",
                )
        return row


def _merchant() -> str:
    caller = principal()
    caller.require(Scope.MANAGE)
    return caller.merchant()
