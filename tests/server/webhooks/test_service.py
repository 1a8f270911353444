"""WebhookConfigService: get, list, delete, ping and list event types."""

from typing import Any

import trustme
from grpc import StatusCode

from postrider.v1 import delivery_pb2
from tests.support.endpoint import answering
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import pages

UNKNOWN = "wh_" + "0" * 32


async def list_page(
    platform: Platform, page_size: int = 0, page_token: str = "", merchant_id: str = "m_1"
) -> tuple[list[str], str]:
    listed = await platform.as_merchant(merchant_id).ListWebhookConfigs(
        page_size=page_size, page_token=page_token
    )
    return [config.id for config in listed.webhook_configs], listed.next_page_token


async def test_get_returns_what_create_returned(platform: Platform, receiver: Receiver) -> None:
    created = await platform.register(receiver.url, description="orders")
    assert await platform.config(created.webhook_config.id) == created.webhook_config


async def test_get_of_an_unknown_id_names_it(platform: Platform) -> None:
    async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND") as error:
        await platform.config(UNKNOWN)
    assert UNKNOWN in error.message


async def test_list_pages_through_own_configs_oldest_first(
    platform: Platform, receiver: Receiver
) -> None:
    made = [(await platform.register(receiver.url)).webhook_config.id for _ in range(5)]
    await platform.register(receiver.url, merchant_id="m_2")

    first, token = await list_page(platform, page_size=2)
    second, token = await list_page(platform, page_size=2, page_token=token)
    third, end = await list_page(platform, page_size=2, page_token=token)

    assert [first, second, third] == [made[:2], made[2:4], made[4:]]
    assert end == ""
    assert await list_page(platform) == (made, "")
    assert await list_page(platform, page_size=5) == (made, "")
    assert await list_page(platform, page_size=2**31 - 1) == (made, "")


async def test_list_skips_configs_deleted_between_pages(
    platform: Platform, receiver: Receiver
) -> None:
    made = [(await platform.register(receiver.url)).webhook_config.id for _ in range(4)]
    _, token = await list_page(platform, page_size=2)
    await platform.delete(made[1])
    await platform.delete(made[2])
    assert await list_page(platform, page_token=token) == ([made[3]], "")


async def test_negative_page_size_is_refused(platform: Platform) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_SIZE_INVALID") as error:
        await list_page(platform, page_size=-1)
    assert error.violations == {"page_size": "PAGE_SIZE_INVALID"}


async def test_list_refuses_page_tokens_of_other_lists(
    platform: Platform, receiver: Receiver
) -> None:
    for _ in range(2):
        await platform.register(receiver.url, merchant_id="m_2")
    _, foreign = await list_page(platform, page_size=1, merchant_id="m_2")
    types = await platform.as_merchant().ListEventTypes(page_size=1)
    for token in (foreign, types.next_page_token, "x", foreign[:-2]):
        async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID") as error:
            await list_page(platform, page_token=token)
        assert error.violations == {"page_token": "PAGE_TOKEN_INVALID"}


async def test_delete_cancels_open_deliveries_and_keeps_history(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    async with platform.engine():
        await platform.publish('{"delivered": true}')
        await receiver.wait_for(1)
    await platform.publish('{"open": 1}')
    await platform.publish('{"open": 2}')

    assert await platform.delete(webhook_id) == 2

    listed = await platform.as_merchant().ListDeliveries(webhook_id=webhook_id)
    assert [delivery.state for delivery in listed.deliveries] == [
        delivery_pb2.DELIVERY_STATE_CANCELLED,
        delivery_pb2.DELIVERY_STATE_CANCELLED,
        delivery_pb2.DELIVERY_STATE_DELIVERED,
    ]
    assert all(delivery.HasField("finish_time") for delivery in listed.deliveries)
    assert await pool.fetchval("SELECT count(*) FROM delivery_queue") == 0
    assert await pool.fetchval("SELECT octet_length(secret_ciphertext) FROM webhook_configs") == 0


async def test_deleted_config_is_not_found_and_gets_no_events(
    platform: Platform, receiver: Receiver
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    assert await platform.delete(webhook_id) == 0

    me = platform.as_merchant()
    for call in (me.GetWebhookConfig, me.DeleteWebhookConfig, me.PingWebhookConfig):
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await call(id=webhook_id)
    assert await list_page(platform) == ([], "")
    assert (await platform.publish()).event.delivery_count == 0


async def test_ping_sends_a_webhook_and_returns_the_result(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id

    answer = await platform.as_merchant().PingWebhookConfig(id=webhook_id)

    assert answer.reachable
    assert answer.status_code == 200
    assert answer.detail == "200 OK"
    assert answer.duration.ToNanoseconds() > 0
    assert [request.is_ping for request in receiver.requests] == [True, True]
    assert receiver.requests[0].message_id != receiver.requests[1].message_id
    for table in ("events", "delivery_queue", "finished_deliveries", "attempts"):
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 0  # noqa: S608


async def test_failed_ping_is_a_response_and_not_an_error(
    platform: Platform, authority: trustme.CA, pool: Any
) -> None:
    async with answering(authority, 200) as url:
        webhook_id = (await platform.register(url)).webhook_config.id
    away = await platform.as_merchant().PingWebhookConfig(id=webhook_id)
    assert (away.reachable, away.status_code) == (False, 0)
    assert away.detail == "connection refused"

    for status, reachable in ((500, False), (404, False), (302, False), (401, True)):
        async with answering(authority, status) as url:
            await pool.execute("UPDATE webhook_configs SET url = $1", url)
            answer = await platform.as_merchant().PingWebhookConfig(id=webhook_id)
        assert (answer.reachable, answer.status_code) == (reachable, status)


async def test_ping_does_not_call_a_url_refused_by_policy(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await pool.execute("UPDATE webhook_configs SET url = $1", f"{receiver.url}#")
    answer = await platform.as_merchant().PingWebhookConfig(id=webhook_id)
    assert (answer.reachable, answer.status_code) == (False, 0)
    assert "#" in answer.detail
    assert len(receiver.requests) == 1


async def test_event_type_page_stays_below_the_message_size_limit(
    platform: Platform, pool: Any
) -> None:
    await pool.execute("""
        INSERT INTO event_types (name, json_schema, example)
        SELECT 'large.t' || n, '{}' || repeat(' ', 65000), '{}' || repeat(' ', 200000)
        FROM generate_series(1, 20) n
    """)
    found = await pages(platform.as_merchant().ListEventTypes)
    seen = [event_type.name for page in found for event_type in page.event_types]
    rows = await pool.fetch("SELECT name FROM event_types ORDER BY name")
    assert seen == [row["name"] for row in rows]


async def test_event_types_are_paged_by_name(platform: Platform) -> None:
    whole = await platform.as_merchant().ListEventTypes()
    names = [event_type.name for event_type in whole.event_types]
    assert "payment.succeeded" in names
    assert names == sorted(names)
    assert whole.next_page_token == ""
    assert all(t.description and t.HasField("create_time") for t in whole.event_types)

    found = await pages(platform.as_merchant().ListEventTypes, page_size=4)
    assert [event_type.name for page in found for event_type in page.event_types] == names


async def test_config_receives_only_its_event_types(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url, events=("refund.created", "refund.failed"))
    assert (await platform.publish()).event.delivery_count == 0
    assert (await platform.publish(type="refund.failed")).event.delivery_count == 1
