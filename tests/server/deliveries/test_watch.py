"""WatchDeliveries: attempts as they are recorded, each once and in order, and how a watch ends."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import grpc
import pytest
from grpc import StatusCode

from cli.dev.signing_key import mint_token
from core import queue
from core.encryption import KeyRing
from core.ids import format_id, new_id
from core.lifecycle import Outcome
from core.queue import LeasedDelivery
from postrider.v1 import delivery_pb2, delivery_service_pb2_grpc
from postrider.v1 import delivery_service_pb2 as pb
from server.deliveries.tail import (
    _NEWEST,
    _READ,
    Position,
    Tail,
    Watcher,
    newest_position,
    read_recorded,
)
from server.deliveries.watch import ResumeTokens, Watch
from tests.support.factories import (
    lease_many,
    lease_one,
    make_webhook_config,
    rescheduled,
    settle,
    settlement,
)
from tests.support.plans import PLAN_MODES, planned_by
from tests.support.platform import ISSUER, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

BIG_EXCERPT = "x" * 1000


class Watching:
    """An open watch; a sign of life has come, so that what is recorded from now on is news."""

    def __init__(self, call: Any):
        self.call = call
        self.token = ""

    async def read(self) -> pb.WatchDeliveriesResponse:
        async with asyncio.timeout(20):
            answer: pb.WatchDeliveriesResponse = await self.call.read()
        self.token = answer.resume_token
        return answer

    async def news(self, count: int) -> list[tuple[str, int]]:
        """The next attempts: delivery and number."""
        found: list[tuple[str, int]] = []
        while len(found) < count:
            answer = await self.read()
            if answer.HasField("delivery"):
                [attempt] = answer.delivery.attempts
                found.append((answer.delivery.id, attempt.number))
        return found


@asynccontextmanager
async def watching(
    platform: Platform, merchant_id: str = "m_1", **request: Any
) -> AsyncIterator[Watching]:
    call = platform.as_merchant(merchant_id).WatchDeliveries(**request)
    watch = Watching(call)
    first = await watch.read()
    assert not first.HasField("delivery")
    try:
        yield watch
    finally:
        call.cancel()


def named(*deliveries: LeasedDelivery, number: int = 1) -> list[tuple[str, int]]:
    return [(format_id("dlv", delivery.id), number) for delivery in deliveries]


async def record(pool: Any, webhook_id: UUID, **overrides: Any) -> LeasedDelivery:
    """A delivery whose one attempt is recorded now."""
    delivery = await lease_one(pool, webhook_id, **overrides)
    await settle(pool, settlement(delivery))
    return delivery


async def test_watch_sends_each_recorded_attempt_with_its_delivery(
    platform: Platform, receiver: Receiver
) -> None:
    created = await platform.register(receiver.url)
    receiver.default = 503
    async with watching(platform) as watch, platform.engine(max_retries=0):
        event = (await platform.publish()).event
        answer = await watch.read()
    delivery = answer.delivery
    assert (delivery.event_id, delivery.webhook_id) == (event.id, created.webhook_config.id)
    assert (delivery.state, delivery.attempt_count) == (delivery_pb2.DELIVERY_STATE_FAILED, 1)
    [attempt] = delivery.attempts
    assert (attempt.number, attempt.status_code) == (1, 503)
    assert attempt.remote_address == "127.0.0.1"
    assert answer.resume_token


async def test_watch_sends_only_attempts_recorded_after_its_start(
    platform: Platform, pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    await record(pool, webhook_id)
    delivery = await lease_one(pool, webhook_id)
    async with watching(platform) as watch:
        await settle(pool, rescheduled(delivery, seconds=0))
        assert await watch.news(1) == named(delivery)
        [delivery] = await queue.claim(pool, 10, 60)
        await settle(pool, settlement(delivery))
        assert await watch.news(1) == named(delivery, number=2)


async def test_watch_filters_by_merchant_config_and_type(platform: Platform, pool: Any) -> None:
    mine, other = [await make_webhook_config(pool) for _ in range(2)]
    theirs = await make_webhook_config(pool, merchant_id="m_2")
    wanted = format_id("wh", mine)
    async with (
        watching(platform) as every,
        watching(platform, webhook_id=wanted) as of_webhook,
        watching(platform, event_type="refund.failed") as of_type,
        watching(platform, webhook_id=wanted, event_type="refund.failed") as of_both,
        watching(platform, "m_2") as foreign,
    ):
        first = await record(pool, other)
        second = await record(pool, mine)
        third = await record(pool, theirs, merchant_id="m_2")
        fourth = await record(pool, other, event_type="refund.failed")
        fifth = await record(pool, mine, event_type="refund.failed")
        last = await record(pool, theirs, merchant_id="m_2", event_type="refund.failed")
        assert await every.news(4) == named(first, second, fourth, fifth)
        assert await of_webhook.news(2) == named(second, fifth)
        assert await of_type.news(2) == named(fourth, fifth)
        assert await of_both.news(1) == named(fifth)
        assert await foreign.news(2) == named(third, last)


async def test_watch_resumes_after_the_last_response_read(
    platform: Platform, pool: Any, start_platform: Callable[..., Any]
) -> None:
    webhook_id = await make_webhook_config(pool)
    deliveries = await lease_many(pool, webhook_id, 4)
    async with watching(platform) as watch:
        # In one transaction: a token may point into the middle of it.
        await settle(pool, *[settlement(delivery) for delivery in deliveries])
        told = await watch.news(2)
    later = await record(pool, webhook_id)
    # Any server goes on with a token of another.
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


async def test_watch_sends_attempts_that_commit_out_of_order(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    slow, quick = await lease_many(pool, webhook_id, 2)
    before = await newest_position(pool)
    async with watching(platform) as watch, pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        await queue.settle(connection, [settlement(slow)], 10)
        await settle(pool, settlement(quick))
        # The quick one is on record, and yet the order is not known.
        batch = await read_recorded(pool, before, ["m_1"])
        assert format_id("dlv", quick.id) not in {
            format_id("dlv", one.delivery.id) for one in batch.recorded
        }
        reading = asyncio.create_task(watch.news(2))
        await transaction.commit()
        assert await reading == named(slow, quick)
    after = await read_recorded(pool, batch.end, ["m_1"])
    assert [one.delivery.id for one in after.recorded] == [slow.id, quick.id]


async def test_watch_skips_rolled_back_attempts(platform: Platform, pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    first, second = await lease_many(pool, webhook_id, 2)
    async with watching(platform) as watch:
        async with pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            await queue.settle(connection, [settlement(first)], 10)
            await transaction.rollback()
        await settle(pool, settlement(second))
        await settle(pool, settlement(first, outcome=Outcome.SUCCEEDED))
        assert await watch.news(2) == named(second, first)


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
            # The second sign of life: what comes from now on is put before it, not read by itself.
            assert not (await watch.read()).HasField("delivery")
            await _record_many(pool, webhook_id, count)
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
            await _record_many(pool, webhook_id, 1000)
        delivery = await record(pool, webhook_id, event_type="refund.failed")
        async with watching(platform, event_type="refund.failed", resume_token=token) as resumed:
            # The one that `watching` has read comes before any reading, this one from amidst it.
            assert not (await resumed.read()).HasField("delivery")
            halfway = resumed.token
            assert await resumed.news(1) == named(delivery)
        request = {"event_type": "refund.failed", "resume_token": halfway}
        async with watching(platform, **request) as resumed_again:
            assert await resumed_again.news(1) == named(delivery)


class CountingPool:
    """Counts what is read at once; `enough` is set after so many reads."""

    def __init__(self, pool: Any, enough: int):
        self._pool = pool
        self._left = enough
        self._running = self.most = 0
        self.enough = asyncio.Event()

    async def fetch(self, *query: Any) -> Any:
        self._running += 1
        self.most = max(self.most, self._running)
        try:
            return await self._pool.fetch(*query)
        finally:
            self._running -= 1
            self._left -= 1
            if not self._left:
                self.enough.set()


async def test_watches_catch_up_on_one_connection(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(3):
        await _record_many(pool, webhook_id, 1000)
    # Three pages for each of five, and what is left.
    counting, tail = CountingPool(pool, 20), Tail(pool)

    async def follow() -> None:
        watch = Watch(
            counting,  # type: ignore[arg-type]
            tail,
            Watcher("m_2", None, None, 10),
            since=None,
            keep_alive_seconds=60,
            expires_at=time.time() + 60,
        )
        async for _ in watch.follow(Position(0)):
            pass

    following = [asyncio.create_task(follow()) for _ in range(5)]
    async with asyncio.timeout(20):
        await counting.enough.wait()
    for task in following:
        task.cancel()
    await asyncio.gather(*following, return_exceptions=True)
    assert counting.most == 1


async def test_caller_that_reads_nothing_does_not_block_others(
    start_platform: Callable[..., Any], pool: Any
) -> None:
    webhook_id = await make_webhook_config(pool)
    async with (
        start_platform(watch_backlog=100) as platform,
        watching(platform),
        watching(platform, event_type="refund.failed") as quick,
    ):
        # More than the connection buffers for the one that does not read.
        await _record_many(pool, webhook_id, 1500)
        delivery = await record(pool, webhook_id, event_type="refund.failed")
        assert await quick.news(1) == named(delivery)


async def _record_many(pool: Any, webhook_id: UUID, count: int) -> None:
    """So many finished deliveries with an attempt each, in one transaction."""
    await pool.execute(
        """
        WITH finished AS (
            INSERT INTO finished_deliveries
                (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count,
                created_at)
            SELECT new_uuid7(), 'delivered', $1, new_uuid7(), 'm_1', 'payment.succeeded', 1, now()
            FROM generate_series(1, $2::int) RETURNING id
        )
        INSERT INTO attempts
            (delivery_id, number, outcome, detail, started_at, duration_us, response_excerpt)
        SELECT id, 1, 'succeeded', '200 OK', now(), 1, $3 FROM finished
        """,
        webhook_id,
        count,
        BIG_EXCERPT,
    )


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


async def test_position_ignores_rolled_back_transactions(
    start_platform: Callable[..., Any], pool: Any, keyring: KeyRing
) -> None:
    """After a crash the numbers of what was rolled back are given out again."""
    webhook_id = await make_webhook_config(pool)
    await record(pool, webhook_id)
    before = await newest_position(pool)
    for _ in range(5):
        with pytest.raises(asyncpg.DivisionByZeroError):
            await pool.execute("SELECT pg_current_xact_id(), 1 / 0")
    assert await newest_position(pool) == before
    assert (await read_recorded(pool, before, ["m_1"])).end == before
    tokens = ResumeTokens(keyring, "m_1", None, None)
    async with (
        start_platform(watch_keep_alive_seconds=0.05) as platform,
        watching(platform) as watch,
    ):
        for _ in range(3):
            assert tokens.open(watch.token) == before
            assert not (await watch.read()).HasField("delivery")


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


async def test_watches_end_when_the_database_is_restored(pool: Any) -> None:
    webhook_id = await make_webhook_config(pool)
    tail = Tail(pool)
    running, later = [Watcher("m_1", None, None, 10) for _ in range(2)]
    tail.add(running)
    await tail._poll()
    tail.position = Position((await newest_position(pool)).xid + 1_000_000_000)
    await tail._poll()
    assert running.ended is not None
    assert running.ended.reason == "RESUME_TOKEN_INVALID"
    tail.remove(running)
    tail.add(later)
    await tail._poll()
    delivery = await record(pool, webhook_id)
    await tail._poll()
    assert [one.delivery.id for one in later.pending] == [delivery.id]


async def test_invalid_watch_filters_are_refused(platform: Platform, pool: Any) -> None:
    theirs = format_id("wh", await make_webhook_config(pool, merchant_id="m_2"))
    format_id("wh", new_id())
    for request, code, reason in (
        ({"webhook_id": "wh_1"}, StatusCode.INVALID_ARGUMENT, "ID_INVALID"),
        ({"event_type": "\x00"}, StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_NAME_INVALID"),
        ({"webhook_id": theirs}, StatusCode.NOT_FOUND, "WEBHOOK_CONFIG_NOT_FOUND"),
        (
            {"webhook_id": format_id("wh", new_id())},
            StatusCode.NOT_FOUND,
            "WEBHOOK_CONFIG_NOT_FOUND",
        ),
    ):
        async with refused(code, reason), watching(platform, **request):
            pass


async def test_watch_ends_when_its_bearer_token_expires(platform: Platform) -> None:
    token = mint_token(
        platform.key.private_key_file,
        issuer=ISSUER,
        audience="postrider",
        subject="tester",
        scopes=["webhooks:manage"],
        merchant_id="m_1",
        lifetime=timedelta(seconds=2),
    )
    call = platform.deliveries.WatchDeliveries(
        pb.WatchDeliveriesRequest(), metadata=bearer(token), timeout=20
    )
    async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED") as error:
        async for answer in call:
            assert answer.resume_token
    assert "resume_token" in error.message


async def test_server_stop_ends_watches_at_once(
    start_platform: Callable[..., Any],
) -> None:
    loop = asyncio.get_running_loop()
    async with start_platform(server_drain_seconds=60) as platform:
        channel = grpc.aio.insecure_channel(platform.address)
        call = delivery_service_pb2_grpc.DeliveryServiceStub(channel).WatchDeliveries(
            pb.WatchDeliveriesRequest(), metadata=platform.merchant()
        )
        assert await call.read() is not grpc.aio.EOF
        reading = asyncio.ensure_future(call.read())
        began = loop.time()
    assert loop.time() - began < 30
    async with refused(StatusCode.UNAVAILABLE, "SERVER_STOPPING") as error:
        await reading
    assert error.retry_after_seconds
    await channel.close()


async def test_tail_reads_nothing_without_watches(pool: Any) -> None:
    tail = Tail(pool)
    watcher = Watcher("m_1", None, None, 10)
    tail.add(watcher)
    async with asyncio.timeout(20):
        await tail._poll()
        assert watcher.joined
        assert tail._watched.is_set()
        tail.remove(watcher)
        await tail._poll()
    # Now it waits, and where it had read to is forgotten.
    assert not tail._watched.is_set()
    assert tail.position is None


@pytest.mark.parametrize("mode", PLAN_MODES)
async def test_tail_read_uses_the_index_on_a_long_history(pool: Any, mode: str) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(20):
        await _record_many(pool, webhook_id, 1000)
    position = await newest_position(pool)
    await _record_many(pool, webhook_id, 10)
    await pool.execute("VACUUM ANALYZE attempts, finished_deliveries, delivery_queue")
    async with pool.acquire() as connection:
        # As everything of ours connects.
        await connection.execute("SET enable_seqscan = off")
        after = (position.xid, position.delivery_id, position.number, 1000, ["m_1"])
        plan = [
            line
            for statement, arguments in ((_READ, after), (_NEWEST, ()))
            for line in await connection.fetch(
                f"EXPLAIN {await planned_by(connection, mode, statement, arguments)}"
            )
        ]
    text = "\n".join(line[0] for line in plan)
    assert "attempts_default_recorded_xid_idx" in text
    assert "Seq Scan on attempts" not in text, text
    assert "Seq Scan on finished_deliveries" not in text, text


@pytest.mark.parametrize("mode", PLAN_MODES)
async def test_tail_read_scans_few_rows_beyond_its_batch(pool: Any, mode: str) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(20):
        await _record_many(pool, webhook_id, 500)
    await pool.execute("VACUUM ANALYZE attempts, finished_deliveries, delivery_queue")
    async with pool.acquire() as connection:
        await connection.execute(
            "SET enable_seqscan = off; SET enable_bitmapscan = off; "
            "SET enable_incremental_sort = off"
        )
        for statement, arguments in ((_NEWEST, ()), (_READ, (0, UUID(int=0), 0, 100, ["m_1"]))):
            planned = await planned_by(connection, mode, statement, arguments)
            plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {planned}")
            # One transaction's attempts at most beside those that are told.
            assert 0 < _most_attempts(json.loads(plan)[0]["Plan"]) <= 600, plan


def _most_attempts(node: dict[str, Any]) -> float:
    """Of the attempts, the most rows that one part of a plan read."""
    own = 0.0
    if str(node.get("Relation Name", "")).startswith("attempts"):
        own = node["Actual Rows"] * node["Actual Loops"] + node.get("Rows Removed by Filter", 0)
    return max([own, *map(_most_attempts, node.get("Plans", ()))])
