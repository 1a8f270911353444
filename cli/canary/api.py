"""The calls of a canary, with two tokens that are read for each call."""

from collections.abc import Callable

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from postrider.v1 import (
    delivery_pb2,
    delivery_service_pb2,
    delivery_service_pb2_grpc,
    event_pb2,
    event_service_pb2,
    event_service_pb2_grpc,
    webhook_config_pb2,
    webhook_config_service_pb2,
    webhook_config_service_pb2_grpc,
)

_CALL_SECONDS = 20
pb = webhook_config_service_pb2

type Token = Callable[[], str]


class CanaryApi:
    """Calls as a merchant (`manage`) and as a platform service (`publish`)."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        merchant_id: str,
        event_type: str,
        publish: Token,
        manage: Token,
    ):
        self._channel = channel
        self._merchant_id = merchant_id
        self._event_type = event_type
        self._publish = publish
        self._manage = manage
        self._webhooks = webhook_config_service_pb2_grpc.WebhookConfigServiceStub(channel)
        self._events = event_service_pb2_grpc.EventServiceStub(channel)
        self._deliveries = delivery_service_pb2_grpc.DeliveryServiceStub(channel)

    async def close(self) -> None:
        await self._channel.close()

    async def list_configs(self) -> list[webhook_config_pb2.WebhookConfig]:
        request = pb.ListWebhookConfigsRequest(page_size=100)
        found: list[webhook_config_pb2.WebhookConfig] = []
        while True:
            page = await self._webhooks.ListWebhookConfigs(
                request, metadata=_bearer(self._manage), timeout=_CALL_SECONDS
            )
            found += page.webhook_configs
            if not page.next_page_token:
                return found
            request.page_token = page.next_page_token

    async def create(self, url: str, description: str) -> pb.CreateWebhookConfigResponse:
        config = webhook_config_pb2.WebhookConfig(
            url=url, events=[self._event_type], description=description
        )
        return await self._webhooks.CreateWebhookConfig(
            pb.CreateWebhookConfigRequest(webhook_config=config),
            metadata=_bearer(self._manage),
            timeout=_CALL_SECONDS,
        )

    async def delete(self, webhook_id: str) -> None:
        await self._webhooks.DeleteWebhookConfig(
            pb.DeleteWebhookConfigRequest(id=webhook_id),
            metadata=_bearer(self._manage),
            timeout=_CALL_SECONDS,
        )

    async def rotate(self, webhook_id: str) -> pb.RotateSecretResponse:
        request = pb.RotateSecretRequest(id=webhook_id, overlap=Duration(seconds=3600))
        return await self._webhooks.RotateSecret(
            request, metadata=_bearer(self._manage), timeout=_CALL_SECONDS
        )

    async def set_active(self, webhook_id: str, *, active: bool) -> None:
        await self._webhooks.UpdateWebhookConfig(
            pb.UpdateWebhookConfigRequest(
                webhook_config=webhook_config_pb2.WebhookConfig(id=webhook_id, active=active),
                update_mask=FieldMask(paths=["active"]),
            ),
            metadata=_bearer(self._manage),
            timeout=_CALL_SECONDS,
        )

    async def publish(self, idempotency_key: str) -> event_service_pb2.PublishEventResponse:
        event = event_pb2.EventInput(
            merchant_id=self._merchant_id,
            type=self._event_type,
            payload_text='{"canary": true}',
            idempotency_key=idempotency_key,
        )
        return await self._events.PublishEvent(
            event_service_pb2.PublishEventRequest(event=event),
            metadata=_bearer(self._publish),
            timeout=_CALL_SECONDS,
        )

    async def deliveries(self, webhook_id: str, event_id: str) -> list[delivery_pb2.Delivery]:
        response = await self._deliveries.ListDeliveries(
            delivery_service_pb2.ListDeliveriesRequest(webhook_id=webhook_id, event_id=event_id),
            metadata=_bearer(self._manage),
            timeout=_CALL_SECONDS,
        )
        return list(response.deliveries)

    async def delivery(self, delivery_id: str) -> delivery_pb2.Delivery:
        response = await self._deliveries.GetDelivery(
            delivery_service_pb2.GetDeliveryRequest(id=delivery_id),
            metadata=_bearer(self._manage),
            timeout=_CALL_SECONDS,
        )
        return response.delivery


def _bearer(token: Token) -> tuple[tuple[str, str], ...]:
    value = token()
    return (("authorization", f"Bearer {value}"),) if value else ()
