"""WebhookConfigService apart from create and update: reading, deleting, pinging, event types."""

from typing import Any

import trustme
from grpc import StatusCode

from postrider.v1 import delivery_pb2, delivery_service_pb2
from postrider.v1 import webhook_config_service_pb2 as pb
from tests.support.endpoint import answering
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

UNKNOWN = "wh_" + "0" * 32


async def list_page(
    platform: Platform, page_size: int = 0, page_token: str = "", merchant_id: str = "m_1"
) -> tuple[list[str], str]:
    listed = await platform.webhooks.ListWebhookConfigs(
        pb.ListWebhookConfigsRequest(page_size=page_size, page_token=page_token),
        metadata=platform.merchant(merchant_id),
    )
    return [config.id for config in listed.webhook_configs], listed.next_page_token


async def get(platform: Platform, webhook_id: str, merchant_id: str = "m_1") -> Any:
    got = await platform.webhooks.GetWebhookConfig(
        pb.GetWebhookConfigRequest(id=webhook_id), metadata=platform.merchant(merchant_id)
    )
    return got.webhook_config


async def delete(platform: Platform, webhook_id: str) -> int:
    deleted = await platform.webhooks.DeleteWebhookConfig(
        pb.DeleteWebhookConfigRequest(id=webhook_id), metadata=platform.merchant()
    )
    return deleted.cancelled_deliveries


async def ping(platform: Platform, webhook_id: str) -> pb.PingWebhookConfigResponse:
    return await platform.webhooks.PingWebhookConfig(
        pb.PingWebhookConfigRequest(id=webhook_id), metadata=platform.merchant()
    )


async def test_get_returns_what_create_returned(platform: Platform, receiver: Receiver) -> None:
    created = await platform.register(receiver.url, description="orders")
    assert await get(platform, created.webhook_config.id) == created.webhook_config


async def test_get_of_an_unknown_id_names_it(platform: Platform) -> None:
    async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND") as error:
        await get(platform, UNKNOWN)
    assert UNKNOWN in error.message


