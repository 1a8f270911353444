"""Every change a caller makes is on record, once and with it; refusals are in test_refusals."""

import asyncio
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp

from postrider.v1 import admin_service_pb2, webhook_config_service_pb2
from postrider.v1.delivery_service_pb2 import RedeliverDeliveryRequest
from postrider.v1.webhook_config_pb2 import EventType, WebhookConfig
from server.rpc.audit_refusals import CHANGES
from server.webhooks.rules import FIELDS
from tests.support.factories import fail_open_delivery
from tests.support.platform import Metadata, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refusal_of
from tests.support.rpcs import methods

pb = webhook_config_service_pb2

READING = ("Check", "Get", "List", "Ping", "Publish", "Stream", "Watch")


async def entries(pool: Any) -> list[dict[str, Any]]:
    rows = await pool.fetch("SELECT * FROM audit_entries ORDER BY id")
    return [dict(row) for row in rows]


def merchant(platform: Platform) -> Metadata:
    token = platform.token("webhooks:manage", merchant_id="m_1", subject="gateway")
    return [*bearer(token), ("x-request-id", "request-of-the-test")]


def operator(platform: Platform) -> Metadata:
    return bearer(platform.token("webhooks:admin", subject="operator-7"))


async def finished_delivery(pool: Any, platform: Platform) -> str:
    """The id of a delivery that was published now and failed at once."""
    await platform.publish()
    return await fail_open_delivery(pool)


def updating(config: WebhookConfig, *paths: str) -> pb.UpdateWebhookConfigRequest:
    return pb.UpdateWebhookConfigRequest(webhook_config=config, update_mask=FieldMask(paths=paths))


def updating_type(name: str) -> admin_service_pb2.UpdateEventTypeRequest:
    return admin_service_pb2.UpdateEventTypeRequest(
        event_type=EventType(name=name, deprecated=True),
        update_mask=FieldMask(paths=["deprecated"]),
    )


def redelivering() -> admin_service_pb2.RedeliverDeliveriesRequest:
    end = Timestamp()
    end.GetCurrentTime()
    return admin_service_pb2.RedeliverDeliveriesRequest(
        start_time=Timestamp(seconds=1), end_time=end, merchant_id="m_1"
    )


def test_every_rpc_either_only_reads_or_is_tried_here() -> None:
    names = {m.name for m in methods() if not m.name.startswith(READING)}
    assert names == CHANGES


