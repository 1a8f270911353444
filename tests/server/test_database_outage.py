"""PostgreSQL goes away and comes back: callers hear so in time, and nothing needs a restart."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from pydantic import SecretStr

from core.postgres.pool import open_pool
from core.settings import DatabaseSettings
from core.tasks import cancel_and_wait
from postrider.v1 import (
    admin_service_pb2,
    delivery_service_pb2,
    event_service_pb2,
    webhook_config_service_pb2,
)
from postrider.v1.event_pb2 import EventInput
from postrider.v1.webhook_config_pb2 import EventType, WebhookConfig
from server.notify import Notifier
from tests.support.own_postgres import OwnPostgres
from tests.support.platform import Platform, bearer, running_platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import call, methods

SECONDS_UNTIL_TOLD = 10
configs = webhook_config_service_pb2


@pytest.fixture
async def on_own(
    own_postgres: OwnPostgres, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Platform]:
    """A platform on `own_postgres`, less patient than in production."""
    assert own_postgres.server is not None
    monkeypatch.setenv("WEBHOOK_DATABASE_STATEMENT_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setenv("WEBHOOK_DATABASE_CONNECT_TIMEOUT_SECONDS", "0.5")
    async with running_platform(own_postgres.server.url(), ca_file, tmp_path) as platform:
        yield platform


# What ends the config the others are about, and what is about an id that nothing has.
NOT_FOR_ALL = {
    "DeleteWebhookConfig",
    "EraseMerchant",
    "GetDelivery",
    "GetEvent",
    "RedeliverDelivery",
}


def requests(webhook_id: str, url: str) -> dict[str, Message]:
    """A request for every RPC, which succeeds for the merchant with this config."""
    config = WebhookConfig(id=webhook_id, url=url, events=["payment.succeeded"], description="x")
    event = EventInput(merchant_id="m_1", type="payment.succeeded", payload=b"1")
    return {
        "CreateWebhookConfig": configs.CreateWebhookConfigRequest(webhook_config=config),
        "GetWebhookConfig": configs.GetWebhookConfigRequest(id=webhook_id),
        "ListWebhookConfigs": configs.ListWebhookConfigsRequest(),
        "UpdateWebhookConfig": configs.UpdateWebhookConfigRequest(
            webhook_config=config, update_mask=FieldMask(paths=["description"])
        ),
        "PingWebhookConfig": configs.PingWebhookConfigRequest(id=webhook_id),
        "ListEventTypes": configs.ListEventTypesRequest(),
        "PublishEvent": event_service_pb2.PublishEventRequest(event=event),
        "PublishEvents": event_service_pb2.PublishEventsRequest(events=[event]),
        "StreamEvents": event_service_pb2.StreamEventsRequest(events=[event]),
        "ListEvents": event_service_pb2.ListEventsRequest(merchant_id="m_1"),
        "GetEvent": event_service_pb2.GetEventRequest(id="evt_" + "0" * 32),
        "ListDeliveries": delivery_service_pb2.ListDeliveriesRequest(),
        "ReactivateWebhookConfig": admin_service_pb2.ReactivateWebhookConfigRequest(id=webhook_id),
        "GetDelivery": delivery_service_pb2.GetDeliveryRequest(id="dlv_" + "0" * 32),
        "RotateSecret": configs.RotateSecretRequest(id=webhook_id),
        "RedeliverDelivery": delivery_service_pb2.RedeliverDeliveryRequest(id="dlv_" + "0" * 32),
        "RedeliverDeliveries": admin_service_pb2.RedeliverDeliveriesRequest(
            start_time=Timestamp(seconds=1), end_time=Timestamp(seconds=2)
        ),
        "WatchDeliveries": delivery_service_pb2.WatchDeliveriesRequest(webhook_id=webhook_id),
        "DeactivateWebhookConfig": admin_service_pb2.DeactivateWebhookConfigRequest(
            id=webhook_id, reason="x"
        ),
        "ListAllWebhookConfigs": admin_service_pb2.ListAllWebhookConfigsRequest(),
        "UpdateEventType": admin_service_pb2.UpdateEventTypeRequest(
            event_type=EventType(name="payment.failed", description="x"),
            update_mask=FieldMask(paths=["description"]),
        ),
        "GetQueueStatus": admin_service_pb2.GetQueueStatusRequest(),
        "CheckInvariants": admin_service_pb2.CheckInvariantsRequest(),
        "ListAuditEntries": admin_service_pb2.ListAuditEntriesRequest(),
        "EraseMerchant": admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"),
        "DeleteWebhookConfig": configs.DeleteWebhookConfigRequest(id=webhook_id),
        "CreateEventType": admin_service_pb2.CreateEventTypeRequest(
            event_type=EventType(name=f"made.after_{webhook_id}")
        ),
    }


async def codes(platform: Platform, prepared: dict[str, Message]) -> dict[str, StatusCode]:
    """What each RPC answers, all of them sent at once."""
    tokens = {
        "EventService": platform.token("events:publish"),
        "AdminService": platform.token("webhooks:admin"),
    }
    merchant = platform.token("webhooks:manage", merchant_id="m_1")

    async def code(method: Any) -> StatusCode:
        token = tokens.get(method.containing_service.name, merchant)
        try:
            await call(platform.channel, method, prepared[method.name], bearer(token))
        except grpc.aio.AioRpcError as error:
            return error.code()
        return StatusCode.OK

    names = [method for method in methods() if method.name in prepared]
    answers = await asyncio.gather(*(code(method) for method in names))
    return {method.name: answer for method, answer in zip(names, answers, strict=True)}


async def test_every_rpc_is_unavailable_while_it_is_stopped_and_works_when_it_is_back(
    own_postgres: OwnPostgres, on_own: Platform, receiver: Receiver
) -> None:
    webhook_id = (await on_own.register(receiver.url)).webhook_config.id
    prepared = requests(webhook_id, receiver.url)
    assert set(prepared) == {method.name for method in methods()}

    own_postgres.stop()
    async with asyncio.timeout(SECONDS_UNTIL_TOLD):
        answers = await codes(on_own, prepared)
    assert answers == dict.fromkeys(answers, StatusCode.UNAVAILABLE)
    async with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE") as error:
        await on_own.publish()
    assert error.retry_after_seconds == 1
    assert "send the call again" in error.message
    assert "nothing was changed" not in error.message
    assert "sock" not in error.message.lower()

    own_postgres.start()
    answers = await codes(on_own, {k: v for k, v in prepared.items() if k not in NOT_FOR_ALL})
    assert answers == dict.fromkeys(answers, StatusCode.OK)


async def test_every_rpc_is_told_in_time_while_it_is_frozen(
    own_postgres: OwnPostgres, on_own: Platform, receiver: Receiver
) -> None:
    webhook_id = (await on_own.register(receiver.url)).webhook_config.id
    prepared = requests(webhook_id, receiver.url)
    with own_postgres.frozen():
        async with asyncio.timeout(SECONDS_UNTIL_TOLD):
            answers = await codes(on_own, prepared)
    assert answers == dict.fromkeys(answers, StatusCode.UNAVAILABLE)
    assert (await on_own.publish()).event.id


async def test_calls_that_wait_for_a_connection_are_told_in_time_too(
    own_postgres: OwnPostgres, on_own: Platform
) -> None:
    # Twelve times as many as there are connections; each of those is given up after 1.5 s.
    with own_postgres.frozen():
        async with asyncio.timeout(5):
            answers = await asyncio.gather(
                *(on_own.publish() for _ in range(60)), return_exceptions=True
            )
    assert {answer.code() for answer in answers if isinstance(answer, grpc.aio.AioRpcError)} == {
        StatusCode.UNAVAILABLE
    }


async def test_a_connection_that_was_closed_while_idle_is_replaced_unnoticed(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    prepared = requests((await platform.register(receiver.url)).webhook_config.id, receiver.url)
    prepared = {name: request for name, request in prepared.items() if name not in NOT_FOR_ALL}
    closed = await pool.fetchval(
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'postrider-server'"
    )
    assert closed >= 2
    answers = await codes(platform, prepared)
    assert answers == dict.fromkeys(answers, StatusCode.OK)


async def backend_that_waits(pool: Any) -> int:
    while True:
        pid: int | None = await pool.fetchval(
            "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock' "
            "AND datname = current_database()"
        )
        if pid is not None:
            return pid


async def test_a_connection_that_dies_in_the_middle_accepts_nothing_and_says_so(
    platform: Platform, pool: Any
) -> None:
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE events")
        publishing = asyncio.create_task(platform.publish())
        await pool.execute("SELECT pg_terminate_backend($1)", await backend_that_waits(pool))
        async with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
            await publishing
    assert await pool.fetchval("SELECT count(*) FROM events") == 0
    assert (await platform.publish()).event.id


async def test_a_lock_that_somebody_holds_for_too_long_is_unavailable_and_not_a_bug(
    start_platform: Callable[..., Any], pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBHOOK_DATABASE_STATEMENT_TIMEOUT_SECONDS", "0.2")
    async with start_platform() as platform, pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE events")
        async with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
            await platform.publish()


@pytest.mark.slow
async def test_a_server_with_calls_under_way_stops_in_time_while_it_is_frozen(
    own_postgres: OwnPostgres, ca_file: Path, tmp_path: Path
) -> None:
    assert own_postgres.server is not None
    url = own_postgres.server.url()
    async with AsyncExitStack() as stack:
        platform = await stack.enter_async_context(
            running_platform(url, ca_file, tmp_path, server_drain_seconds=0.1)
        )
        await platform.publish()
        with own_postgres.frozen():
            # Both hold a connection, and PostgreSQL will not say when it has it back.
            calls = [asyncio.ensure_future(platform.publish()), list_configs(platform)]
            await asyncio.sleep(0.5)
            began = monotonic()
            await stack.aclose()
            assert monotonic() - began < 8
        await asyncio.gather(*calls, return_exceptions=True)


async def test_a_hint_under_way_ends_while_it_is_frozen(own_postgres: OwnPostgres) -> None:
    """Its connection, given up, raises an error of its own, and cancelled once it would go on."""
    assert own_postgres.server is not None
    url = SecretStr(own_postgres.server.url())
    settings = DatabaseSettings(database_url=url, database_connect_timeout_seconds=1)
    pool = await open_pool(settings, "test", 1)
    notifier = Notifier(pool)
    hinting = asyncio.create_task(notifier.run())
    try:
        with own_postgres.frozen():
            notifier.notify()
            async with asyncio.timeout(10):
                while not pool.statements:  # noqa: ASYNC110 - a count is all there is
                    await asyncio.sleep(0)
            began = monotonic()
            await cancel_and_wait([hinting])
            assert monotonic() - began < 8
        assert hinting.cancelled()
    finally:
        pool.terminate()


def list_configs(platform: Platform) -> Any:
    return platform.webhooks.ListWebhookConfigs(
        configs.ListWebhookConfigsRequest(), metadata=platform.merchant()
    )
