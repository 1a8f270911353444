"""An id of another merchant is answered exactly like an unknown id and changes nothing."""

from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status

from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.factories import fail_open_delivery
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.rpcs import MERCHANT_SERVICES, call, methods, name_of

#: The server assigns the id of a new config, so the id in the request has no effect.
WITHOUT_ID = {("WebhookConfigService.CreateWebhookConfig", "webhook_config.id")}
TABLES = (
    "webhook_configs",
    "events",
    "delivery_queue",
    "finished_deliveries",
    "attempts",
    # Refusals are audited too, but change nothing else.
    "audit_entries WHERE result = 'OK'",
    "idempotency_keys",
)


@pytest.fixture
async def owned(platform: Platform, receiver: Receiver) -> dict[str, str]:
    """Ids of the merchant m_2. The caller of the tests is m_1."""
    webhook_id = (await platform.register(receiver.url, "m_2")).webhook_config.id
    event_id = (await platform.publish(merchant_id="m_2")).event.id
    [delivery] = (await platform.as_merchant("m_2").ListDeliveries()).deliveries
    return {"webhook_id": webhook_id, "event_id": event_id, "delivery_id": delivery.id}


def id_of(owned: dict[str, str], name: str, field: str) -> str:
    """The id of m_2 that belongs into a field of an RPC."""
    if field in owned:
        return owned[field]
    return owned["delivery_id" if name.startswith("DeliveryService.") else "webhook_id"]


def fields_with_ids(message: Descriptor, prefix: str = "") -> set[str]:
    found = set()
    for field in message.fields:
        path = f"{prefix}{field.name}"
        if field.message_type is not None and not prefix:
            found |= fields_with_ids(field.message_type, f"{path}.")
        elif field.name in {"id", "webhook_id", "event_id", "delivery_id"}:
            found.add(path)
    return found


#: Each RPC of merchants with each field that holds an id.
ID_FIELDS = sorted(
    {
        (name_of(method), field)
        for method in methods()
        if method.containing_service.name in MERCHANT_SERVICES
        for field in fields_with_ids(method.input_type)
    }
    - WITHOUT_ID
)


async def answer_to(
    platform: Platform, name: str, field: str, text: str, merchant_id: str = "m_1"
) -> tuple[Any, ...]:
    """The whole answer: the message, or code, message, details and trailing metadata.

    The request succeeds for the owner of the id.
    """
    fields: dict[str, Any] = {field: text}
    if field == "webhook_config.id":
        config = WebhookConfig(id=text, description="changed", active=False)
        mask = FieldMask(paths=["description", "active"])
        fields = {"webhook_config": config, "update_mask": mask}
    [method] = [method for method in methods() if name_of(method) == name]
    request = GetMessageClass(method.input_type)(**fields)
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


async def test_foreign_id_is_answered_like_an_unknown_id(
    platform: Platform, owned: dict[str, str], receiver: Receiver, pool: Any
) -> None:
    assert len(ID_FIELDS) >= 10
    before = await contents(pool)
    for name, field in ID_FIELDS:
        foreign = id_of(owned, name, field)
        unknown = foreign[:-32] + "0" * 32
        to_foreign = await answer_to(platform, name, field, foreign)
        to_unknown = await answer_to(platform, name, field, unknown)
        without_ids = str(to_foreign).replace(foreign, "ID")
        assert without_ids == str(to_unknown).replace(unknown, "ID"), name
        assert to_foreign[0] == ("OK" if name.endswith("ListDeliveries") else "NOT_FOUND")
        assert "m_2" not in without_ids
        assert receiver.url not in without_ids
    assert await contents(pool) == before
    assert len(receiver.requests) == 1


async def test_owner_gets_an_answer_to_the_same_requests(
    platform: Platform, owned: dict[str, str], pool: Any
) -> None:
    # Only finished deliveries can be redelivered.
    await fail_open_delivery(pool)
    # The deletion is last, because the other calls need the config.
    for name, field in sorted(ID_FIELDS, key=lambda rpc: "Delete" in rpc[0]):
        code, answer, *_ = await answer_to(platform, name, field, id_of(owned, name, field), "m_2")
        assert code == "OK", answer
        assert answer


async def test_malformed_id_is_not_found(platform: Platform, owned: dict[str, str]) -> None:
    for name, field in ID_FIELDS:
        if field not in {"id", "webhook_config.id"}:
            continue
        for text in (
            "",
            owned["event_id"],
            id_of(owned, name, field).upper(),
            id_of(owned, name, field) + " ",
            id_of(owned, name, field)[3:],
            "wh_\x00",
            "wh_" + "g" * 32,
            "\u202ewh_",
            "x" * 1_000_000,
        ):
            assert (await answer_to(platform, name, field, text))[0] == "NOT_FOUND", name


async def test_lists_contain_only_the_merchants_own_rows(
    platform: Platform, owned: dict[str, str], receiver: Receiver
) -> None:
    own_id = (await platform.register(receiver.url, "m_1")).webhook_config.id
    await platform.publish(merchant_id="m_1")
    configs = (await platform.as_merchant("m_1").ListWebhookConfigs()).webhook_configs
    assert [config.id for config in configs] == [own_id]
    async with platform.engine():
        await receiver.wait_for(2)
    assert [delivery.webhook_id for delivery in await platform.list_deliveries()] == [own_id]


async def test_merchant_comes_from_the_token_not_the_request(
    platform: Platform, receiver: Receiver
) -> None:
    config = WebhookConfig(url=receiver.url, events=["payment.succeeded"], merchant_id="m_2")
    calls = platform.calls(
        [*platform.merchant("m_1"), ("merchant_id", "m_2"), ("x-merchant-id", "m_2")]
    )
    created = await calls.CreateWebhookConfig(webhook_config=config)
    assert created.webhook_config.merchant_id == "m_1"
