"""The main job: published over gRPC, delivered over TLS, on record."""

from standardwebhooks.webhooks import Webhook

from postrider.v1 import delivery_pb2, delivery_service_pb2
from tests.support.platform import Platform
from tests.support.receiver import Receiver


async def test_published_event_arrives_signed_and_recorded(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    async with platform.engine():
        published = await platform.publish('{"amount": 1}')
        [received] = await receiver.wait_for(1)

    assert published.event.delivery_count == 1
    assert received.body == b'{"amount": 1}'
    assert received.message_id == published.event.id
    Webhook(created.standard_webhooks_secret).verify(received.body, received.headers)
    listed = await platform.deliveries.ListDeliveries(
        delivery_service_pb2.ListDeliveriesRequest(), metadata=platform.merchant()
    )
    [delivery] = listed.deliveries
    assert delivery.state == delivery_pb2.DELIVERY_STATE_DELIVERED
    assert [a.outcome for a in delivery.attempts] == [delivery_pb2.OUTCOME_SUCCEEDED]