async def test_each_change_has_one_entry_with_who_what_and_which_fields(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    me, op = merchant(platform), operator(platform)
    config = WebhookConfig(url=receiver.url, events=["payment.succeeded"])
    created = await platform.webhooks.CreateWebhookConfig(
        pb.CreateWebhookConfigRequest(webhook_config=config), metadata=me
    )
    webhook_id = created.webhook_config.id
    config.MergeFrom(WebhookConfig(id=webhook_id, description="new", active=False))
    config.retry_schedule.append(Duration(seconds=5))
    await platform.webhooks.UpdateWebhookConfig(
        updating(config, "url", "events", "description", "active", "retry_schedule"), metadata=me
    )
    await platform.admin.DeactivateWebhookConfig(
        admin_service_pb2.DeactivateWebhookConfigRequest(id=webhook_id, reason="Abuse"),
        metadata=op,
    )
    await platform.admin.ReactivateWebhookConfig(
        admin_service_pb2.ReactivateWebhookConfigRequest(id=webhook_id), metadata=op
    )
    delivery_id = await finished_delivery(pool, platform)
    await platform.deliveries.RedeliverDelivery(
        RedeliverDeliveryRequest(id=delivery_id), metadata=me
    )
    await fail_open_delivery(pool)
    await platform.admin.RedeliverDeliveries(redelivering(), metadata=op)
    await platform.webhooks.RotateSecret(pb.RotateSecretRequest(id=webhook_id), metadata=me)
    await platform.webhooks.DeleteWebhookConfig(
        pb.DeleteWebhookConfigRequest(id=webhook_id), metadata=me
    )
    await platform.admin.CreateEventType(
        admin_service_pb2.CreateEventTypeRequest(event_type=EventType(name="invoice.sent")),
        metadata=op,
    )
    await platform.admin.UpdateEventType(updating_type("invoice.sent"), metadata=op)
    before = await entries(pool)
    await platform.admin.EraseMerchant(
        admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"), metadata=op
    )
    # What erasing leaves of the others is for tests/server/admin/test_erasure.py.
    recorded = [*before, (await entries(pool))[-1]]

    every = sorted(FIELDS)
    reactivated = ["active", "consecutive_failures", "deactivation_reason"]
    assert [
        (e["actor"], e["merchant_id"], e["action"], e["resource"], e["changed_fields"])
        for e in recorded
    ] == [
        ("gateway", "m_1", "CreateWebhookConfig", webhook_id, every),
        (
            "gateway",
            "m_1",
            "UpdateWebhookConfig",
            webhook_id,
            ["active", "deactivation_reason", "description", "retry_schedule"],
        ),
        ("operator-7", "m_1", "DeactivateWebhookConfig", webhook_id, ["deactivation_reason"]),
        ("operator-7", "m_1", "ReactivateWebhookConfig", webhook_id, reactivated),
        ("gateway", "m_1", "RedeliverDelivery", delivery_id, []),
        ("operator-7", "m_1", "RedeliverDeliveries", "m_1", []),
        ("gateway", "m_1", "RotateSecret", webhook_id, ["secret"]),
        ("gateway", "m_1", "DeleteWebhookConfig", webhook_id, []),
        ("operator-7", None, "CreateEventType", "invoice.sent", ["description", "name"]),
        ("operator-7", None, "UpdateEventType", "invoice.sent", ["deprecated"]),
        ("operator-7", "m_1", "EraseMerchant", "m_1", []),
    ]
    assert {entry["action"] for entry in recorded} == CHANGES
    assert {entry["result"] for entry in recorded} == {"OK"}
    assert [e["request_id"] == "request-of-the-test" for e in recorded] == [
        entry["actor"] == "gateway" for entry in recorded
    ]


async def test_fields_of_an_entry_are_fields_of_the_contract(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    config.retry_schedule.append(Duration(seconds=5))
    await platform.webhooks.UpdateWebhookConfig(
        updating(config, "retry_schedule"), metadata=platform.merchant()
    )
    for entry in await entries(pool):
        assert set(entry["changed_fields"]) <= set(WebhookConfig.DESCRIPTOR.fields_by_name)


async def test_what_changed_nothing_is_not_on_record(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    webhooks, me = platform.webhooks, platform.merchant()
    before = await entries(pool)

    await webhooks.UpdateWebhookConfig(updating(config, "description", "active"), metadata=me)
    await platform.admin.ReactivateWebhookConfig(
        admin_service_pb2.ReactivateWebhookConfigRequest(id=config.id),
        metadata=platform.operator(),
    )
    await webhooks.PingWebhookConfig(pb.PingWebhookConfigRequest(id=config.id), metadata=me)

    assert await entries(pool) == before


async def test_an_entry_says_where_the_call_came_from(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    [entry] = await entries(pool)
    host, _, port = entry["caller_address"].rpartition(":")
    assert (host, port.isdigit()) == ("127.0.0.1", True)
    assert entry["user_agent"].startswith("grpc-python-asyncio/")


async def test_a_change_whose_entry_cannot_be_written_is_not_made(
    platform: Platform, receiver: Receiver, pool: Any, logged: list[Any]
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    delivery_id = await finished_delivery(pool, platform)
    paused = (await platform.register(receiver.url, active=False)).webhook_config
    before = await pool.fetch("SELECT * FROM webhook_configs ORDER BY id")
    await platform.publish()
    await pool.execute("ALTER TABLE audit_entries ADD CHECK (false) NOT VALID")
    me, op = platform.merchant(), platform.operator()
    changed = WebhookConfig(id=config.id, active=False)
    calls: tuple[Any, ...] = (
        platform.register(receiver.url),
        platform.webhooks.UpdateWebhookConfig(updating(changed, "active"), metadata=me),
        platform.webhooks.RotateSecret(pb.RotateSecretRequest(id=config.id), metadata=me),
        platform.webhooks.DeleteWebhookConfig(
            pb.DeleteWebhookConfigRequest(id=config.id), metadata=me
        ),
        platform.admin.ReactivateWebhookConfig(
            admin_service_pb2.ReactivateWebhookConfigRequest(id=paused.id), metadata=op
        ),
        platform.admin.CreateEventType(
            admin_service_pb2.CreateEventTypeRequest(event_type=EventType(name="invoice.sent")),
            metadata=op,
        ),
        platform.deliveries.RedeliverDelivery(
            RedeliverDeliveryRequest(id=delivery_id), metadata=me
        ),
        platform.admin.DeactivateWebhookConfig(
            admin_service_pb2.DeactivateWebhookConfigRequest(id=config.id, reason="Abuse"),
            metadata=op,
        ),
        platform.admin.RedeliverDeliveries(redelivering(), metadata=op),
        platform.admin.UpdateEventType(updating_type("payment.succeeded"), metadata=op),
        platform.admin.EraseMerchant(
            admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"), metadata=op
        ),
    )
    assert len(calls) == len(CHANGES)
    for call in calls:
        await refusal_of(call)

    assert await pool.fetch("SELECT * FROM webhook_configs ORDER BY id") == before
    states = await pool.fetch("SELECT state, webhook_id FROM delivery_queue ORDER BY state")
    assert [row["state"] for row in states] == ["parked", "ready"]
    assert not await pool.fetchval("SELECT count(*) FROM event_types WHERE name = 'invoice.sent'")
    assert not await pool.fetchval("SELECT count(*) FROM event_types WHERE deprecated")
    assert not await pool.fetchval("SELECT count(*) FROM events WHERE payload = ''")


async def test_each_of_many_changes_at_once_is_on_record_under_its_own_caller(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config

    async def change(number: int) -> None:
        token = platform.token("webhooks:manage", merchant_id="m_1", subject=f"caller-{number}")
        await platform.webhooks.UpdateWebhookConfig(
            updating(WebhookConfig(id=config.id, description=f"{number}"), "description"),
            metadata=[*bearer(token), ("x-request-id", f"request-{number}")],
        )

    await asyncio.gather(*(change(number) for number in range(12)))

    _, *changes = await entries(pool)
    assert {(e["actor"], e["request_id"]) for e in changes} == {
        (f"caller-{number}", f"request-{number}") for number in range(12)
    }
    assert len(changes) == 12
