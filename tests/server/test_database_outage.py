"""During an outage of PostgreSQL calls fail in time, and after it no restart is needed."""

import asyncio
from collections.abc import Callable, Container
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode
from pydantic import SecretStr

from core.postgres.pool import open_pool
from core.settings import DatabaseSettings
from core.tasks import cancel_and_wait
from postrider.v1.event_pb2 import EventInput
from postrider.v1.webhook_config_pb2 import EventType, WebhookConfig
from server.notify import Notifier
from tests.support.factories import count_rows, locked, terminate_blocked
from tests.support.platform import Platform, bearer, running_platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.restartable_postgres import RestartablePostgres
from tests.support.rpcs import call, code_of, methods, token_for

MAX_SECONDS = 10


#: These end the config that the other calls need, or name an id that does not exist.
NOT_REPEATABLE = {
    "DeleteWebhookConfig",
    "EraseMerchant",
    "GetDelivery",
    "GetEvent",
    "RedeliverDelivery",
}


def requests(webhook_id: str, url: str) -> dict[str, dict[str, Any]]:
    """The fields of a request for each RPC. The requests succeed for the owner of the config."""
    config = WebhookConfig(id=webhook_id, url=url, events=["payment.succeeded"], description="x")
    event = EventInput(merchant_id="m_1", type="payment.succeeded", payload=b"1")
    description = FieldMask(paths=["description"])
    one_config = {"id": webhook_id}
    no_delivery = {"id": "dlv_" + "0" * 32}
    return {
        "CheckInvariants": {},
        "CreateEventType": {"event_type": EventType(name=f"made.after_{webhook_id}")},
        "CreateWebhookConfig": {"webhook_config": config},
        "DeactivateWebhookConfig": {**one_config, "reason": "x"},
        "DeleteWebhookConfig": one_config,
        "EraseMerchant": {"merchant_id": "m_1"},
        "GetDelivery": no_delivery,
        "GetEvent": {"id": "evt_" + "0" * 32},
        "GetQueueStatus": {},
        "GetWebhookConfig": one_config,
        "ListAllWebhookConfigs": {},
        "ListAuditEntries": {},
        "ListDeliveries": {},
        "ListEventTypes": {},
        "ListEvents": {"merchant_id": "m_1"},
        "ListWebhookConfigs": {},
        "PingWebhookConfig": one_config,
        "PublishEvent": {"event": event},
        "PublishEvents": {"events": [event]},
        "ReactivateWebhookConfig": one_config,
        "RedeliverDeliveries": {
            "start_time": Timestamp(seconds=1),
            "end_time": Timestamp(seconds=2),
        },
        "RedeliverDelivery": no_delivery,
        "RotateSecret": one_config,
        "StreamEvents": {"events": [event]},
        "UpdateEventType": {
            "event_type": EventType(name="payment.failed", description="x"),
            "update_mask": description,
        },
        "UpdateWebhookConfig": {"webhook_config": config, "update_mask": description},
        "WatchDeliveries": {"webhook_id": webhook_id},
    }


async def assert_all_end_with(
    code: StatusCode,
    platform: Platform,
    prepared: dict[str, dict[str, Any]],
    without: Container[str] = (),
) -> None:
    """Call all RPCs concurrently and compare their status codes."""

    def calling(method: Any) -> Any:
        request = GetMessageClass(method.input_type)(**prepared[method.name])
        return call(platform.channel, method, request, bearer(token_for(platform, method)))

    called = {method.name: method for method in methods() if method.name not in without}
    codes = await asyncio.gather(*(code_of(calling(method)) for method in called.values()))
    assert dict(zip(called, codes, strict=True)) == dict.fromkeys(called, code)


async def test_each_rpc_is_unavailable_until_an_outage_ends(
    restartable_postgres: RestartablePostgres, on_own: Platform, receiver: Receiver
) -> None:
    webhook_id = (await on_own.register(receiver.url)).webhook_config.id
    prepared = requests(webhook_id, receiver.url)
    assert set(prepared) == {method.name for method in methods()}

    restartable_postgres.stop()
    async with asyncio.timeout(MAX_SECONDS):
        await assert_all_end_with(StatusCode.UNAVAILABLE, on_own, prepared)
    async with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE") as error:
        await on_own.publish()
    assert error.retry_after_seconds == 1
    assert "send the call again" in error.message
    assert "nothing was changed" not in error.message
    assert "sock" not in error.message.lower()

    restartable_postgres.start()
    await assert_all_end_with(StatusCode.OK, on_own, prepared, NOT_REPEATABLE)


