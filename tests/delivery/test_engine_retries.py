"""Retries, timeouts and delivery times, as receivers and merchants see them."""

import dataclasses
import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from core.lifecycle import DeliveryState
from core.settings import EgressSettings
from postrider.v1 import delivery_pb2
from tests.support.event_log import EventLog
from tests.support.held_response import HeldResponse
from tests.support.platform import Platform
from tests.support.queue_state import finished_states, queue_states
from tests.support.receiver import Receiver


async def test_retry_repeats_id_with_new_timestamp(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    receiver.script.extend([500, 302])
    # Timestamps are whole seconds, so one wait is longer than that.
    async with platform.engine(retry_schedule_seconds=(0.05, 1.0)):
        published = await platform.publish()
        received = await receiver.wait_for(3)

    assert {request.message_id for request in received} == {published.event.id}
    assert [request.headers["X-Webhook-Attempt"] for request in received] == ["1", "2", "3"]
    stamps = [int(request.headers["webhook-timestamp"]) for request in received]
    assert stamps[0] <= stamps[1] < stamps[2]
    [delivery] = await platform.list_deliveries()
    assert delivery.state == delivery_pb2.DELIVERY_STATE_DELIVERED
    assert delivery.attempt_count == 3
    assert [(a.number, a.outcome, a.status_code) for a in delivery.attempts] == [
        (1, delivery_pb2.OUTCOME_HTTP_ERROR, 500),
        (2, delivery_pb2.OUTCOME_HTTP_ERROR, 302),
        (3, delivery_pb2.OUTCOME_SUCCEEDED, 200),
    ]
    starts = [a.start_time.ToDatetime() for a in delivery.attempts]
    assert starts[1] - starts[0] >= timedelta(seconds=0.05)
    assert starts[2] - starts[1] >= timedelta(seconds=1)
    assert all(a.duration.ToMicroseconds() > 0 for a in delivery.attempts)
    assert stamps == [int(a.start_time.seconds) for a in delivery.attempts]


async def test_retry_does_not_wait_for_poll(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    receiver.default = 500
    async with platform.engine(max_retries=5, retry_schedule_seconds=(0.02,)):
        began = monotonic()
        await platform.publish()
        await receiver.wait_for(6)
        # With a poll per retry, five retries take about five seconds.
        assert monotonic() - began < 2.5


async def test_delivery_fails_after_last_retry(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 500
    async with platform.engine(max_retries=2, retry_schedule_seconds=(0.02,)):
        await platform.publish()
        await receiver.wait_for(3)
    async with platform.engine(max_retries=2, retry_schedule_seconds=(0.02,)):
        receiver.default = 200
        after = await platform.publish()
        await receiver.wait_for(4)

    assert receiver.message_ids[3] == after.event.id
    attempts = {d.state: d.attempt_count for d in await platform.list_deliveries()}
    assert attempts == {
        delivery_pb2.DELIVERY_STATE_FAILED: 3,
        delivery_pb2.DELIVERY_STATE_DELIVERED: 1,
    }
    assert not await queue_states(pool)
    assert (await platform.config(created.webhook_config.id)).consecutive_failures == 0


async def test_config_retry_schedule_overrides_default(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    # The API accepts no waits below 1 s.
    await pool.execute("UPDATE webhook_configs SET retry_schedule_seconds = '{0.02, 0.02}'")
    receiver.default = 500
    async with platform.engine(max_retries=0, retry_schedule_seconds=(600.0,)):
        await platform.publish()
        await receiver.wait_for(3)
    assert await finished_states(pool) == {DeliveryState.FAILED: 1}
    assert len(receiver.webhooks) == 3


async def test_refused_address_is_not_retried(
    platform: Platform, receiver: Receiver, ca_file: Path, log: EventLog
) -> None:
    await platform.register(receiver.url)
    # The operator removed loopback from the allow-list after the registration.
    platform.settings = dataclasses.replace(
        platform.settings, egress=EgressSettings(ca_file=ca_file)
    )
    async with platform.engine(retry_schedule_seconds=(0.02,)):
        await platform.publish()
        await log.wait_for("attempt")
    [delivery] = await platform.list_deliveries()
    assert delivery.state == delivery_pb2.DELIVERY_STATE_FAILED
    assert [a.outcome for a in delivery.attempts] == [delivery_pb2.OUTCOME_REFUSED]
    assert receiver.webhooks == []


@pytest.mark.parametrize(
    ("url", "detail"),
    [
        ("https://printer.local/", "the host is not a public name"),
        ("https://0x7f000001/", "write an IPv4 address as four decimal numbers"),
        ("https://169.254.169.254/", "the address is not a public one"),
        ("https://hooks.shop.com:70000/", "the port is not one we call"),
    ],
)
async def test_stored_url_outside_the_rules_fails_as_refused(
    platform: Platform, receiver: Receiver, pool: Any, *, log: EventLog, url: str, detail: str
) -> None:
    await platform.register(receiver.url)
    # An earlier release or other settings may have accepted the URL.
    await pool.execute("UPDATE webhook_configs SET url = $1", url)
    async with platform.engine(retry_schedule_seconds=(0.02,)):
        await platform.publish()
        await log.wait_for("attempt")
    [delivery] = await platform.list_deliveries()
    assert delivery.state == delivery_pb2.DELIVERY_STATE_FAILED
    [attempt] = delivery.attempts
    assert attempt.outcome == delivery_pb2.OUTCOME_REFUSED
    assert attempt.detail.startswith(detail)
    assert (attempt.remote_address, attempt.status_code) == ("", 0)


@pytest.mark.parametrize(
    ("config", "engine", "milliseconds"),
    [
        pytest.param({}, {"delivery_timeout_seconds": 0.3}, range(300, 5000), id="operator"),
        pytest.param({"timeout": Duration(seconds=1)}, {}, range(1000, 5000), id="config"),
        # Half of the lease is the longest timeout, because a second engine could send it again.
        pytest.param(
            {"timeout": Duration(seconds=30)},
            {"delivery_timeout_seconds": 0.5, "lease_seconds": 3.0},
            range(1500, 3000),
            id="lease",
        ),
    ],
)
async def test_timeout_is_recorded_and_retried(
    platform: Platform,
    receiver: Receiver,
    config: dict[str, Any],
    engine: dict[str, Any],
    milliseconds: range,
) -> None:
    await platform.register(receiver.url, retry_schedule=[Duration(seconds=1)], **config)
    receiver.script.append(HeldResponse())
    async with platform.engine(**engine):
        await platform.publish()
        await receiver.wait_for(2)
    [delivery] = await platform.list_deliveries()
    assert [a.outcome for a in delivery.attempts] == [
        delivery_pb2.OUTCOME_TIMEOUT,
        delivery_pb2.OUTCOME_SUCCEEDED,
    ]
    assert delivery.attempts[0].duration.ToMilliseconds() in milliseconds


async def test_retry_uses_changed_url(
    platform: Platform, receiver: Receiver, start_receiver: Any
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 500
    async with start_receiver() as moved, platform.engine(retry_schedule_seconds=(1.0,)):
        published = await platform.publish()
        await receiver.wait_for(1)
        await platform.update(created.webhook_config.id, url=moved.url)
        [received] = await moved.wait_for(1)
    assert received.message_id == published.event.id
    assert received.headers["X-Webhook-Attempt"] == "2"
    assert len(receiver.webhooks) == 1


async def test_fast_failures_pause_the_config(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = 500
    async with platform.engine(
        breaker_failures=1000, retry_schedule_seconds=(600.0,), max_consecutive_failures=1000
    ):
        await platform.publish_many(50)
        # A sweep per attempt would take 12 seconds.
        await receiver.wait_for(12, timeout=8)
    attempts = await pool.fetch("SELECT started_at, duration_us FROM attempts ORDER BY started_at")
    pauses = [
        (after["started_at"] - before["started_at"]).total_seconds() - before["duration_us"] / 1e6
        for before, after in itertools.pairwise(attempts)
    ]
    assert min(pauses[4:]) >= 0.05
    assert min(pauses[8:]) >= 0.5


async def test_event_is_sent_at_its_not_before_time(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    not_before = datetime.now(UTC) + timedelta(seconds=2)
    async with platform.engine():
        later = (await platform.publish(not_before=not_before)).event.id
        now = [(await platform.publish()).event.id for _ in range(3)]
        await receiver.wait_for(3)
        assert receiver.message_ids == now
        await receiver.wait_for(4)
        assert receiver.message_ids == [*now, later]
    started = await first_start(platform, later)
    assert not_before <= started < not_before + timedelta(seconds=2)


async def test_parked_delivery_keeps_its_not_before_time(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url, active=False)
    not_before = datetime.now(UTC) + timedelta(seconds=3)
    later = (await platform.publish(not_before=not_before)).event.id
    now = (await platform.publish()).event.id
    async with platform.engine():
        await platform.update(created.webhook_config.id, active=True)
        await receiver.wait_for(2)
    assert receiver.message_ids == [now, later]
    assert not_before <= await first_start(platform, later)


async def first_start(platform: Platform, event_id: str) -> datetime:
    [delivery] = [d for d in await platform.list_deliveries() if d.event_id == event_id]
    return delivery.attempts[0].start_time.ToDatetime(UTC)
