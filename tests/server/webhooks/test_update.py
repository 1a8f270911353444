"""UpdateWebhookConfig: field masks, etags, the ping of a new URL, pause and resume."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from postrider.v1 import webhook_config_pb2
from postrider.v1.webhook_config_pb2 import WebhookConfig
from tests.support.endpoint import answering, held_up
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

PAUSED = webhook_config_pb2.DEACTIVATION_REASON_PAUSED
MASK = "update_mask"


@pytest.fixture
async def config(platform: Platform, receiver: Receiver) -> WebhookConfig:
    return (await platform.register(receiver.url, description="orders")).webhook_config


async def queue_states(pool: Any) -> Counter[str]:
    return Counter(row["state"] for row in await pool.fetch("SELECT state FROM delivery_queue"))


async def test_only_fields_in_the_mask_change(platform: Platform, config: WebhookConfig) -> None:
    updated = await platform.update(
        config.id,
        ["description"],
        description="refunds",
        url="http://ignored.example",
        events=["no.such"],
        active=False,
        retry_schedule=[Duration(seconds=-1)],
    )
    assert updated.description == "refunds"
    assert updated.etag != config.etag
    assert updated.update_time.ToNanoseconds() > config.update_time.ToNanoseconds()
    for same in ("id", "merchant_id", "url", "events", "active", "retry_schedule", "create_time"):
        assert getattr(updated, same) == getattr(config, same)
    assert await platform.config(config.id) == updated


async def test_every_merchant_field_can_change(platform: Platform, config: WebhookConfig) -> None:
    updated = await platform.update(
        config.id,
        url=f"{config.url}/other",
        events=["refund.failed", "refund.created"],
        description="",
        active=False,
        retry_schedule=[Duration(seconds=1), Duration(seconds=86_400)],
    )
    assert updated.url == f"{config.url}/other"
    assert list(updated.events) == ["refund.failed", "refund.created"]
    assert updated.description == ""
    assert not updated.active
    assert [d.seconds for d in updated.retry_schedule] == [1, 86_400]


async def test_an_empty_mask_is_refused(platform: Platform, config: WebhookConfig) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "MASK_EMPTY") as error:
        await platform.update(config.id, [], description="refunds")
    assert error.violations == {MASK: "MASK_EMPTY"}


async def test_unknown_or_read_only_mask_field_is_refused(
    platform: Platform, config: WebhookConfig
) -> None:
    for path in ("secret", "merchant_id", "id", "etag", "*", "", "url.host", "a\x00\u202eb"):
        async with refused(StatusCode.INVALID_ARGUMENT, "MASK_FIELD_UNKNOWN") as error:
            await platform.update(config.id, ["description", path], description="refunds")
        assert error.violations == {MASK: "MASK_FIELD_UNKNOWN"}
        assert repr(path) in error.message
        assert "retry_schedule" in error.message
    assert await platform.config(config.id) == config


async def test_error_for_a_huge_mask_fits_in_metadata(
    platform: Platform, config: WebhookConfig
) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "MASK_FIELD_UNKNOWN") as error:
        await platform.update(config.id, [f"{n}漢字" * 50 for n in range(5000)])
    assert error.violations == {MASK: "MASK_FIELD_UNKNOWN"}
    assert "and 4995 more" in error.message


async def test_stale_etag_is_refused(platform: Platform, config: WebhookConfig) -> None:
    second = await platform.update(config.id, description="second", etag=config.etag)
    for stale in (config.etag, "v0", "x" * 10_000):
        async with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as error:
            await platform.update(config.id, description="third", etag=stale)
        assert "get it again" in error.message
    assert await platform.config(config.id) == second


async def test_etag_of_another_config_is_refused(
    platform: Platform, config: WebhookConfig, receiver: Receiver
) -> None:
    other = (await platform.register(receiver.url)).webhook_config
    async with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
        await platform.update(config.id, description="refunds", etag=other.etag)
    assert await platform.config(config.id) == config


async def test_concurrent_updates_with_one_etag_have_one_winner(
    platform: Platform, config: WebhookConfig
) -> None:
    async def change(number: int) -> str:
        try:
            await platform.update(config.id, description=f"{number}", etag=config.etag)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    answers = await asyncio.gather(*(change(number) for number in range(10)))
    assert Counter(answers) == {"OK": 1, "ABORTED": 9}


async def test_update_without_changes_keeps_the_etag(
    platform: Platform, config: WebhookConfig
) -> None:
    same = await platform.update(
        config.id,
        url=config.url,
        events=list(config.events),
        description=config.description,
        active=True,
        retry_schedule=[],
    )
    assert same == config


async def test_update_pings_only_a_new_url(
    platform: Platform, config: WebhookConfig, receiver: Receiver
) -> None:
    await platform.update(config.id, url=config.url, description="refunds")
    assert len(receiver.requests) == 1
    await platform.update(config.id, url=f"{receiver.url}/new")
    assert [request.path for request in receiver.requests] == ["/hook", "/hook/new"]
    assert receiver.requests[1].is_ping


async def test_update_refuses_url_whose_ping_fails(
    platform: Platform, config: WebhookConfig, authority: trustme.CA
) -> None:
    for status in (302, 404, 410, 500):
        async with (
            answering(authority, status) as url,
            refused(StatusCode.FAILED_PRECONDITION, "URL_UNREACHABLE") as error,
        ):
            await platform.update(config.id, url=url, description="refunds")
        assert str(status) in error.message
    assert await platform.config(config.id) == config


async def test_update_checks_fields_as_create_does(
    platform: Platform, config: WebhookConfig
) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "URL_ADDRESS_NOT_ALLOWED") as error:
        await platform.update(
            config.id,
            url="https://169.254.169.254/",
            events=["no.such"],
            description="x" * 501,
        )
    assert error.violations == {
        "webhook_config.url": "URL_ADDRESS_NOT_ALLOWED",
        "webhook_config.events[0]": "EVENT_TYPE_UNKNOWN",
        "webhook_config.description": "DESCRIPTION_INVALID",
    }
    async with refused(StatusCode.INVALID_ARGUMENT, "EVENTS_COUNT"):
        await platform.update(config.id, ["events"])
    assert await platform.config(config.id) == config


async def test_retry_waits_out_of_bounds_are_refused(
    platform: Platform, config: WebhookConfig
) -> None:
    path = "webhook_config.retry_schedule"
    for wait in (
        Duration(),
        Duration(nanos=999_999_999),
        Duration(seconds=-1),
        Duration(seconds=86_400, nanos=1),
        Duration(seconds=315_576_000_001),
        Duration(seconds=2**63 - 1, nanos=2**31 - 1),
        Duration(seconds=-(2**63), nanos=-(2**31)),
    ):
        async with refused(StatusCode.INVALID_ARGUMENT, "RETRY_WAIT_INVALID") as error:
            await platform.update(config.id, retry_schedule=[Duration(seconds=1), wait])
        assert error.violations == {f"{path}[1]": "RETRY_WAIT_INVALID"}, wait
    async with refused(StatusCode.INVALID_ARGUMENT, "RETRY_SCHEDULE_TOO_LONG") as error:
        await platform.update(config.id, retry_schedule=[Duration(seconds=1)] * 21)
    assert error.violations == {path: "RETRY_SCHEDULE_TOO_LONG"}
    assert await platform.config(config.id) == config

    twenty = [Duration(seconds=1)] * 20
    assert list((await platform.update(config.id, retry_schedule=twenty)).retry_schedule) == twenty
    assert not (await platform.update(config.id, ["retry_schedule"])).retry_schedule


async def test_pause_parks_deliveries_and_resume_admits_them(
    platform: Platform, config: WebhookConfig, receiver: Receiver, pool: Any
) -> None:
    await platform.publish('{"number": 1}')
    assert await queue_states(pool) == {"ready": 1}

    paused = await platform.update(config.id, active=False)
    assert (paused.active, paused.deactivation_reason) == (False, PAUSED)
    await platform.publish('{"number": 2}')
    assert await queue_states(pool) == {"parked": 2}

    async with platform.engine():
        resumed = await platform.update(config.id, active=True)
        assert (resumed.active, resumed.deactivation_reason) == (True, 0)
        received = await receiver.wait_for(2)
    assert {request.body for request in received} == {b'{"number": 1}', b'{"number": 2}'}


async def test_merchant_cannot_resume_config_deactivated_by_failures(
    platform: Platform, config: WebhookConfig, receiver: Receiver
) -> None:
    receiver.default = 500
    await platform.update(config.id, retry_schedule=[Duration(seconds=1)])
    async with platform.engine(max_consecutive_failures=1, max_retries=0):
        await platform.publish()
        await receiver.wait_for(2)
    inactive = await platform.config(config.id)
    assert not inactive.active
    assert inactive.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_FAILURES
    assert inactive.consecutive_failures == 1
    assert inactive.etag != config.etag

    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED") as error:
        await platform.update(config.id, active=True, description="mended")
    assert "operators" in error.message
    assert await platform.config(config.id) == inactive

    # A pause does not help, but other fields can change.
    changed = await platform.update(config.id, active=False, description="mended")
    assert changed.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_FAILURES
    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED"):
        await platform.update(config.id, active=True)


async def test_concurrent_header_and_prefix_updates_cannot_collide(
    platform: Platform, config: WebhookConfig, authority: trustme.CA
) -> None:
    async with held_up(authority) as endpoint:
        updating = asyncio.create_task(
            platform.update(config.id, url=endpoint.url, headers={"acme-id": "x"})
        )
        await endpoint.asked.wait()
        await platform.update(config.id, header_prefix="acme")
        endpoint.answer.set()
        async with refused(StatusCode.INVALID_ARGUMENT, "HEADER_PREFIX_INVALID"):
            await updating
    stored = await platform.config(config.id)
    assert (stored.url, dict(stored.headers), stored.header_prefix) == (config.url, {}, "acme")


async def test_update_of_config_deleted_during_ping_is_not_found(
    platform: Platform, config: WebhookConfig, authority: trustme.CA
) -> None:
    async with held_up(authority) as endpoint:
        updating = asyncio.create_task(platform.update(config.id, url=endpoint.url))
        await endpoint.asked.wait()
        await platform.as_merchant().DeleteWebhookConfig(id=config.id)
        endpoint.answer.set()
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await updating
