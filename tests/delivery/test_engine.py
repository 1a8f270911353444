"""The engine's decisions from outside: what receivers get, what is on record, what is logged."""

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import structlog
from aiohttp import web
from google.protobuf.field_mask_pb2 import FieldMask
from pydantic import SecretStr

from core.encryption import load_keyring, new_key
from core.ids import parse_id
from core.lifecycle import DeliveryState
from core.settings import DatabaseSettings, EgressSettings, EncryptionSettings
from delivery import engine
from delivery.claim import claim
from delivery.fairness.concurrency import INITIAL_LIMIT
from postrider.v1 import (
    admin_service_pb2,
    delivery_pb2,
    delivery_service_pb2,
    event_pb2,
    event_service_pb2,
    webhook_config_pb2,
    webhook_config_service_pb2,
)
from tests.support.platform import ENCRYPTION_KEYS, Platform
from tests.support.receiver import Receiver

AMPLE = 20.0

type Start = Callable[[], AbstractAsyncContextManager[Receiver]]


class Doors:
    """An answer that waits until the doors are opened, and counts who waits at once."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.inside = 0
        self.most = 0
        self._open = asyncio.Event()
        self._changed = asyncio.Condition()

    def open(self) -> None:
        self._open.set()

    async def __call__(self, _: web.Request) -> web.StreamResponse:
        async with self._changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self._changed.notify_all()
        try:
            await self._open.wait()
        finally:
            self.inside -= 1
        return web.Response(status=self.status)

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(AMPLE), self._changed:
            await self._changed.wait_for(lambda: self.inside >= count)


class Log:
    """What is logged, as it comes."""

    def __init__(self) -> None:
        self.entries: list[MutableMapping[str, Any]] = []
        self._arrived = asyncio.Event()

    def __call__(self, _: Any, level: str, entry: MutableMapping[str, Any]) -> Any:
        self.entries.append({**entry, "level": level})
        self._arrived.set()
        raise structlog.DropEvent

    def named(self, event: str) -> list[MutableMapping[str, Any]]:
        return [entry for entry in self.entries if entry["event"] == event]

    async def wait_for(self, event: str, count: int = 1, timeout: float = AMPLE) -> None:
        async with asyncio.timeout(timeout):
            while len(self.named(event)) < count:
                self._arrived.clear()
                await self._arrived.wait()


@pytest.fixture
def log() -> Iterator[Log]:
    log = Log()
    processors = structlog.get_config()["processors"]
    saved = list(processors)
    processors[:] = [log]
    yield log
    processors[:] = saved


async def publish_many(platform: Platform, count: int, merchant_id: str = "m_1") -> list[str]:
    """Publish so many events in one call; returns their ids."""
    event = event_pb2.EventInput(
        merchant_id=merchant_id, type="payment.succeeded", payload_text='{"amount": 1}'
    )
    response = await platform.events.PublishEvents(
        event_service_pb2.PublishEventsRequest(events=[event] * count), metadata=platform.producer()
    )
    return [result.event.id for result in response.results]


async def deliveries(platform: Platform, merchant_id: str = "m_1") -> list[delivery_pb2.Delivery]:
    """What a merchant sees of its deliveries."""
    response = await platform.deliveries.ListDeliveries(
        delivery_service_pb2.ListDeliveriesRequest(page_size=100),
        metadata=platform.merchant(merchant_id),
    )
    return list(response.deliveries)


async def config_of(platform: Platform, webhook_id: str) -> webhook_config_pb2.WebhookConfig:
    response = await platform.webhooks.GetWebhookConfig(
        webhook_config_service_pb2.GetWebhookConfigRequest(id=webhook_id),
        metadata=platform.merchant(),
    )
    return response.webhook_config


async def update(platform: Platform, webhook_id: str, **fields: Any) -> None:
    await platform.webhooks.UpdateWebhookConfig(
        webhook_config_service_pb2.UpdateWebhookConfigRequest(
            webhook_config=webhook_config_pb2.WebhookConfig(id=webhook_id, **fields),
            update_mask=FieldMask(paths=list(fields)),
        ),
        metadata=platform.merchant(),
    )


async def queue_states(pool: Any) -> Counter[str]:
    """How many open deliveries are in each state."""
    rows = await pool.fetch("SELECT state FROM delivery_queue")
    return Counter(row["state"] for row in rows)


async def finished_states(pool: Any) -> Counter[str]:
    rows = await pool.fetch("SELECT state FROM finished_deliveries")
    return Counter(row["state"] for row in rows)


def ids(receiver: Receiver) -> list[str]:
    return sorted(request.message_id for request in receiver.webhooks)


# Retries.


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
    [delivery] = await deliveries(platform)
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
        # Left to the poll alone, five retries would take about five seconds.
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

    assert receiver.webhooks[3].message_id == after.event.id
    by_state = {delivery.state: delivery for delivery in await deliveries(platform)}
    assert by_state.keys() == {
        delivery_pb2.DELIVERY_STATE_FAILED,
        delivery_pb2.DELIVERY_STATE_DELIVERED,
    }
    assert by_state[delivery_pb2.DELIVERY_STATE_FAILED].attempt_count == 3
    assert not await queue_states(pool)
    # One success, and the count of failures in a row starts anew.
    assert (await config_of(platform, created.webhook_config.id)).consecutive_failures == 0


async def test_config_retry_schedule_overrides_default(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    # Shorter than a merchant may ask for.
    await pool.execute("UPDATE webhook_configs SET retry_schedule_seconds = '{0.02, 0.02}'")
    receiver.default = 500
    async with platform.engine(max_retries=0, retry_schedule_seconds=(600.0,)):
        await platform.publish()
        await receiver.wait_for(3)
    assert await finished_states(pool) == {DeliveryState.FAILED: 1}
    assert len(receiver.webhooks) == 3


async def test_refused_address_is_not_retried(
    platform: Platform, receiver: Receiver, ca_file: Path, log: Log
) -> None:
    await platform.register(receiver.url)
    # The operator has taken loopback from the allow-list since.
    platform.settings = dataclasses.replace(
        platform.settings, egress=EgressSettings(ca_file=ca_file)
    )
    async with platform.engine(retry_schedule_seconds=(0.02,)):
        await platform.publish()
        await log.wait_for("attempt")
    [delivery] = await deliveries(platform)
    assert delivery.state == delivery_pb2.DELIVERY_STATE_FAILED
    assert [a.outcome for a in delivery.attempts] == [delivery_pb2.OUTCOME_REFUSED]
    assert receiver.webhooks == []


@pytest.mark.parametrize(
    "stored",
    [
        ("https://printer.local/", "the host is not a public name"),
        ("https://0x7f000001/", "write an IPv4 address as four decimal numbers"),
        ("https://169.254.169.254/", "the address is not a public one"),
        ("https://hooks.shop.com:70000/", "the port is not one we call"),
    ],
)
async def test_stored_url_outside_the_rules_fails_as_refused(
    platform: Platform, receiver: Receiver, pool: Any, log: Log, stored: tuple[str, str]
) -> None:
    url, detail = stored
    await platform.register(receiver.url)
    # As one that an earlier release, or other settings, let in.
    await pool.execute("UPDATE webhook_configs SET url = $1", url)
    async with platform.engine(retry_schedule_seconds=(0.02,)):
        await platform.publish()
        await log.wait_for("attempt")
    [delivery] = await deliveries(platform)
    assert delivery.state == delivery_pb2.DELIVERY_STATE_FAILED
    [attempt] = delivery.attempts
    assert attempt.outcome == delivery_pb2.OUTCOME_REFUSED
    assert attempt.detail.startswith(detail)
    assert (attempt.remote_address, attempt.status_code) == ("", 0)


async def test_timeout_is_recorded_and_retried(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    receiver.script.append(Doors())
    async with platform.engine(delivery_timeout_seconds=0.3, retry_schedule_seconds=(0.02,)):
        await platform.publish()
        await receiver.wait_for(2)
    [delivery] = await deliveries(platform)
    assert [a.outcome for a in delivery.attempts] == [
        delivery_pb2.OUTCOME_TIMEOUT,
        delivery_pb2.OUTCOME_SUCCEEDED,
    ]
    assert delivery.attempts[0].duration.ToMilliseconds() >= 300


async def test_retry_uses_changed_url(
    platform: Platform, receiver: Receiver, start_receiver: Start
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 500
    async with start_receiver() as moved, platform.engine(retry_schedule_seconds=(1.0,)):
        published = await platform.publish()
        await receiver.wait_for(1)
        await update(platform, created.webhook_config.id, url=moved.url)
        [received] = await moved.wait_for(1)
    assert received.message_id == published.event.id
    assert received.headers["X-Webhook-Attempt"] == "2"
    assert len(receiver.webhooks) == 1


# A time for delivery.


async def test_event_is_sent_at_its_not_before_time(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    not_before = datetime.now(UTC) + timedelta(seconds=2)
    async with platform.engine():
        later = (await platform.publish(not_before=not_before)).event.id
        now = [(await platform.publish()).event.id for _ in range(3)]
        assert [r.message_id for r in await receiver.wait_for(3)] == now
        assert [r.message_id for r in await receiver.wait_for(4)] == [*now, later]
    [delivery] = [d for d in await deliveries(platform) if d.event_id == later]
    assert not_before <= delivery.attempts[0].start_time.ToDatetime(UTC)
    assert delivery.attempts[0].start_time.ToDatetime(UTC) < not_before + timedelta(seconds=2)


async def test_parked_delivery_keeps_its_not_before_time(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url, active=False)
    not_before = datetime.now(UTC) + timedelta(seconds=3)
    later = (await platform.publish(not_before=not_before)).event.id
    now = (await platform.publish()).event.id
    async with platform.engine():
        await update(platform, created.webhook_config.id, active=True)
        assert [r.message_id for r in await receiver.wait_for(2)] == [now, later]
    [delivery] = [d for d in await deliveries(platform) if d.event_id == later]
    assert not_before <= delivery.attempts[0].start_time.ToDatetime(UTC)


# Configs that go inactive, and come back.


async def test_failing_config_goes_inactive_until_reactivated(
    platform: Platform, receiver: Receiver, pool: Any, log: Log
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.default = 500
    async with platform.engine(
        max_retries=0, max_consecutive_failures=3, max_in_flight_per_webhook=1
    ):
        published = await publish_many(platform, 10)
        await log.wait_for("webhook_deactivated")
        config = await config_of(platform, webhook_id)
        assert not config.active
        assert config.deactivation_reason == webhook_config_pb2.DEACTIVATION_REASON_FAILURES
        assert config.consecutive_failures == 3
        [entry] = log.named("webhook_deactivated")
        assert (entry["webhook_id"], entry["reason"]) == (webhook_id, "failures")

    assert await queue_states(pool) == {DeliveryState.PARKED: 7}
    assert await finished_states(pool) == {DeliveryState.FAILED: 3}
    assert len(receiver.webhooks) == 3
    receiver.default = 200
    # An event of the meantime is kept as well, and an engine alone brings nothing back.
    published.append((await platform.publish()).event.id)
    async with platform.engine(max_in_flight_per_webhook=1):
        await platform.admin.ReactivateWebhookConfig(
            admin_service_pb2.ReactivateWebhookConfigRequest(id=webhook_id),
            metadata=platform.operator(),
        )
        await receiver.wait_for(3 + 8)
    assert ids(receiver) == sorted(published)
    assert not await queue_states(pool)
    assert (await config_of(platform, webhook_id)).consecutive_failures == 0


async def test_success_resets_consecutive_failures(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    created = await platform.register(receiver.url)
    receiver.script.extend([500, 500, 200, 500, 500, 200, 500])
    async with platform.engine(
        max_retries=0, max_consecutive_failures=3, max_in_flight_per_webhook=1
    ):
        await publish_many(platform, 7)
        await receiver.wait_for(7)
    config = await config_of(platform, created.webhook_config.id)
    assert (config.active, config.consecutive_failures) == (True, 1)


async def test_failed_delivery_counts_as_one_failure(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 500
    async with platform.engine(
        max_retries=3, max_consecutive_failures=2, retry_schedule_seconds=(0.02,)
    ):
        await platform.publish()
        await receiver.wait_for(4)
    config = await config_of(platform, created.webhook_config.id)
    assert (config.active, config.consecutive_failures) == (True, 1)


async def test_failure_of_paused_config_logs_no_deactivation(
    platform: Platform, receiver: Receiver, log: Log
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = doors = Doors(500)
    async with platform.engine(max_retries=0):
        await platform.publish()
        await doors.wait_for(1)
        await update(platform, created.webhook_config.id, active=False)
        doors.open()
    assert len(log.named("attempt")) == 1
    assert log.named("webhook_deactivated") == []


@pytest.mark.parametrize("way", ["paused", "deleted"])
async def test_paused_or_deleted_config_receives_nothing_more(
    platform: Platform, receiver: Receiver, pool: Any, way: str
) -> None:
    created = await platform.register(receiver.url)
    webhook_id = created.webhook_config.id
    receiver.default = doors = Doors()
    async with platform.engine(max_in_flight_per_webhook=1):
        await publish_many(platform, 5)
        await doors.wait_for(1)
        if way == "paused":
            await update(platform, webhook_id, active=False)
        else:
            await platform.webhooks.DeleteWebhookConfig(
                webhook_config_service_pb2.DeleteWebhookConfigRequest(id=webhook_id),
                metadata=platform.merchant(),
            )
        await platform.publish()
        doors.open()
        # Another merchant's webhook shows that the engine went on.
        await platform.register(receiver.url, "m_2")
        await platform.publish(merchant_id="m_2")
        await receiver.wait_for(2)
    assert len(receiver.webhooks) == 2
    if way == "deleted":
        assert not await queue_states(pool)
        # The one under way is cancelled like the others: nobody is left to hear of its success.
        assert await finished_states(pool) == {"cancelled": 5, "delivered": 1}
        return
    assert await queue_states(pool) == {DeliveryState.PARKED: 5}
    async with platform.engine():
        await update(platform, webhook_id, active=True)
        await receiver.wait_for(7)
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 7}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("active = false, deactivation_reason = 'paused'", {DeliveryState.PARKED: 3}),
        ("deleted_at = now(), version = version + 1", {DeliveryState.CANCELLED: 3}),
    ],
)
async def test_ready_delivery_of_stopped_config_is_not_sent(
    platform: Platform, receiver: Receiver, pool: Any, change: str, expected: dict[str, int]
) -> None:
    created = await platform.register(receiver.url)
    await publish_many(platform, 3)
    # As if the change had been committed while the events were being accepted.
    await pool.execute(
        f"UPDATE webhook_configs SET {change} WHERE id = $1",  # noqa: S608
        parse_id("wh", created.webhook_config.id),
    )
    async with platform.engine():
        await platform.register(receiver.url, "m_2")
        other = await platform.publish(merchant_id="m_2")
        await receiver.wait_for(1)
    assert ids(receiver) == [other.event.id]
    found = await queue_states(pool) + await finished_states(pool)
    assert found == {**expected, DeliveryState.DELIVERED: 1}


# Fairness.


async def test_silent_receiver_uses_only_its_own_slots(
    platform: Platform, receiver: Receiver, start_receiver: Start, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = doors = Doors()
    async with start_receiver() as healthy, platform.engine(max_in_flight_per_webhook=4):
        await platform.register(healthy.url, "m_2")
        flooded = await publish_many(platform, 200)
        await doors.wait_for(4)
        flowing = await publish_many(platform, 50, "m_2")
        await healthy.wait_for(50)
        assert ids(healthy) == sorted(flowing)
        assert len(receiver.webhooks) == 4
        doors.open()
        await receiver.wait_for(200)
    assert doors.most == 4
    assert ids(receiver) == sorted(flooded)
    assert not await queue_states(pool)


async def test_backlog_is_admitted_as_fast_as_it_drains(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url, active=False)
    published = await publish_many(platform, 20)
    async with platform.engine(max_in_flight_per_webhook=1):
        await update(platform, created.webhook_config.id, active=True)
        began = monotonic()
        await receiver.wait_for(20)
        # One a second by the sweep alone.
        assert monotonic() - began < 5
    assert ids(receiver) == sorted(published)


async def test_open_requests_stay_below_max_in_flight(
    platform: Platform, receiver: Receiver
) -> None:
    doors = Doors()
    merchants = [f"m_{number}" for number in range(6)]
    for merchant_id in merchants:
        await platform.register(receiver.url, merchant_id)
    async with platform.engine(max_in_flight=5, max_in_flight_per_webhook=2):
        # Those that have never answered would get no more than half of the places.
        for merchant_id in merchants:
            await platform.publish(merchant_id=merchant_id)
        await receiver.wait_for(6)
        receiver.default = doors
        for merchant_id in merchants:
            await publish_many(platform, 4, merchant_id)
        await doors.wait_for(5)
        doors.open()
        await receiver.wait_for(30)
    assert doors.most == 5
    assert len(set(ids(receiver))) == 30


async def test_parallel_claims_stay_below_max_in_flight(
    platform: Platform, receiver: Receiver
) -> None:
    merchants = [f"m_{number}" for number in range(12)]
    for merchant_id in merchants:
        # Between a claim and its attempts the rate is asked for, of the database.
        await platform.register(receiver.url, merchant_id, rate_limit=1000)
    async with platform.engine(max_in_flight=8):
        for merchant_id in merchants:
            await platform.publish(merchant_id=merchant_id)
        await receiver.wait_for(12)
        # A claim too many comes between others by chance: not at the first time, but at some.
        for times in range(1, 9):
            receiver.default = doors = Doors()
            for merchant_id in merchants:
                await publish_many(platform, 4, merchant_id)
            await doors.wait_for(8)
            doors.open()
            await receiver.wait_for(12 + times * 48)
            assert doors.most == 8


async def test_full_claims_run_two_at_a_time(
    platform: Platform, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = under_way = most = 0
    third = asyncio.Event()

    async def watched(*order: Any) -> Any:
        nonlocal began, under_way, most
        began, under_way = began + 1, under_way + 1
        most = max(most, under_way)
        try:
            if began == 2:
                async with asyncio.timeout(AMPLE):
                    await third.wait()
            if began == 3:
                third.set()
            return await claim(*order)
        finally:
            under_way -= 1

    monkeypatch.setattr(engine, "claim", watched)
    for number in range(20):
        await platform.register(receiver.url, f"m_{number}")
        await platform.publish(merchant_id=f"m_{number}")
    async with platform.engine(claim_batch=1, max_in_flight=40):
        await receiver.wait_for(20)
    assert most == 2
    assert len(set(ids(receiver))) == len(ids(receiver)) == 20


# What is told.


async def test_attempt_log_line_has_no_payload_and_no_secret(
    platform: Platform, receiver: Receiver, log: Log
) -> None:
    created = await platform.register(receiver.url)
    receiver.script.append(500)
    async with platform.engine(retry_schedule_seconds=(0.02,)):
        published = await platform.publish('{"card": "canary-4711"}')
        await receiver.wait_for(2)
    first, second = log.named("attempt")
    for number, line, status, outcome, state in (
        (1, first, 500, "http_error", "ready"),
        (2, second, 200, "succeeded", "delivered"),
    ):
        assert line["webhook_id"] == created.webhook_config.id
        assert line["event_id"] == published.event.id
        assert line["event_type"] == "payment.succeeded"
        assert line["attempt"] == number
        assert (line["status"], line["outcome"], line["state"]) == (status, outcome, state)
        assert 0 < line["duration_ms"] < AMPLE * 1000
    everything = repr(log.entries)
    assert "canary-4711" not in everything
    assert created.secret not in everything
    assert created.standard_webhooks_secret not in everything
    assert "v1," not in everything


@pytest.mark.parametrize(
    "ciphertext",
    [
        pytest.param(bytes(92), id="altered"),
        pytest.param(
            b"",
            id="emptied",
        ),
    ],
)
async def test_unreadable_secret_is_internal_error(
    platform: Platform, receiver: Receiver, pool: Any, log: Log, ciphertext: bytes
) -> None:
    created = await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    await pool.execute(
        "UPDATE webhook_configs SET secret_ciphertext = $2 WHERE id = $1",
        parse_id("wh", created.webhook_config.id),
        ciphertext,
    )
    async with platform.engine(max_retries=0, max_fault_retries=1, max_consecutive_failures=1):
        await platform.publish()
        await platform.publish(merchant_id="m_2")
        await log.wait_for("attempt", 3, timeout=AMPLE)
    assert len(receiver.webhooks) == 1
    [delivery] = await deliveries(platform)
    assert delivery.state == delivery_pb2.DELIVERY_STATE_FAILED
    assert [a.outcome for a in delivery.attempts] == [delivery_pb2.OUTCOME_INTERNAL_ERROR] * 2
    assert log.named("secret_unreadable")
    config = await config_of(platform, created.webhook_config.id)
    assert (config.active, config.consecutive_failures) == (True, 0)


async def test_unreadable_secret_is_read_after_key_reload(
    platform: Platform, receiver: Receiver, pool: Any, log: Log, tmp_path: Path
) -> None:
    file = tmp_path / "encryption-keys"
    file.write_text(ENCRYPTION_KEYS)
    platform.settings = dataclasses.replace(
        platform.settings, encryption=EncryptionSettings(encryption_keys_file=file)
    )
    created = await platform.register(receiver.url)
    webhook_id = parse_id("wh", created.webhook_config.id)
    assert webhook_id is not None
    pair = new_key()
    elsewhere = load_keyring(EncryptionSettings(encryption_keys=SecretStr(pair)))
    # After the faults it has all its retries, which is one.
    receiver.script.append(500)
    async with platform.engine(max_retries=1, retry_schedule_seconds=(0.02,)):
        # As a server does that has the new key already, where this engine's file comes late.
        await pool.execute(
            "UPDATE webhook_configs SET secret_key_id = $2, secret_ciphertext = $3 WHERE id = $1",
            *(webhook_id, *elsewhere.encrypt(created.secret, webhook_id)),
        )
        await platform.publish()
        await log.wait_for("secret_unreadable", 1, timeout=AMPLE)
        file.write_text(f"{ENCRYPTION_KEYS}\n{pair}\n")
        await receiver.wait_for(2)
    assert log.named("secret_file_loaded")
    [delivery] = await deliveries(platform)
    assert delivery.state == delivery_pb2.DELIVERY_STATE_DELIVERED
    *faults, failed, delivered = [attempt.outcome for attempt in delivery.attempts]
    assert set(faults) == {delivery_pb2.OUTCOME_INTERNAL_ERROR}
    assert failed == delivery_pb2.OUTCOME_HTTP_ERROR
    assert delivered == delivery_pb2.OUTCOME_SUCCEEDED


async def test_notify_wakes_engine_before_poll(platform: Platform, receiver: Receiver) -> None:
    await platform.register(receiver.url)
    async with platform.engine(poll_seconds=1.0):
        began = monotonic()
        for count in range(1, 6):
            await platform.publish()
            await receiver.wait_for(count)
        # Each comes just after the engine has looked: by the poll alone, five take five seconds.
        assert monotonic() - began < 2.5


# Trouble with the database.


async def test_dropped_database_sessions_lose_nothing(
    platform: Platform, receiver: Receiver, pool: Any, log: Log
) -> None:
    async def drop_sessions() -> None:
        dropped = await pool.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'postrider-delivery' AND datname = current_database()"
        )
        assert dropped

    await platform.register(receiver.url)
    receiver.default = doors = Doors()
    async with platform.engine(delivery_timeout_seconds=2, lease_seconds=4):
        published = await publish_many(platform, 50)
        await doors.wait_for(INITIAL_LIMIT)
        await drop_sessions()
        doors.open()
        published += await publish_many(platform, 100)
        await receiver.wait_for(60, timeout=8)
        await drop_sessions()
        # A lease that ended meanwhile brings one twice, which stands for none of the others.
        async with asyncio.timeout(AMPLE):
            while missing := len(set(published) - set(ids(receiver))):
                await receiver.wait_for(len(receiver.webhooks) + missing, timeout=AMPLE)
        await log.wait_for("listen_reopened")
    # What happened, and not what we tried with the connection afterwards.
    assert "has ended" in log.named("listen_reopened")[0]["error"]
    assert set(ids(receiver)) == set(published)
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 150}
    assert not await queue_states(pool)
    assert await pool.fetchval("SELECT count(*) FROM attempts") == 150


def bound_statements(platform: Platform, seconds: float) -> None:
    """For engines that start from here on; a wait for a lock ends after half of it."""
    platform.settings = dataclasses.replace(
        platform.settings,
        database=DatabaseSettings(
            database_url=platform.settings.database.database_url,
            database_statement_timeout_seconds=seconds,
        ),
    )


async def test_settle_waits_for_locked_row(
    platform: Platform, receiver: Receiver, pool: Any, log: Log
) -> None:
    await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    bound_statements(platform, 0.4)
    receiver.default = doors = Doors()
    async with platform.engine():
        await platform.publish()
        await doors.wait_for(1)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT FROM delivery_queue FOR UPDATE")
            doors.open()
            await log.wait_for("settle_postponed")
        await platform.publish(merchant_id="m_2")
        await receiver.wait_for(2)
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 2}
    assert len(receiver.webhooks) == 2


async def test_many_locked_rows_delay_others_by_one_lock_wait(
    platform: Platform, receiver: Receiver, pool: Any, log: Log
) -> None:
    await platform.register(receiver.url)
    await platform.register(receiver.url, "m_2")
    bound_statements(platform, 1)
    doors = Doors()
    async with platform.engine():
        # Its places grow with every answer.
        await publish_many(platform, 30)
        await _until_finished(pool, 30)
        receiver.default = doors
        await publish_many(platform, 30)
        await doors.wait_for(30)
        async with pool.acquire() as connection, connection.transaction():
            await connection.execute("SELECT FROM delivery_queue FOR UPDATE")
            doors.open()
            await log.wait_for("settle_postponed")
            began = monotonic()
            for count in range(1, 4):
                await platform.publish(merchant_id="m_2")
                await _until_finished(pool, 30 + count)
            # One by one, the thirty would have taken 15 s each time.
            assert monotonic() - began < 10
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 63}
    assert len(receiver.webhooks) == 63


async def _until_finished(pool: Any, count: int) -> None:
    async with asyncio.timeout(AMPLE):
        while await finished_states(pool) != {DeliveryState.DELIVERED: count}:
            pass


# Stopping.


class Leaving:
    """An engine that can be told to stop while the test goes on."""

    def __init__(self, engine: AbstractAsyncContextManager[None]) -> None:
        self._leave = asyncio.Event()
        self._entered = asyncio.Event()
        self._engine = engine
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._engine:
            self._entered.set()
            await self._leave.wait()

    async def entered(self) -> None:
        await asyncio.wait_for(self._entered.wait(), AMPLE)

    def leave(self) -> asyncio.Task[None]:
        self._leave.set()
        return self._task


async def test_stop_waits_for_open_requests_and_claims_no_more(
    platform: Platform, receiver: Receiver, pool: Any, log: Log
) -> None:
    await platform.register(receiver.url)
    receiver.default = doors = Doors()
    engine = Leaving(platform.engine(max_in_flight_per_webhook=4))
    await engine.entered()
    published = await publish_many(platform, 10)
    await doors.wait_for(4)
    stopped = engine.leave()
    await log.wait_for("draining")
    assert not stopped.done()
    doors.open()
    await asyncio.wait_for(stopped, AMPLE)

    assert len(receiver.webhooks) == 4
    assert await finished_states(pool) == {DeliveryState.DELIVERED: 4}
    # Nothing stays leased: another engine may take the rest at once.
    assert (await queue_states(pool))[DeliveryState.LEASED] == 0
    async with platform.engine():
        await receiver.wait_for(10)
    assert ids(receiver) == sorted(published)


async def test_stop_releases_unfinished_after_drain_time(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    receiver.default = doors = Doors()
    async with platform.engine(delivery_drain_seconds=0.5):
        published = await publish_many(platform, 3)
        await doors.wait_for(3)
        left_at = monotonic()
    assert 0.5 <= monotonic() - left_at < 5
    assert await queue_states(pool) == {DeliveryState.READY: 3}
    rows = await pool.fetch("SELECT attempt_count, reclaim_count FROM delivery_queue")
    assert [tuple(row) for row in rows] == [(0, 0)] * 3
    assert await pool.fetchval("SELECT count(*) FROM attempts") == 0

    receiver.default = 200
    async with platform.engine():
        began = monotonic()
        await receiver.wait_for(6)
        assert monotonic() - began < 10, "the lease of 75 s was waited for"
    assert Counter(ids(receiver)) == dict.fromkeys(published, 2)


async def test_idle_engine_stops_at_once(platform: Platform) -> None:
    engine = Leaving(platform.engine(poll_seconds=1.0))
    await engine.entered()
    began = monotonic()
    await asyncio.wait_for(engine.leave(), AMPLE)
    assert monotonic() - began < 0.8


def test_names_of_states_are_those_of_the_queue() -> None:
    """The counters above compare text from SQL with the enumeration."""
    states: Sequence[str] = [state.value for state in DeliveryState]
    assert states[:3] == ["ready", "parked", "leased"]
