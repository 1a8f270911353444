"""The tail: one reader of new attempts for all watches of a server."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from core.encryption import KeyRing
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
    make_webhook_config,
)
from tests.support.query_plans import PLAN_MODES, planned_by
from tests.support.watching import record, record_many, watching


class CountingPool:
    """Counts concurrent reads. `enough` is set after this many reads."""

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
        await record_many(pool, webhook_id, 1000)
    # Five watches read three full pages and one last page each.
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


async def test_position_ignores_rolled_back_transactions(
    start_platform: Callable[..., Any], pool: Any, keyring: KeyRing
) -> None:
    """After a crash, PostgreSQL assigns the ids of rolled-back transactions again."""
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
    # Without watches the tail waits, and it keeps no position.
    assert not tail._watched.is_set()
    assert tail.position is None


@pytest.mark.parametrize("mode", PLAN_MODES)
async def test_tail_read_uses_the_index_on_a_long_history(pool: Any, mode: str) -> None:
    webhook_id = await make_webhook_config(pool)
    for _ in range(20):
        await record_many(pool, webhook_id, 1000)
    position = await newest_position(pool)
    await record_many(pool, webhook_id, 10)
    await pool.execute("VACUUM ANALYZE attempts, finished_deliveries, delivery_queue")
    async with pool.acquire() as connection:
        # As the server and the engines connect.
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
        await record_many(pool, webhook_id, 500)
    await pool.execute("VACUUM ANALYZE attempts, finished_deliveries, delivery_queue")
    async with pool.acquire() as connection:
        await connection.execute(
            "SET enable_seqscan = off; SET enable_bitmapscan = off; "
            "SET enable_incremental_sort = off"
        )
        for statement, arguments in ((_NEWEST, ()), (_READ, (0, UUID(int=0), 0, 100, ["m_1"]))):
            planned = await planned_by(connection, mode, statement, arguments)
            plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {planned}")
            # At most one transaction's attempts beyond the batch.
            assert 0 < _most_attempts(json.loads(plan)[0]["Plan"]) <= 600, plan


def _most_attempts(node: dict[str, Any]) -> float:
    """The most rows of `attempts` that one node of a plan read."""
    own = 0.0
    if str(node.get("Relation Name", "")).startswith("attempts"):
        own = node["Actual Rows"] * node["Actual Loops"] + node.get("Rows Removed by Filter", 0)
    return max([own, *map(_most_attempts, node.get("Plans", ()))])
