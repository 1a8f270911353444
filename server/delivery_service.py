"""DeliveryService: a merchant's deliveries and their attempts, read only."""

from typing import Any
from uuid import UUID

import grpc

from core.db import Pool
from postrider.v1 import delivery_service_pb2, delivery_service_pb2_grpc
from server import convert
from server.authentication import principal
from server.history import DeliveryFilter, attempts_of, find_delivery, list_deliveries
from server.pagination import page_size, page_token, parse_page_token
from server.principal import Scope

type Context = grpc.aio.ServicerContext[Any, Any]
pb = delivery_service_pb2


class DeliveryService(delivery_service_pb2_grpc.DeliveryServiceServicer):
    """Every read carries the merchant; a foreign id is an unknown id."""

    def __init__(self, pool: Pool):
        self._pool = pool

    async def GetDelivery(
        self, request: pb.GetDeliveryRequest, context: Context
    ) -> pb.GetDeliveryResponse:
        merchant_id = _merchant()
        delivery_id = convert.id_of("dlv", request.id)
        row = await find_delivery(self._pool, merchant_id, delivery_id)
        if row is None:
            raise convert.not_found("dlv", request.id)
        attempts = await attempts_of(self._pool, [row.id])
        [delivery] = convert.delivery_messages([row], attempts)
        return pb.GetDeliveryResponse(delivery=delivery)

    async def ListDeliveries(
        self, request: pb.ListDeliveriesRequest, context: Context
    ) -> pb.ListDeliveriesResponse:
        merchant_id = _merchant()
        size = page_size(request.page_size, default=50, maximum=100)
        identity = ("deliveries", merchant_id, request.webhook_id, request.event_id, request.state)
        before = parse_page_token(request.page_token, UUID, *identity)
        wanted = DeliveryFilter(
            webhook_id=convert.optional_id_of("wh", request.webhook_id, "webhook_id"),
            event_id=convert.optional_id_of("evt", request.event_id, "event_id"),
            state=convert.delivery_state_filter(request.state),
            before=before,
        )
        rows = await list_deliveries(self._pool, merchant_id, wanted, size + 1)
        page = rows[:size]
        attempts = await attempts_of(self._pool, [row.id for row in page])
        return pb.ListDeliveriesResponse(
            deliveries=convert.delivery_messages(page, attempts),
            next_page_token=page_token(page[-1].id.hex, *identity) if len(rows) > size else "",
        )


def _merchant() -> str:
    caller = principal()
    caller.require(Scope.MANAGE)
    return caller.merchant()
