"""AdminService: what operators change, for every merchant."""

import asyncio
from collections import Counter
from typing import Any

import grpc
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from core.queue import CHANNEL
from postrider.v1 import admin_service_pb2 as pb
from postrider.v1 import webhook_config_pb2, webhook_config_service_pb2
from postrider.v1.webhook_config_pb2 import EventType, WebhookConfig
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused


async def reactivate(platform: Platform, webhook_id: str) -> WebhookConfig:
    answer = await platform.admin.ReactivateWebhookConfig(
        pb.ReactivateWebhookConfigRequest(id=webhook_id), metadata=platform.operator()
    )
    return answer.webhook_config


async def create_event_type(platform: Platform, name: str, description: str = "") -> EventType:
    answer = await platform.admin.CreateEventType(
        pb.CreateEventTypeRequest(event_type=EventType(name=name, description=description)),
        metadata=platform.operator(),
    )
    return answer.event_type


async def deactivate_by_failures(platform: Platform, receiver: Receiver) -> str:
    """A config that went inactive, with one delivery failed and one parked; its id."""
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    receiver.script.append(500)
    async with platform.engine(max_consecutive_failures=1, max_retries=0):
        await platform.publish('{"number": 1}')
        await receiver.wait_for(1)
    await platform.publish('{"number": 2}')
    return webhook_id


async def test_reactivation_lets_parked_deliveries_in_and_counts_failures_anew(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    assert await pool.fetchval("SELECT state FROM delivery_queue") == "parked"

    active = await reactivate(platform, webhook_id)

    assert active.active
    assert not active.deactivation_reason
    assert active.consecutive_failures == 0
    assert active.merchant_id == "m_1"
    async with platform.engine():
        received = await receiver.wait_for(2)
    assert received[1].body == b'{"number": 2}'


async def test_engines_are_told_of_a_reactivation_and_of_an_event(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    notifier: asyncio.Queue[str] = asyncio.Queue()

    def heard(_connection: Any, _pid: int, channel: str, _payload: str) -> None:
        notifier.put_nowait(channel)

    async with pool.acquire() as connection:
        await connection.add_listener(CHANNEL, heard)
        try:
            await reactivate(platform, webhook_id)
            assert await asyncio.wait_for(notifier.get(), 10) == CHANNEL
            await platform.publish()
            assert await asyncio.wait_for(notifier.get(), 10) == CHANNEL
        finally:
            await connection.remove_listener(CHANNEL, heard)


async def test_reactivating_what_is_active_changes_nothing(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    first, second = await reactivate(platform, webhook_id), await reactivate(platform, webhook_id)
    assert first == second
    actions = await pool.fetch("SELECT action FROM audit_entries WHERE actor = 'tester'")
    assert Counter(row["action"] for row in actions)["ReactivateWebhookConfig"] == 1


async def test_a_merchants_pause_can_be_ended_too(platform: Platform, receiver: Receiver) -> None:
    config = (await platform.register(receiver.url, active=False)).webhook_config
    active = await reactivate(platform, config.id)
    assert active.active
    assert active.etag != config.etag


async def test_an_unknown_or_deleted_config_is_not_found(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    await platform.webhooks.DeleteWebhookConfig(
        webhook_config_service_pb2.DeleteWebhookConfigRequest(id=config.id),
        metadata=platform.merchant(),
    )
    for webhook_id in (config.id, "wh_" + "0" * 32, "evt_" + "0" * 32, "", "\x00"):
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await reactivate(platform, webhook_id)


async def test_a_merchant_pauses_what_an_operator_reactivated(
    platform: Platform, receiver: Receiver
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    await reactivate(platform, webhook_id)
    paused = await platform.webhooks.UpdateWebhookConfig(
        webhook_config_service_pb2.UpdateWebhookConfigRequest(
            webhook_config=WebhookConfig(id=webhook_id, active=False),
            update_mask=FieldMask(paths=["active"]),
        ),
        metadata=platform.merchant(),
    )
    reason = paused.webhook_config.deactivation_reason
    assert reason == webhook_config_pb2.DEACTIVATION_REASON_PAUSED


async def test_a_new_event_type_can_be_published_subscribed_to_and_listed(
    platform: Platform, receiver: Receiver
) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_UNKNOWN"):
        await platform.publish(type="invoice.sent")

    made = await create_event_type(platform, "invoice.sent", "An invoice left — naïvely 支払い")

    assert (made.name, made.description) == ("invoice.sent", "An invoice left — naïvely 支払い")
    assert made.HasField("create_time")
    await platform.register(receiver.url, events=("invoice.sent",))
    assert (await platform.publish(type="invoice.sent")).event.delivery_count == 1
    listed = await platform.webhooks.ListEventTypes(
        webhook_config_service_pb2.ListEventTypesRequest(), metadata=platform.merchant()
    )
    assert made in listed.event_types


async def test_a_registered_name_is_taken_even_for_calls_at_once(platform: Platform) -> None:
    async with refused(StatusCode.ALREADY_EXISTS, "EVENT_TYPE_EXISTS") as error:
        await create_event_type(platform, "payment.succeeded", "mine")
    assert "payment.succeeded" in error.message

    async def create() -> str:
        try:
            await create_event_type(platform, "invoice.sent")
        except grpc.aio.AioRpcError as refusal:
            return refusal.code().name
        return "OK"

    answers = await asyncio.gather(*(create() for _ in range(10)))
    assert Counter(answers) == {"OK": 1, "ALREADY_EXISTS": 9}


async def test_a_name_is_dotted_lower_case_words(platform: Platform) -> None:
    for name in (
        "",
        "payment",
        "Payment.sent",
        "payment.",
        ".payment",
        "payment..sent",
        "payment sent",
        "payment.sent\n",
        "payment.\x00",
        "zahlung.fällig",
        "payment.\u202esent",
        "a." + "b" * 127,
        "a." * 500_000 + "b",
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_NAME_INVALID") as error:
            await create_event_type(platform, name)
        assert error.violations == {"event_type.name": "EVENT_TYPE_NAME_INVALID"}
    await create_event_type(platform, "a." + "b" * 126)


async def test_a_description_is_one_line_of_at_most_500_characters(platform: Platform) -> None:
    for description in ("x" * 501, "two\nlines", "\x00", "\u202eabc"):
        async with refused(StatusCode.INVALID_ARGUMENT, "DESCRIPTION_INVALID") as error:
            await create_event_type(platform, "invoice.sent", description)
        assert error.violations == {"event_type.description": "DESCRIPTION_INVALID"}
    await create_event_type(platform, "invoice.sent", "x" * 500)
