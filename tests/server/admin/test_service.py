"""AdminService: reactivation of webhook configs, and event types."""

import asyncio
from collections import Counter
from typing import Any

import grpc
from grpc import StatusCode

from core.queue import CHANNEL
from postrider.v1 import webhook_config_pb2
from postrider.v1.webhook_config_pb2 import EventType
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused


async def create_event_type(platform: Platform, name: str, description: str = "") -> Any:
    answer = await platform.as_operator().CreateEventType(
        event_type=EventType(name=name, description=description)
    )
    return answer.event_type


async def deactivate_by_failures(platform: Platform, receiver: Receiver) -> str:
    """The id of a config deactivated by failures, with a failed and a parked delivery."""
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    receiver.script.append(500)
    async with platform.engine(max_consecutive_failures=1, max_retries=0):
        await platform.publish('{"number": 1}')
        await receiver.wait_for(1)
    await platform.publish('{"number": 2}')
    return webhook_id


async def test_reactivation_admits_parked_and_resets_failures(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    assert await pool.fetchval("SELECT state FROM delivery_queue") == "parked"

    active = await platform.reactivate(webhook_id)

    assert active.active
    assert not active.deactivation_reason
    assert active.consecutive_failures == 0
    assert active.merchant_id == "m_1"
    async with platform.engine():
        received = await receiver.wait_for(2)
    assert received[1].body == b'{"number": 2}'


async def test_reactivation_and_publish_notify_engines(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    notifier: asyncio.Queue[str] = asyncio.Queue()

    def heard(_connection: Any, _pid: int, channel: str, _payload: str) -> None:
        notifier.put_nowait(channel)

    async with pool.acquire() as connection:
        await connection.add_listener(CHANNEL, heard)
        try:
            await platform.reactivate(webhook_id)
            assert await asyncio.wait_for(notifier.get(), 10) == CHANNEL
            await platform.publish()
            assert await asyncio.wait_for(notifier.get(), 10) == CHANNEL
        finally:
            await connection.remove_listener(CHANNEL, heard)


async def test_reactivating_an_active_config_changes_nothing(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    first, second = await platform.reactivate(webhook_id), await platform.reactivate(webhook_id)
    assert first == second
    actions = await pool.fetch("SELECT action FROM audit_entries WHERE actor = 'tester'")
    assert Counter(row["action"] for row in actions)["ReactivateWebhookConfig"] == 1


async def test_operator_can_reactivate_a_paused_config(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url, active=False)).webhook_config
    active = await platform.reactivate(config.id)
    assert active.active
    assert active.etag != config.etag


async def test_reactivating_unknown_or_deleted_config_is_not_found(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    await platform.delete(config.id)
    for webhook_id in (config.id, "wh_" + "0" * 32, "evt_" + "0" * 32, "", "\x00"):
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await platform.reactivate(webhook_id)


async def test_merchant_can_pause_a_reactivated_config(
    platform: Platform, receiver: Receiver
) -> None:
    webhook_id = await deactivate_by_failures(platform, receiver)
    await platform.reactivate(webhook_id)
    paused = await platform.update(webhook_id, active=False)
    assert paused.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_PAUSED


async def test_new_event_type_is_usable_at_once(platform: Platform, receiver: Receiver) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_UNKNOWN"):
        await platform.publish(type="invoice.sent")

    made = await create_event_type(platform, "invoice.sent", "An invoice left — naïvely 支払い")

    assert (made.name, made.description) == ("invoice.sent", "An invoice left — naïvely 支払い")
    assert made.HasField("create_time")
    await platform.register(receiver.url, events=("invoice.sent",))
    assert (await platform.publish(type="invoice.sent")).event.delivery_count == 1
    listed = await platform.as_merchant().ListEventTypes()
    assert made in listed.event_types


async def test_concurrent_event_type_creates_make_one(platform: Platform) -> None:
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


async def test_event_type_name_is_dotted_lower_case_words(platform: Platform) -> None:
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


async def test_event_type_description_is_one_line_of_500_characters(platform: Platform) -> None:
    for description in ("x" * 501, "two\nlines", "\x00", "\u202eabc"):
        async with refused(StatusCode.INVALID_ARGUMENT, "DESCRIPTION_INVALID") as error:
            await create_event_type(platform, "invoice.sent", description)
        assert error.violations == {"event_type.description": "DESCRIPTION_INVALID"}
    await create_event_type(platform, "invoice.sent", "x" * 500)
