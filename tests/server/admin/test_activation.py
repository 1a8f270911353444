"""Operators stop webhook configs for a reason, and see those of all merchants."""

import asyncio
from typing import Any
from uuid import UUID

from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from postrider.v1 import admin_service_pb2 as pb
from postrider.v1 import webhook_config_pb2, webhook_config_service_pb2
from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.factories import make_webhook_config
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused


async def deactivate(platform: Platform, webhook_id: str, reason: str = "Abuse") -> WebhookConfig:
    answer = await platform.admin.DeactivateWebhookConfig(
        pb.DeactivateWebhookConfigRequest(id=webhook_id, reason=reason),
        metadata=platform.operator(),
    )
    return answer.webhook_config


async def set_active(platform: Platform, webhook_id: str, active: bool) -> WebhookConfig:
    answer = await platform.webhooks.UpdateWebhookConfig(
        webhook_config_service_pb2.UpdateWebhookConfigRequest(
            webhook_config=WebhookConfig(id=webhook_id, active=active),
            update_mask=FieldMask(paths=["active"]),
        ),
        metadata=platform.merchant(),
    )
    return answer.webhook_config


async def list_all(platform: Platform, **fields: Any) -> pb.ListAllWebhookConfigsResponse:
    return await platform.admin.ListAllWebhookConfigs(
        pb.ListAllWebhookConfigsRequest(**fields), metadata=platform.operator()
    )


async def test_deactivation_parks_what_is_ready_until_an_operator_reactivates(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    await platform.publish('{"number": 1}')

    stopped = await deactivate(platform, config.id, "Chargeback fraud — ticket 4711")

    assert not stopped.active
    assert stopped.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_ADMIN
    assert stopped.etag != config.etag
    assert await pool.fetchval("SELECT state FROM delivery_queue") == "parked"
    entry = await pool.fetchrow("SELECT * FROM audit_entries ORDER BY id DESC LIMIT 1")
    assert (entry["action"], entry["resource"]) == ("DeactivateWebhookConfig", config.id)
    assert entry["comment"] == "Chargeback fraud — ticket 4711"
    assert entry["changed_fields"] == ["active", "deactivation_reason"]
    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED"):
        await set_active(platform, config.id, True)

    active = await platform.admin.ReactivateWebhookConfig(
        pb.ReactivateWebhookConfigRequest(id=config.id), metadata=platform.operator()
    )
    assert active.webhook_config.active
    async with platform.engine():
        [received] = await receiver.wait_for(1)
    assert received.body == b'{"number": 1}'


async def test_deactivating_again_changes_nothing_not_even_the_reason(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    first, second = (
        await deactivate(platform, config.id),
        await deactivate(platform, config.id, "x"),
    )
    assert first == second
    assert await pool.fetch("SELECT comment FROM audit_entries WHERE comment <> ''") == [("Abuse",)]


async def test_a_merchants_pause_becomes_a_deactivation_it_cannot_end(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url, active=False)).webhook_config
    stopped = await deactivate(platform, config.id)
    assert stopped.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_ADMIN
    assert await set_active(platform, config.id, False) == stopped
    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED"):
        await set_active(platform, config.id, True)


async def test_a_reason_is_one_to_500_printable_characters(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    for reason in ("", " ", "x" * 501, "two\nlines", "\x00", "\u202eabc"):
        async with refused(StatusCode.INVALID_ARGUMENT, "REASON_INVALID") as error:
            await deactivate(platform, config.id, reason)
        assert error.violations == {"reason": "REASON_INVALID"}
    await deactivate(platform, config.id, "漢" * 500)


async def test_an_unknown_or_deleted_config_cannot_be_deactivated(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    await platform.webhooks.DeleteWebhookConfig(
        webhook_config_service_pb2.DeleteWebhookConfigRequest(id=config.id),
        metadata=platform.merchant(),
    )
    for webhook_id in (config.id, "wh_" + "0" * 32, "", "\x00"):
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await deactivate(platform, webhook_id)


async def test_all_merchants_configs_are_listed_newest_first_page_by_page(
    platform: Platform, pool: Any
) -> None:
    made = [await make_webhook_config(pool, merchant_id=f"m_{n % 3}") for n in range(7)]
    await pool.execute("UPDATE webhook_configs SET deleted_at = now() WHERE id = $1", made.pop(3))

    seen: list[str] = []
    token, pages = "", 0
    while token or not pages:
        answer = await list_all(platform, page_size=4, page_token=token)
        seen += [config.id for config in answer.webhook_configs]
        token, pages = answer.next_page_token, pages + 1
    assert pages == 2
    assert seen == [f"wh_{webhook_id.hex}" for webhook_id in reversed(made)]


async def test_a_list_is_of_one_merchant_or_of_the_inactive_or_both(
    platform: Platform, pool: Any
) -> None:
    active = await make_webhook_config(pool, merchant_id="m_1")
    paused = await make_webhook_config(pool, merchant_id="m_1", active=False)
    others = await make_webhook_config(pool, merchant_id="m_2", active=False)

    async def ids(**fields: Any) -> list[UUID]:
        answer = await list_all(platform, **fields)
        return [UUID(config.id[3:]) for config in answer.webhook_configs]

    assert await ids(merchant_id="m_1") == [paused, active]
    assert await ids(inactive_only=True) == [others, paused]
    assert await ids(inactive_only=True, merchant_id="m_1") == [paused]
    assert await ids(merchant_id="m_3") == []
    failed = await make_webhook_config(
        pool, merchant_id="m_2", active=False, deactivation_reason="failures"
    )
    assert await ids(deactivation_reason="DEACTIVATION_REASON_FAILURES") == [failed]
    assert await ids(deactivation_reason="DEACTIVATION_REASON_PAUSED", merchant_id="m_1") == [
        paused
    ]
    async with refused(StatusCode.INVALID_ARGUMENT, "DEACTIVATION_REASON_UNKNOWN"):
        await list_all(platform, deactivation_reason=99)
    token = (await list_all(platform, page_size=1)).next_page_token
    async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
        await list_all(platform, inactive_only=True, page_token=token)
    async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID"):
        await list_all(platform, merchant_id="no merchant")


async def test_of_many_at_once_one_deactivation_counts(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    async with asyncio.timeout(20), pool.acquire() as connection:
        # All have come as far as the row before any may change it.
        async with connection.transaction():
            await connection.execute("SELECT FROM webhook_configs FOR UPDATE")
            calls = [
                asyncio.create_task(deactivate(platform, config.id, f"{number}"))
                for number in range(3)
            ]
            while await pool.fetchval(waiting) < len(calls):
                pass
        answers = await asyncio.gather(*calls)
    assert len({answer.etag for answer in answers}) == 1
    assert await pool.fetchval("SELECT count(*) FROM audit_entries WHERE comment <> ''") == 1
