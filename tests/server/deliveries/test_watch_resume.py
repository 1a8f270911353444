"""WatchDeliveries: resume tokens, keep-alives and slow callers."""

import time
from collections.abc import Callable
from typing import Any

from grpc import StatusCode

from core.encryption import KeyRing
from core.ids import format_id
from server.deliveries.tail import (
    Position,
    newest_position,
)
from server.deliveries.watch import ResumeTokens
from tests.support.factories import (
    lease_many,
    make_webhook_config,
    settle,
    settlement,
)
from tests.support.platform import Platform
from tests.support.refused_calls import refused
from tests.support.watching import named, record, record_many, watching


async def test_watch_resumes_after_the_last_response_read(
    platform: Platform, pool: Any, start_platform: Callable[..., Any]
) -> None:
    webhook_id = await make_webhook_config(pool)
    deliveries = await lease_many(pool, webhook_id, 4)
    async with watching(platform) as watch:
        # One transaction, because a token may point into the middle of it.
        await settle(pool, *[settlement(delivery) for delivery in deliveries])
        told = await watch.news(2)
    later = await record(pool, webhook_id)
    # Every server accepts the token of another.
    async with (
        start_platform() as second,
        watching(second, resume_token=watch.token) as resumed,
    ):
        told += await resumed.news(3)
        latest = await record(pool, webhook_id)
        told += await resumed.news(1)
    assert told == [*named(*sorted(deliveries, key=lambda d: d.id)), *named(later, latest)]


async def test_resuming_from_a_keep_alive_token_loses_nothing(
    platform: Platform, pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    async with watching(platform) as watch:
        pass
    missed = [await record(pool, webhook_id) for _ in range(3)]
    async with watching(platform, resume_token=watch.token) as resumed:
        assert await resumed.news(3) == named(*missed)


async def test_quiet_watch_sends_resumable_keep_alives(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    async with start_platform(watch_keep_alive_seconds=0.05) as platform:
        async with watching(platform) as watch:
            told = await record(pool, webhook_id)
            assert await watch.news(1) == named(told)
            for _ in range(3):
                assert not (await watch.read()).HasField("delivery")
        later = await record(pool, webhook_id)
        async with watching(platform, resume_token=watch.token) as resumed:
            assert await resumed.news(1) == named(later)


async def test_slow_watch_is_ended_and_resumes_without_loss(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    async with start_platform(watch_backlog=100, watch_keep_alive_seconds=0.05) as platform:
        count = 1500
        told: set[tuple[str, int]] = set()
        async with watching(platform) as watch:
            # After the second keep-alive, attempts arrive through the tail and not by a read.
            assert not (await watch.read()).HasField("delivery")
            await record_many(pool, webhook_id, count)
            async with refused(StatusCode.RESOURCE_EXHAUSTED, "WATCH_TOO_SLOW") as error:
                while len(told) < count:
                    told |= set(await watch.news(1))
        assert error.quota_subjects == ["merchant:m_1"]
        assert "resume_token" in error.message
        assert len(told) < count
        async with watching(platform, resume_token=watch.token) as resumed:
            rest = await resumed.news(count - len(told))
        assert len(told | set(rest)) == count


async def test_catch_up_sends_keep_alives_and_can_be_resumed(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    async with start_platform(watch_keep_alive_seconds=0.0001) as platform:
        async with watching(platform, event_type="refund.failed") as watch:
            token = watch.token
        for _ in range(4):
            await record_many(pool, webhook_id, 1000)
        delivery = await record(pool, webhook_id, event_type="refund.failed")
        async with watching(platform, event_type="refund.failed", resume_token=token) as resumed:
            # `watching` read the keep-alive from before the catch-up. This one is from within it.
            assert not (await resumed.read()).HasField("delivery")
            halfway = resumed.token
            assert await resumed.news(1) == named(delivery)
        request = {"event_type": "refund.failed", "resume_token": halfway}
        async with watching(platform, **request) as resumed_again:
            assert await resumed_again.news(1) == named(delivery)


async def test_resume_token_requires_the_same_watch(platform: Platform, pool: Any) -> None:
    webhook_id = format_id("wh", await make_webhook_config(pool))
    async with watching(platform, event_type="refund.failed") as watch:
        token = watch.token
    key_id, _, sealed = token.partition(".")
    for merchant_id, request in (
        ("m_2", {"event_type": "refund.failed", "resume_token": token}),
        ("m_1", {"resume_token": token}),
        ("m_1", {"event_type": "payment.succeeded", "resume_token": token}),
        ("m_1", {"event_type": "refund.failed", "webhook_id": webhook_id, "resume_token": token}),
        ("m_1", {"event_type": "refund.failed", "resume_token": "x"}),
        ("m_1", {"event_type": "refund.failed", "resume_token": "\x00ü."}),
        ("m_1", {"event_type": "refund.failed", "resume_token": f"k9.{sealed}"}),
        ("m_1", {"event_type": "refund.failed", "resume_token": f"{key_id}.A{sealed[1:]}AAAA"}),
    ):
        async with (
            refused(StatusCode.INVALID_ARGUMENT, "RESUME_TOKEN_INVALID") as error,
            watching(platform, merchant_id, **request),
        ):
            pass
        assert error.violations == {"resume_token": "RESUME_TOKEN_INVALID"}
    async with watching(platform, event_type="refund.failed", resume_token=token):
        pass


async def test_resume_token_expires_after_an_hour(platform: Platform, keyring: KeyRing) -> None:
    def sealed(age: float) -> str:
        tokens = ResumeTokens(keyring, "m_1", None, None, clock=lambda: time.time() - age)
        return tokens.seal(Position(1))

    async with watching(platform, resume_token=sealed(3590)):
        pass
    async with (
        refused(StatusCode.INVALID_ARGUMENT, "RESUME_TOKEN_INVALID") as error,
        watching(platform, resume_token=sealed(3610)),
    ):
        pass
    assert "hour" in error.message


async def test_resume_token_ahead_of_the_database_is_refused(
    platform: Platform, pool: Any, keyring: KeyRing
) -> None:
    later = Position((await newest_position(pool)).xid + 1_000_000_000)
    token = ResumeTokens(keyring, "m_1", None, None).seal(later)
    async with (
        refused(StatusCode.INVALID_ARGUMENT, "RESUME_TOKEN_INVALID") as error,
        watching(platform, resume_token=token) as watch,
    ):
        await watch.read()
    assert "list the deliveries" in error.message
