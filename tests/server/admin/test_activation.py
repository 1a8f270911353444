"""Operators deactivate webhook configs and list those of all merchants."""

import asyncio
from typing import Any
from uuid import UUID

from grpc import StatusCode

from postrider.v1 import webhook_config_pb2
from tests.support.factories import make_webhook_config, until_blocked
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import pages

ADMIN = webhook_config_pb2.DEACTIVATION_REASON_ADMIN


async def deactivate(platform: Platform, webhook_id: str, reason: str = "Abuse") -> Any:
    answer = await platform.as_operator().DeactivateWebhookConfig(id=webhook_id, reason=reason)
    return answer.webhook_config


async def test_deactivation_parks_ready_deliveries_until_reactivation(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    await platform.publish('{"number": 1}')

    stopped = await deactivate(platform, config.id, "Chargeback fraud — ticket 4711")

    assert not stopped.active
    assert stopped.deactivation_reason == ADMIN
    assert stopped.etag != config.etag
    assert await pool.fetchval("SELECT state FROM delivery_queue") == "parked"
    entry = await pool.fetchrow("SELECT * FROM audit_entries ORDER BY id DESC LIMIT 1")
    assert (entry["action"], entry["resource"]) == ("DeactivateWebhookConfig", config.id)
    assert entry["comment"] == "Chargeback fraud — ticket 4711"
    assert entry["changed_fields"] == ["active", "deactivation_reason"]
    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED"):
        await platform.update(config.id, active=True)

    assert (await platform.reactivate(config.id)).active
    async with platform.engine():
        [received] = await receiver.wait_for(1)
    assert received.body == b'{"number": 1}'


async def test_deactivating_twice_keeps_the_first_reason(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    first = await deactivate(platform, config.id)
    assert await deactivate(platform, config.id, "x") == first
    assert await pool.fetch("SELECT comment FROM audit_entries WHERE comment <> ''") == [("Abuse",)]


async def test_merchant_cannot_end_deactivation_of_paused_config(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url, active=False)).webhook_config
    stopped = await deactivate(platform, config.id)
    assert stopped.deactivation_reason == ADMIN
    assert await platform.update(config.id, active=False) == stopped
    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED"):
        await platform.update(config.id, active=True)


async def test_deactivation_reason_is_1_to_500_printable_characters(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    for reason in ("", " ", "x" * 501, "two\nlines", "\x00", "\u202eabc"):
        async with refused(StatusCode.INVALID_ARGUMENT, "REASON_INVALID") as error:
            await deactivate(platform, config.id, reason)
        assert error.violations == {"reason": "REASON_INVALID"}
    await deactivate(platform, config.id, "漢" * 500)


async def test_deactivating_unknown_or_deleted_config_is_not_found(
    platform: Platform, receiver: Receiver
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    await platform.delete(config.id)
    for webhook_id in (config.id, "wh_" + "0" * 32, "", "\x00"):
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await deactivate(platform, webhook_id)


async def test_list_all_returns_every_merchants_configs_newest_first(
    platform: Platform, pool: Any
) -> None:
    made = [await make_webhook_config(pool, merchant_id=f"m_{n % 3}") for n in range(7)]
    await pool.execute("UPDATE webhook_configs SET deleted_at = now() WHERE id = $1", made.pop(3))

    found = await pages(platform.as_operator().ListAllWebhookConfigs, page_size=4)
    assert len(found) == 2
    seen = [config.id for page in found for config in page.webhook_configs]
    assert seen == [f"wh_{webhook_id.hex}" for webhook_id in reversed(made)]


async def test_list_all_filters_by_merchant_and_state(platform: Platform, pool: Any) -> None:
    list_all = platform.as_operator().ListAllWebhookConfigs
    active = await make_webhook_config(pool, merchant_id="m_1")
    paused = await make_webhook_config(pool, merchant_id="m_1", active=False)
    others = await make_webhook_config(pool, merchant_id="m_2", active=False)

    async def ids(**fields: Any) -> list[UUID]:
        answer = await list_all(**fields)
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
        await list_all(deactivation_reason=99)
    token = (await list_all(page_size=1)).next_page_token
    async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
        await list_all(inactive_only=True, page_token=token)
    async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID"):
        await list_all(merchant_id="no merchant")


async def test_concurrent_deactivations_are_recorded_once(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SELECT FROM webhook_configs FOR UPDATE")
        calls = [asyncio.create_task(deactivate(platform, config.id, f"{n}")) for n in range(3)]
        await until_blocked(pool, len(calls))
    answers = await asyncio.gather(*calls)
    assert len({answer.etag for answer in answers}) == 1
    assert await pool.fetchval("SELECT count(*) FROM audit_entries WHERE comment <> ''") == 1
