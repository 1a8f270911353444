"""UpdateWebhookConfig: only what the mask names, only on what the caller has seen."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
import trustme
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from postrider.v1 import webhook_config_pb2
from postrider.v1 import webhook_config_service_pb2 as pb
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


async def update(
    platform: Platform, webhook_id: str, mask: Sequence[str] | None = None, **fields: Any
) -> WebhookConfig:
    """Changes the fields given; the mask names them unless the test has another."""
    paths = [name for name in fields if name != "etag"] if mask is None else mask
    updated = await platform.webhooks.UpdateWebhookConfig(
        pb.UpdateWebhookConfigRequest(
            webhook_config=WebhookConfig(id=webhook_id, **fields),
            update_mask=FieldMask(paths=paths),
        ),
        metadata=platform.merchant(),
    )
    return updated.webhook_config


async def get(platform: Platform, webhook_id: str) -> WebhookConfig:
    got = await platform.webhooks.GetWebhookConfig(
        pb.GetWebhookConfigRequest(id=webhook_id), metadata=platform.merchant()
    )
    return got.webhook_config


async def queue_states(pool: Any) -> Counter[str]:
    return Counter(row["state"] for row in await pool.fetch("SELECT state FROM delivery_queue"))


async def test_only_fields_in_the_mask_change(platform: Platform, config: WebhookConfig) -> None:
    updated = await update(
        platform,
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
    assert await get(platform, config.id) == updated


async def test_every_field_a_merchant_sets_can_change(
    platform: Platform, config: WebhookConfig
) -> None:
    updated = await update(
        platform,
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
        await update(platform, config.id, [], description="refunds")
    assert error.violations == {MASK: "MASK_EMPTY"}


async def test_a_mask_with_a_field_that_cannot_change_is_refused_and_nothing_changes(
    platform: Platform, config: WebhookConfig
) -> None:
    for path in ("secret", "merchant_id", "id", "etag", "*", "", "url.host", "a\x00\u202eb"):
        async with refused(StatusCode.INVALID_ARGUMENT, "MASK_FIELD_UNKNOWN") as error:
            await update(platform, config.id, ["description", path], description="refunds")
        assert error.violations == {MASK: "MASK_FIELD_UNKNOWN"}
        assert repr(path) in error.message
        assert "retry_schedule" in error.message
    assert await get(platform, config.id) == config


async def test_a_mask_of_thousands_of_paths_is_refused_with_an_answer_that_arrives(
    platform: Platform, config: WebhookConfig
) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "MASK_FIELD_UNKNOWN") as error:
        await update(platform, config.id, [f"{n}漢字" * 50 for n in range(5000)])
    assert error.violations == {MASK: "MASK_FIELD_UNKNOWN"}
    assert "and 4995 more" in error.message


async def test_the_present_etag_is_accepted_and_a_stale_one_refused(
    platform: Platform, config: WebhookConfig
) -> None:
    second = await update(platform, config.id, description="second", etag=config.etag)
    for stale in (config.etag, "v0", "x" * 10_000):
        async with refused(StatusCode.ABORTED, "ETAG_MISMATCH") as error:
            await update(platform, config.id, description="third", etag=stale)
        assert "get it again" in error.message
    assert await get(platform, config.id) == second


async def test_the_etag_of_another_config_as_old_is_refused(
    platform: Platform, config: WebhookConfig, receiver: Receiver
) -> None:
    other = (await platform.register(receiver.url)).webhook_config
    async with refused(StatusCode.ABORTED, "ETAG_MISMATCH"):
        await update(platform, config.id, description="refunds", etag=other.etag)
    assert await get(platform, config.id) == config


async def test_of_ten_updates_with_one_etag_exactly_one_wins(
    platform: Platform, config: WebhookConfig
) -> None:
    async def change(number: int) -> str:
        try:
            await update(platform, config.id, description=f"{number}", etag=config.etag)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    answers = await asyncio.gather(*(change(number) for number in range(10)))
    assert Counter(answers) == {"OK": 1, "ABORTED": 9}


async def test_a_change_to_what_it_is_already_keeps_the_etag(
    platform: Platform, config: WebhookConfig
) -> None:
    same = await update(
        platform,
        config.id,
        url=config.url,
        events=list(config.events),
        description=config.description,
        active=True,
        retry_schedule=[],
    )
    assert same == config


async def test_a_new_url_is_pinged_with_the_same_secret_and_the_same_url_is_not(
    platform: Platform, config: WebhookConfig, receiver: Receiver
) -> None:
    await update(platform, config.id, url=config.url, description="refunds")
    assert len(receiver.requests) == 1
    await update(platform, config.id, url=f"{receiver.url}/new")
    assert [request.path for request in receiver.requests] == ["/hook", "/hook/new"]
    assert receiver.requests[1].is_ping


async def test_a_new_url_that_does_not_answer_is_refused_and_nothing_changes(
    platform: Platform, config: WebhookConfig, authority: trustme.CA
) -> None:
    for status in (302, 404, 410, 500):
        async with (
            answering(authority, status) as url,
            refused(StatusCode.FAILED_PRECONDITION, "URL_UNREACHABLE") as error,
        ):
            await update(platform, config.id, url=url, description="refunds")
        assert str(status) in error.message
    assert await get(platform, config.id) == config


async def test_new_values_are_held_to_the_rules_of_creation(
    platform: Platform, config: WebhookConfig
) -> None:
    async with refused(StatusCode.INVALID_ARGUMENT, "URL_ADDRESS_NOT_ALLOWED") as error:
        await update(
            platform,
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
        await update(platform, config.id, ["events"])
    assert await get(platform, config.id) == config


async def test_retry_waits_outside_their_bounds_are_refused_however_they_are_written(
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
            await update(platform, config.id, retry_schedule=[Duration(seconds=1), wait])
        assert error.violations == {f"{path}[1]": "RETRY_WAIT_INVALID"}, wait
    async with refused(StatusCode.INVALID_ARGUMENT, "RETRY_SCHEDULE_TOO_LONG") as error:
        await update(platform, config.id, retry_schedule=[Duration(seconds=1)] * 21)
    assert error.violations == {path: "RETRY_SCHEDULE_TOO_LONG"}
    assert await get(platform, config.id) == config

    twenty = [Duration(seconds=1)] * 20
    assert list((await update(platform, config.id, retry_schedule=twenty)).retry_schedule) == twenty
    assert not (await update(platform, config.id, ["retry_schedule"])).retry_schedule


async def test_a_pause_parks_and_a_resume_lets_in_again(
    platform: Platform, config: WebhookConfig, receiver: Receiver, pool: Any
) -> None:
    await platform.publish('{"number": 1}')
    assert await queue_states(pool) == {"ready": 1}

    paused = await update(platform, config.id, active=False)
    assert (paused.active, paused.deactivation_reason) == (False, PAUSED)
    await platform.publish('{"number": 2}')
    assert await queue_states(pool) == {"parked": 2}

    async with platform.engine():
        resumed = await update(platform, config.id, active=True)
        assert (resumed.active, resumed.deactivation_reason) == (True, 0)
        received = await receiver.wait_for(2)
    assert {request.body for request in received} == {b'{"number": 1}', b'{"number": 2}'}


async def test_what_failures_deactivated_no_merchant_resumes(
    platform: Platform, config: WebhookConfig, receiver: Receiver
) -> None:
    receiver.default = 500
    await update(platform, config.id, retry_schedule=[Duration(seconds=1)])
    async with platform.engine(max_consecutive_failures=1, max_retries=0):
        await platform.publish()
        await receiver.wait_for(2)
    inactive = await get(platform, config.id)
    assert not inactive.active
    assert inactive.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_FAILURES
    assert inactive.consecutive_failures == 1
    assert inactive.etag != config.etag

    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED") as error:
        await update(platform, config.id, active=True, description="mended")
    assert "operators" in error.message
    assert await get(platform, config.id) == inactive

    # Not by way of a pause either; other fields may change meanwhile.
    changed = await update(platform, config.id, active=False, description="mended")
    assert changed.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_FAILURES
    async with refused(StatusCode.FAILED_PRECONDITION, "WEBHOOK_CONFIG_DEACTIVATED"):
        await update(platform, config.id, active=True)


async def test_headers_and_a_prefix_that_are_set_at_once_never_make_one_name_twice(
    platform: Platform, config: WebhookConfig, authority: trustme.CA
) -> None:
    async with held_up(authority) as endpoint:
        updating = asyncio.create_task(
            update(platform, config.id, url=endpoint.url, headers={"acme-id": "x"})
        )
        await endpoint.asked.wait()
        await update(platform, config.id, header_prefix="acme")
        endpoint.answer.set()
        async with refused(StatusCode.INVALID_ARGUMENT, "HEADER_PREFIX_INVALID"):
            await updating
    stored = await get(platform, config.id)
    assert (stored.url, dict(stored.headers), stored.header_prefix) == (config.url, {}, "acme")


async def test_a_config_deleted_while_its_new_url_is_pinged_is_not_found(
    platform: Platform, config: WebhookConfig, authority: trustme.CA
) -> None:
    async with held_up(authority) as endpoint:
        updating = asyncio.create_task(update(platform, config.id, url=endpoint.url))
        await endpoint.asked.wait()
        await platform.webhooks.DeleteWebhookConfig(
            pb.DeleteWebhookConfigRequest(id=config.id), metadata=platform.merchant()
        )
        endpoint.answer.set()
        async with refused(StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"):
            await updating
