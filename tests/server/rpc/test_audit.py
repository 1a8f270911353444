"""Each change has one audit entry, written in the same transaction as the change."""

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask

from postrider.v1.webhook_config_pb2 import EventType, WebhookConfig
from server.rpc.audit_refusals import CHANGES
from server.webhooks.rules import FIELDS
from tests.support.factories import count_rows, fail_open_delivery
from tests.support.platform import Calls, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refusal_of
from tests.support.rpcs import methods

READING = ("Check", "Get", "List", "Ping", "Publish", "Stream", "Watch")
REACTIVATED = ["active", "consecutive_failures", "deactivation_reason"]


@pytest.fixture
async def config(platform: Platform, receiver: Receiver) -> WebhookConfig:
    """A webhook config of m_1, created before the test."""
    return (await platform.register(receiver.url)).webhook_config


async def entries(pool: Any) -> list[dict[str, Any]]:
    rows = await pool.fetch("SELECT * FROM audit_entries ORDER BY id")
    return [dict(row) for row in rows]


def merchant(platform: Platform, subject: str = "gateway", request_id: str = "request-1") -> Calls:
    token = platform.token("webhooks:manage", merchant_id="m_1", subject=subject)
    return platform.calls([*bearer(token), ("x-request-id", request_id)])


async def update(calls: Calls, config: WebhookConfig, *paths: str) -> None:
    await calls.UpdateWebhookConfig(webhook_config=config, update_mask=FieldMask(paths=paths))


async def deprecate(calls: Calls, name: str) -> None:
    await calls.UpdateEventType(
        event_type=EventType(name=name, deprecated=True),
        update_mask=FieldMask(paths=["deprecated"]),
    )


async def redeliver_all(calls: Calls) -> None:
    await calls.RedeliverDeliveries(
        start_time=datetime.fromtimestamp(1, UTC), end_time=datetime.now(UTC), merchant_id="m_1"
    )


def test_each_changing_rpc_is_audited() -> None:
    names = {m.name for m in methods() if not m.name.startswith(READING)}
    assert names == CHANGES


