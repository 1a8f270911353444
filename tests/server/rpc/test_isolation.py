"""Another merchant's id answers exactly as an unknown id does, and nothing comes of asking."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from grpc_status import rpc_status

from postrider.v1 import delivery_service_pb2, webhook_config_service_pb2
from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.factories import fail_open_delivery
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.rpcs import call, methods, name_of

configs, deliveries = webhook_config_service_pb2, delivery_service_pb2

# A request that would succeed for the owner, by RPC and the field the id is in.
REQUESTS: dict[tuple[str, str], Callable[[str], Message]] = {
    ("WebhookConfigService.GetWebhookConfig", "id"): lambda text: configs.GetWebhookConfigRequest(
        id=text
    ),
    ("WebhookConfigService.UpdateWebhookConfig", "webhook_config.id"): lambda text: (
        configs.UpdateWebhookConfigRequest(
            webhook_config=WebhookConfig(id=text, description="mine now", active=False),
            update_mask=FieldMask(paths=["description", "active"]),
        )
    ),
    ("WebhookConfigService.DeleteWebhookConfig", "id"): lambda text: (
        configs.DeleteWebhookConfigRequest(id=text)
    ),
    ("WebhookConfigService.RotateSecret", "id"): lambda text: configs.RotateSecretRequest(id=text),
    ("WebhookConfigService.PingWebhookConfig", "id"): lambda text: configs.PingWebhookConfigRequest(
        id=text
    ),
    ("DeliveryService.GetDelivery", "id"): lambda text: deliveries.GetDeliveryRequest(id=text),
    ("DeliveryService.RedeliverDelivery", "id"): lambda text: deliveries.RedeliverDeliveryRequest(
        id=text
    ),
    ("DeliveryService.WatchDeliveries", "webhook_id"): lambda text: (
        deliveries.WatchDeliveriesRequest(webhook_id=text)
    ),
    ("DeliveryService.ListDeliveries", "webhook_id"): lambda text: deliveries.ListDeliveriesRequest(
        webhook_id=text
    ),
    ("DeliveryService.ListDeliveries", "event_id"): lambda text: deliveries.ListDeliveriesRequest(
        event_id=text
    ),
}
# What a create makes has an id of ours, whatever was sent; operators act for every merchant.
NOT_ABOUT_AN_ID = {("WebhookConfigService.CreateWebhookConfig", "webhook_config.id")}
TABLES = (
    "webhook_configs",
    "events",
    "delivery_queue",
    "finished_deliveries",
    "attempts",
    # Attempts that are refused are on record as well, and no change.
    "audit_entries WHERE result = 'OK'",
    "idempotency_keys",
)


@dataclass(frozen=True)
class Owned:
    """Ids of the merchant m_2 that exist; the caller is m_1."""

    webhook: str
    event: str
    delivery: str

    def of(self, method: str, field: str) -> str:
        kind = field.removesuffix("_id") if field.endswith("_id") else ""
        return {
            "webhook": self.webhook,
            "event": self.event,
            "": self.delivery if method.startswith("DeliveryService.") else self.webhook,
        }[kind]


@pytest.fixture
async def owned(platform: Platform, receiver: Receiver) -> Owned:
    webhook_id = (await platform.register(receiver.url, "m_2")).webhook_config.id
    event_id = (await platform.publish(merchant_id="m_2")).event.id
    listed = await platform.deliveries.ListDeliveries(
        deliveries.ListDeliveriesRequest(), metadata=platform.merchant("m_2")
    )
    return Owned(webhook_id, event_id, listed.deliveries[0].id)


def fields_with_ids(message: Descriptor, prefix: str = "") -> set[str]:
    found = set()
    for field in message.fields:
        path = f"{prefix}{field.name}"
        if field.message_type is not None and not prefix:
            found |= fields_with_ids(field.message_type, f"{path}.")
        elif field.name in {"id", "webhook_id", "event_id", "delivery_id"}:
            found.add(path)
    return found


async def answer_to(
    platform: Platform, name: str, request: Message, merchant_id: str = "m_1"
) -> tuple[Any, ...]:
    """All of an answer: the message, or code, text, details and trailing metadata."""
    [method] = [method for method in methods() if name_of(method) == name]
    try:
        answer = await call(platform.channel, method, request, platform.merchant(merchant_id))
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        keys = sorted(key for key, _ in error.trailing_metadata() or ())
        return (error.code().name, str(status), keys)
    return ("OK", str(answer))


async def contents(pool: Any) -> list[Any]:
    return [
        [str(row) for row in await pool.fetch(f"SELECT * FROM {table} ORDER BY 1")]  # noqa: S608
        for table in TABLES
    ]


def test_every_rpc_of_merchants_that_takes_an_id_is_tried_here() -> None:
    taking = {
        (name_of(method), field)
        for method in methods()
        if method.containing_service.name not in {"AdminService", "EventService"}
        for field in fields_with_ids(method.input_type)
    }
    assert taking - NOT_ABOUT_AN_ID == set(REQUESTS)


async def test_a_foreign_id_answers_exactly_as_an_unknown_one_and_changes_nothing(
    platform: Platform, owned: Owned, receiver: Receiver, pool: Any
) -> None:
    before = await contents(pool)
    for (name, field), request in REQUESTS.items():
        foreign = owned.of(name, field)
        unknown = foreign[:-32] + "0" * 32
        to_foreign = await answer_to(platform, name, request(foreign))
        to_unknown = await answer_to(platform, name, request(unknown))
        without_ids = str(to_foreign).replace(foreign, "ID")
        assert without_ids == str(to_unknown).replace(unknown, "ID"), name
        assert to_foreign[0] == ("OK" if name.endswith("ListDeliveries") else "NOT_FOUND")
        assert "m_2" not in without_ids
        assert receiver.url not in without_ids
    assert await contents(pool) == before
    assert len(receiver.requests) == 1


async def test_the_owner_is_answered_on_the_same_requests(
    platform: Platform, owned: Owned, pool: Any
) -> None:
    # Only what is finished is delivered again.
    await fail_open_delivery(pool)
    # Deleting comes last, since the others need the config.
    for (name, field), request in sorted(REQUESTS.items(), key=lambda item: "Delete" in item[0][0]):
        foreign = owned.of(name, field)
        code, answer, *_ = await answer_to(platform, name, request(foreign), "m_2")
        assert code == "OK", answer
        assert answer


async def test_an_id_of_a_wrong_kind_or_form_is_an_unknown_id(
    platform: Platform, owned: Owned
) -> None:
    for (name, field), request in REQUESTS.items():
        if field not in {"id", "webhook_config.id"}:
            continue
        for text in (
            "",
            owned.event,
            owned.of(name, field).upper(),
            owned.of(name, field) + " ",
            owned.of(name, field)[3:],
            "wh_\x00",
            "wh_" + "g" * 32,
            "\u202ewh_",
            "x" * 1_000_000,
        ):
            assert (await answer_to(platform, name, request(text)))[0] == "NOT_FOUND", name


async def test_lists_hold_only_what_is_the_merchants_own(
    platform: Platform, owned: Owned, receiver: Receiver
) -> None:
    mine = await platform.register(receiver.url, "m_1")
    await platform.publish(merchant_id="m_1")
    configs_listed = await platform.webhooks.ListWebhookConfigs(
        configs.ListWebhookConfigsRequest(), metadata=platform.merchant("m_1")
    )
    assert [c.id for c in configs_listed.webhook_configs] == [mine.webhook_config.id]
    async with platform.engine():
        await receiver.wait_for(2)
    listed = await platform.deliveries.ListDeliveries(
        deliveries.ListDeliveriesRequest(), metadata=platform.merchant("m_1")
    )
    assert [d.webhook_id for d in listed.deliveries] == [mine.webhook_config.id]


async def test_the_merchant_is_the_tokens_and_not_what_the_request_says(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.webhooks.CreateWebhookConfig(
        configs.CreateWebhookConfigRequest(
            webhook_config=WebhookConfig(
                url=receiver.url, events=["payment.succeeded"], merchant_id="m_2"
            )
        ),
        metadata=[*platform.merchant("m_1"), ("merchant_id", "m_2"), ("x-merchant-id", "m_2")],
    )
    assert created.webhook_config.merchant_id == "m_1"