async def test_list_pages_through_the_merchants_own_configs_oldest_first(
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


async def test_list_of_a_merchant_without_configs_is_empty(platform: Platform) -> None:
    assert await list_page(platform) == ([], "")


async def test_a_deleted_config_does_not_upset_the_pages(
    platform: Platform, receiver: Receiver
) -> None:
    made = [(await platform.register(receiver.url)).webhook_config.id for _ in range(4)]
    _, token = await list_page(platform, page_size=2)
    await delete(platform, made[1])
    await delete(platform, made[2])
    assert await list_page(platform, page_token=token) == ([made[3]], "")


async def test_negative_page_size_is_refused(platform: Platform) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_SIZE_INVALID") as error:
        await list_page(platform, page_size=-1)
    assert error.violations == {"page_size": "PAGE_SIZE_INVALID"}


async def test_a_token_of_another_merchants_list_or_another_list_is_refused(
    platform: Platform, receiver: Receiver
) -> None:
    for _ in range(2):
        await platform.register(receiver.url, merchant_id="m_2")
    _, foreign = await list_page(platform, page_size=1, merchant_id="m_2")
    types = await platform.webhooks.ListEventTypes(
        pb.ListEventTypesRequest(page_size=1), metadata=platform.merchant()
    )
    for token in (foreign, types.next_page_token, "x", foreign[:-2]):
        async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID") as error:
            await list_page(platform, page_token=token)
        assert error.violations == {"page_token": "PAGE_TOKEN_INVALID"}


async def test_delete_cancels_what_is_open_and_keeps_the_history_readable(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    async with platform.engine():
        await platform.publish('{"delivered": true}')
        await receiver.wait_for(1)
    await platform.publish('{"open": 1}')
    await platform.publish('{"open": 2}')

    assert await delete(platform, webhook_id) == 2

    listed = await platform.deliveries.ListDeliveries(
        delivery_service_pb2.ListDeliveriesRequest(webhook_id=webhook_id),
        metadata=platform.merchant(),
    )
    assert [delivery.state for delivery in listed.deliveries] == [
        delivery_pb2.DELIVERY_STATE_CANCELLED,
        delivery_pb2.DELIVERY_STATE_CANCELLED,
        delivery_pb2.DELIVERY_STATE_DELIVERED,
    ]
    assert all(delivery.HasField("finish_time") for delivery in listed.deliveries)
    assert await pool.fetchval("SELECT count(*) FROM delivery_queue") == 0
    assert await pool.fetchval("SELECT octet_length(secret_ciphertext) FROM webhook_configs") == 0


async def test_a_deleted_config_is_not_found_by_any_call_and_gets_no_events(
    platform: Platform, receiver: Receiver
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    assert await delete(platform, webhook_id) == 0

    for call in (get, delete, ping):
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await call(platform, webhook_id)
    assert await list_page(platform) == ([], "")
    assert (await platform.publish()).event.delivery_count == 0


async def test_ping_sends_a_signed_webhook_and_says_what_came_back(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id

    answer = await ping(platform, webhook_id)

    assert answer.reachable
    assert answer.status_code == 200
    assert answer.detail == "200 OK"
    assert answer.duration.ToNanoseconds() > 0
    assert [request.is_ping for request in receiver.requests] == [True, True]
    assert receiver.requests[0].message_id != receiver.requests[1].message_id
    for table in ("events", "delivery_queue", "finished_deliveries", "attempts"):
        assert await pool.fetchval(f"SELECT count(*) FROM {table}") == 0  # noqa: S608


async def test_ping_of_a_url_that_fails_is_an_answer_and_not_an_error(
    platform: Platform, authority: trustme.CA, pool: Any
) -> None:
    async with answering(authority, 200) as url:
        webhook_id = (await platform.register(url)).webhook_config.id
    away = await ping(platform, webhook_id)
    assert (away.reachable, away.status_code) == (False, 0)
    assert away.detail == "connection refused"

    for status, reachable in ((500, False), (404, False), (302, False), (401, True)):
        async with answering(authority, status) as url:
            await pool.execute("UPDATE webhook_configs SET url = $1", url)
            answer = await ping(platform, webhook_id)
        assert (answer.reachable, answer.status_code) == (reachable, status)


async def test_ping_of_a_stored_url_that_passes_no_more_calls_nobody(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    webhook_id = (await platform.register(receiver.url)).webhook_config.id
    await pool.execute("UPDATE webhook_configs SET url = $1", f"{receiver.url}#")
    answer = await ping(platform, webhook_id)
    assert (answer.reachable, answer.status_code) == (False, 0)
    assert "#" in answer.detail
    assert len(receiver.requests) == 1


async def test_a_page_of_event_types_with_large_schemas_ends_where_any_client_takes_it(
    platform: Platform, pool: Any
) -> None:
    await pool.execute("""
        INSERT INTO event_types (name, json_schema, example)
        SELECT 'large.t' || n, '{}' || repeat(' ', 65000), '{}' || repeat(' ', 200000)
        FROM generate_series(1, 20) n
    """)
    seen: list[str] = []
    token = ""
    while token or not seen:
        got = await platform.webhooks.ListEventTypes(
            pb.ListEventTypesRequest(page_token=token), metadata=platform.merchant()
        )
        seen += [event_type.name for event_type in got.event_types]
        token = got.next_page_token
    assert seen == [
        row["name"] for row in await pool.fetch("SELECT name FROM event_types ORDER BY name")
    ]


async def test_event_types_are_listed_by_name_in_pages(platform: Platform) -> None:
    async def page(size: int = 0, token: str = "") -> pb.ListEventTypesResponse:
        return await platform.webhooks.ListEventTypes(
            pb.ListEventTypesRequest(page_size=size, page_token=token),
            metadata=platform.merchant(),
        )

    whole = await page()
    names = [event_type.name for event_type in whole.event_types]
    assert "payment.succeeded" in names
    assert names == sorted(names)
    assert whole.next_page_token == ""
    assert all(t.description and t.HasField("create_time") for t in whole.event_types)

    paged, token = [], ""
    while True:
        part = await page(4, token)
        paged += [event_type.name for event_type in part.event_types]
        if not (token := part.next_page_token):
            break
    assert paged == names


async def test_a_config_receives_only_the_types_it_names(
    platform: Platform, receiver: Receiver
) -> None:
    await platform.register(receiver.url, events=("refund.created", "refund.failed"))
    assert (await platform.publish()).event.delivery_count == 0
    assert (await platform.publish(type="refund.failed")).event.delivery_count == 1