async def test_entry_names_actor_action_resource_and_fields(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    me = merchant(platform)
    operator = platform.calls(bearer(platform.token("webhooks:admin", subject="operator-7")))
    config = WebhookConfig(url=receiver.url, events=["payment.succeeded"])
    created = await me.CreateWebhookConfig(webhook_config=config)
    webhook_id = created.webhook_config.id
    config.MergeFrom(WebhookConfig(id=webhook_id, description="new", active=False))
    config.retry_schedule.append(Duration(seconds=5))
    await update(me, config, "url", "events", "description", "active", "retry_schedule")
    await operator.DeactivateWebhookConfig(id=webhook_id, reason="Abuse")
    await operator.ReactivateWebhookConfig(id=webhook_id)
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    await me.RedeliverDelivery(id=delivery_id)
    await fail_open_delivery(pool)
    await redeliver_all(operator)
    await me.RotateSecret(id=webhook_id)
    await me.DeleteWebhookConfig(id=webhook_id)
    await operator.CreateEventType(event_type=EventType(name="invoice.sent"))
    await deprecate(operator, "invoice.sent")
    before = await entries(pool)
    await operator.EraseMerchant(merchant_id="m_1")
    # The erasure also changes the earlier entries of m_1.
    recorded = [*before, (await entries(pool))[-1]]

    updated = ["active", "deactivation_reason", "description", "retry_schedule"]
    expected = [
        ("gateway", "m_1", "CreateWebhookConfig", webhook_id, sorted(FIELDS)),
        ("gateway", "m_1", "UpdateWebhookConfig", webhook_id, updated),
        ("operator-7", "m_1", "DeactivateWebhookConfig", webhook_id, ["deactivation_reason"]),
        ("operator-7", "m_1", "ReactivateWebhookConfig", webhook_id, REACTIVATED),
        ("gateway", "m_1", "RedeliverDelivery", delivery_id, []),
        ("operator-7", "m_1", "RedeliverDeliveries", "m_1", []),
        ("gateway", "m_1", "RotateSecret", webhook_id, ["secret"]),
        ("gateway", "m_1", "DeleteWebhookConfig", webhook_id, []),
        ("operator-7", None, "CreateEventType", "invoice.sent", ["description", "name"]),
        ("operator-7", None, "UpdateEventType", "invoice.sent", ["deprecated"]),
        ("operator-7", "m_1", "EraseMerchant", "m_1", []),
    ]
    names = ("actor", "merchant_id", "action", "resource", "changed_fields")
    assert [tuple(entry[name] for name in names) for entry in recorded] == expected
    assert {entry["action"] for entry in recorded} == CHANGES
    assert {entry["result"] for entry in recorded} == {"OK"}
    for entry in recorded:
        assert (entry["request_id"] == "request-1") is (entry["actor"] == "gateway")
        host, _, port = entry["caller_address"].rpartition(":")
        assert (host, port.isdigit()) == ("127.0.0.1", True)
        assert entry["user_agent"].startswith("grpc-python-asyncio/")
    assert set(FIELDS) <= set(WebhookConfig.DESCRIPTOR.fields_by_name)


async def test_call_without_change_has_no_entry(
    platform: Platform, config: WebhookConfig, pool: Any
) -> None:
    before = await entries(pool)

    await update(platform.as_merchant(), config, "description", "active")
    await platform.as_operator().ReactivateWebhookConfig(id=config.id)
    await platform.as_merchant().PingWebhookConfig(id=config.id)

    assert await entries(pool) == before


async def test_change_fails_if_its_entry_cannot_be_written(
    platform: Platform, receiver: Receiver, config: WebhookConfig, pool: Any, logged: list[Any]
) -> None:
    await platform.publish()
    delivery_id = await fail_open_delivery(pool)
    paused = (await platform.register(receiver.url, active=False)).webhook_config
    before = await pool.fetch("SELECT * FROM webhook_configs ORDER BY id")
    await platform.publish()
    await pool.execute("ALTER TABLE audit_entries ADD CHECK (false) NOT VALID")
    me, operator = platform.as_merchant(), platform.as_operator()
    calls: tuple[Any, ...] = (
        platform.register(receiver.url),
        update(me, WebhookConfig(id=config.id, active=False), "active"),
        me.RotateSecret(id=config.id),
        me.DeleteWebhookConfig(id=config.id),
        operator.ReactivateWebhookConfig(id=paused.id),
        operator.CreateEventType(event_type=EventType(name="invoice.sent")),
        me.RedeliverDelivery(id=delivery_id),
        operator.DeactivateWebhookConfig(id=config.id, reason="Abuse"),
        redeliver_all(operator),
        deprecate(operator, "payment.succeeded"),
        operator.EraseMerchant(merchant_id="m_1"),
    )
    assert len(calls) == len(CHANGES)
    for call in calls:
        await refusal_of(call)

    assert await pool.fetch("SELECT * FROM webhook_configs ORDER BY id") == before
    states = await pool.fetch("SELECT state, webhook_id FROM delivery_queue ORDER BY state")
    assert [row["state"] for row in states] == ["parked", "ready"]
    assert not await count_rows(pool, "event_types WHERE name = 'invoice.sent' OR deprecated")
    assert not await count_rows(pool, "events WHERE payload = ''")


async def test_concurrent_changes_keep_their_own_actor(
    platform: Platform, config: WebhookConfig, pool: Any
) -> None:
    async def change(number: int) -> None:
        calls = merchant(platform, f"caller-{number}", f"request-{number}")
        await update(calls, WebhookConfig(id=config.id, description=f"{number}"), "description")

    await asyncio.gather(*(change(number) for number in range(12)))

    _, *changes = await entries(pool)
    assert {(e["actor"], e["request_id"]) for e in changes} == {
        (f"caller-{number}", f"request-{number}") for number in range(12)
    }
    assert len(changes) == 12