async def test_each_rpc_is_unavailable_while_postgresql_is_frozen(
    restartable_postgres: RestartablePostgres, on_own: Platform, receiver: Receiver
) -> None:
    webhook_id = (await on_own.register(receiver.url)).webhook_config.id
    prepared = requests(webhook_id, receiver.url)
    with restartable_postgres.frozen():
        async with asyncio.timeout(MAX_SECONDS):
            await assert_all_end_with(StatusCode.UNAVAILABLE, on_own, prepared)
    assert (await on_own.publish()).event.id


async def test_calls_waiting_for_a_connection_are_unavailable_in_time(
    restartable_postgres: RestartablePostgres, on_own: Platform
) -> None:
    # Twelve times the number of connections. Each connection times out after 1.5 s.
    with restartable_postgres.frozen():
        async with asyncio.timeout(5):
            answers = await asyncio.gather(*(code_of(on_own.publish()) for _ in range(60)))
    assert set(answers) == {StatusCode.UNAVAILABLE}


async def test_closed_idle_connections_are_replaced(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    prepared = requests((await platform.register(receiver.url)).webhook_config.id, receiver.url)
    closed = await pool.fetchval(
        "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity "
        "WHERE datname = current_database() AND application_name = 'postrider-server'"
    )
    assert closed >= 2
    await assert_all_end_with(StatusCode.OK, platform, prepared, NOT_REPEATABLE)


async def test_lost_connection_fails_the_call_and_stores_nothing(
    platform: Platform, pool: Any
) -> None:
    async with locked(pool):
        publishing = asyncio.create_task(platform.publish())
        await terminate_blocked(pool)
        async with refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE"):
            await publishing
    assert await count_rows(pool) == 0
    assert (await platform.publish()).event.id


async def test_call_blocked_by_a_lock_is_unavailable(
    start_platform: Callable[..., Any], pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEBHOOK_DATABASE_STATEMENT_TIMEOUT_SECONDS", "0.2")
    unavailable = refused(StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
    async with start_platform() as platform, locked(pool), unavailable:
        await platform.publish()


@pytest.mark.slow
async def test_server_with_calls_stops_while_postgresql_is_frozen(
    restartable_postgres: RestartablePostgres, ca_file: Path, tmp_path: Path
) -> None:
    assert restartable_postgres.server is not None
    url = restartable_postgres.server.url()
    async with AsyncExitStack() as stack:
        platform = await stack.enter_async_context(
            running_platform(url, ca_file, tmp_path, server_drain_seconds=0.1)
        )
        await platform.publish()
        with restartable_postgres.frozen():
            # Both calls hold a connection that PostgreSQL does not release.
            calls = [
                asyncio.ensure_future(platform.publish()),
                platform.as_merchant().ListWebhookConfigs(),
            ]
            await asyncio.sleep(0.5)
            began = monotonic()
            await stack.aclose()
            assert monotonic() - began < 8
        await asyncio.gather(*calls, return_exceptions=True)


async def test_notifier_can_be_cancelled_while_postgresql_is_frozen(
    restartable_postgres: RestartablePostgres,
) -> None:
    """The abandoned connection raises its own error, which must not hide the cancellation."""
    assert restartable_postgres.server is not None
    url = SecretStr(restartable_postgres.server.url())
    settings = DatabaseSettings(database_url=url, database_connect_timeout_seconds=1)
    pool = await open_pool(settings, "test", 1)
    notifier = Notifier(pool)
    notifying = asyncio.create_task(notifier.run())
    try:
        with restartable_postgres.frozen():
            notifier.notify()
            async with asyncio.timeout(10):
                while not pool.statements:  # noqa: ASYNC110 - the pool has only a counter
                    await asyncio.sleep(0)
            began = monotonic()
            await cancel_and_wait([notifying])
            assert monotonic() - began < 8
        assert notifying.cancelled()
    finally:
        pool.terminate()
