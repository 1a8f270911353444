"""Retention: what is kept and what goes, by rows of long ago on a real database."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from cli.ops.migrate import migrate
from core import queue, retention
from core.errors import ConfigurationError
from core.lifecycle import DeliveryState, Outcome
from core.operator_audit import Operator
from core.retention import partitions, prune, schedule
from core.settings import RetentionSettings
from tests.conftest import database_settings
from tests.support.factories import (
    MERCHANT,
    enqueue_events,
    make_event,
    make_webhook_config,
    settle,
    settlement,
)
from tests.support.history_rows import (
    day_of,
    id_of,
    make_days,
    past_attempt,
    past_delivery,
    past_event,
    past_open,
)

SETTINGS = RetentionSettings()


@pytest.fixture(autouse=True)
def _look_twice_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing moves here that would be right a little later."""
    monkeypatch.setattr("core.queue.invariants._SECOND_LOOK_SECONDS", 0)


async def run(
    url: str, settings: RetentionSettings = SETTINGS, operator: Operator | None = None
) -> Any:
    done = await retention.run(database_settings(url), settings, operator)
    assert done is not None
    return done


async def ids(pool: Any, table: str, key: str = "id") -> set[UUID]:
    return {row[0] for row in await pool.fetch(f"SELECT {key} FROM {table}")}  # noqa: S608


async def part_of(pool: Any, table: str, id_: UUID, key: str = "id") -> str:
    query = f"SELECT tableoid::regclass::text FROM {table} WHERE {key} = $1"  # noqa: S608
    return str(await pool.fetchval(query, id_))


async def assert_sound(pool: Any) -> None:
    broken = {
        finding.invariant.name: finding.broken
        for finding in await queue.check_invariants(pool, 10)
        if finding.broken and finding.invariant.name not in ("backlog_let_in", "due_claimed")
    }
    assert broken == {}


async def test_days_are_made_ahead_in_every_table_and_rows_go_there(
    pool: Any, database_url: str
) -> None:
    assert await retention.days_ahead(pool) == -1

    done = await run(database_url)

    assert done.days_made == [str(day_of(-number).date) for number in range(8)]
    assert await retention.days_ahead(pool) == 7
    webhook_id = await make_webhook_config(pool)
    [event] = await enqueue_events(pool)
    assert await part_of(pool, "events", event.id) == day_of(0).part("events")
    [delivery] = await queue.claim(pool, 1, 60)
    assert delivery.webhook_id == webhook_id
    assert (await run(database_url)).days_made == []


async def test_days_ahead_end_at_the_first_that_one_table_lacks(
    pool: Any, database_url: str
) -> None:
    await run(database_url)

    await pool.execute(f"DROP TABLE {day_of(-3).part('attempts')}")

    assert await retention.days_ahead(pool) == 2


async def test_what_was_delivered_goes_with_its_day_and_what_was_not_stays(
    pool: Any, database_url: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40, 20)
    over, over_event = await past_delivery(pool, webhook_id, 40)
    failed, failed_event = await past_delivery(pool, webhook_id, 40, "failed")
    cancelled, cancelled_event = await past_delivery(pool, webhook_id, 40, "cancelled")
    late, late_event = await past_delivery(pool, webhook_id, 40, ended_days_ago=5)
    young, young_event = await past_delivery(pool, webhook_id, 20)
    waiting, waiting_event = await past_open(pool, webhook_id, 40, attempt_count=1)
    await past_attempt(pool, waiting, "timeout")
    unwanted = await past_event(pool, 40, delivery_count=0)

    done = await run(database_url)

    day = day_of(40)
    assert done.days_dropped == [day.part(t) for t in ("finished_deliveries", "attempts", "events")]
    assert await ids(pool, "finished_deliveries") == {failed, cancelled, late, young}
    assert await ids(pool, "attempts", "delivery_id") == {failed, late, young, waiting}
    kept_events = {failed_event, cancelled_event, late_event, young_event, waiting_event}
    assert await ids(pool, "events") == kept_events
    assert over_event not in kept_events
    assert unwanted not in kept_events
    assert over not in await ids(pool, "finished_deliveries")
    assert await part_of(pool, "events", waiting_event) == "events_kept"
    assert (done.deliveries_kept, done.events_kept) == (3, 4)
    await assert_sound(pool)


async def test_what_outlived_its_day_goes_when_its_own_time_is_over(
    pool: Any, database_url: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 100, 80)
    long_over, long_over_event = await past_delivery(pool, webhook_id, 100, "failed")
    failed, failed_event = await past_delivery(pool, webhook_id, 80, "failed")
    late, late_event = await past_delivery(pool, webhook_id, 100, "failed", ended_days_ago=80)
    waiting, waiting_event = await past_open(pool, webhook_id, 100)

    for _ in range(2):
        await run(database_url)
        assert await ids(pool, "finished_deliveries") == {failed, late}
        assert await ids(pool, "attempts", "delivery_id") == {failed, late}
        assert await ids(pool, "events") == {failed_event, late_event, waiting_event}
    assert long_over != waiting != long_over_event
    await assert_sound(pool)


async def test_rows_without_a_day_go_by_the_same_rule(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    over, _ = await past_delivery(pool, webhook_id, 40)
    failed, failed_event = await past_delivery(pool, webhook_id, 40, "failed")
    _, waiting_event = await past_open(pool, webhook_id, 200)
    young, young_event = await past_delivery(pool, webhook_id, 29)
    assert await part_of(pool, "finished_deliveries", over) == "finished_deliveries_default"

    done = await run(database_url)

    assert (done.deliveries_removed, done.events_removed) == (1, 1)
    assert await ids(pool, "finished_deliveries") == {failed, young}
    assert await ids(pool, "attempts", "delivery_id") == {failed, young}
    assert await ids(pool, "events") == {failed_event, waiting_event, young_event}
    await assert_sound(pool)


async def test_a_redelivery_keeps_its_event_whatever_became_of_what_it_repeats(
    pool: Any, database_url: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40, 35, 3)
    first, event_id = await past_delivery(pool, webhook_id, 40)
    again, _ = await past_delivery(
        pool, webhook_id, 3, "delivered", event_id=event_id, redelivery_of=first
    )
    second, other_event = await past_delivery(pool, webhook_id, 35)
    repeating, _ = await past_open(pool, webhook_id, 1, event_id=other_event, redelivery_of=second)

    await run(database_url)

    assert await ids(pool, "finished_deliveries") == {again}
    assert await ids(pool, "events") == {event_id, other_event}
    assert await ids(pool, "delivery_queue") == {repeating}
    made = await queue.redeliver(pool, "m_1", again)
    assert made is not None
    await assert_sound(pool)


async def test_0_keeps_for_ever(pool: Any, database_url: str) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 4000)
    delivered, _ = await past_delivery(pool, webhook_id, 4000)
    failed, _ = await past_delivery(pool, webhook_id, 4000, "failed")
    await pool.execute(
        "INSERT INTO idempotency_keys VALUES ('m_1', 'k', '', $1, now() - interval '9 years')",
        delivered,
    )
    for_ever = RetentionSettings(
        retention_delivered_days=0,
        retention_undelivered_days=0,
        retention_idempotency_days=0,
        retention_audit_days=0,
    )

    await run(database_url, for_ever)
    assert await ids(pool, "finished_deliveries") == {delivered, failed}
    assert await pool.fetchval("SELECT count(*) FROM idempotency_keys") == 1

    await run(database_url, RetentionSettings(retention_undelivered_days=0))
    assert await ids(pool, "finished_deliveries") == {failed}
    assert await pool.fetchval("SELECT count(*) FROM idempotency_keys") == 0


@pytest.mark.parametrize(("delivered", "undelivered"), [(30, 29), (0, 90)])
def test_failures_may_not_go_before_successes(delivered: int, undelivered: int) -> None:
    with pytest.raises(ValueError, match="WEBHOOK_RETENTION_UNDELIVERED_DAYS"):
        RetentionSettings(
            retention_delivered_days=delivered, retention_undelivered_days=undelivered
        )


# --- broken off, several at schedule, and beside everything else


class KilledError(Exception):
    """Stands for the end of the process."""


class Mortal:
    """A connection that dies before its statement number `lives`: as kill -9, or a lost network."""

    def __init__(self, connection: Any, lives: int):
        self._connection = connection
        self._lives = lives

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._connection, name)
        if name not in ("execute", "fetch", "fetchrow", "fetchval"):
            return found

        async def mortal(*arguments: Any) -> Any:
            self._lives -= 1
            if self._lives < 0:
                self._connection.terminate()
                raise KilledError
            return await found(*arguments)

        return mortal


@pytest.mark.slow
async def test_killed_at_any_statement_the_next_run_ends_what_is_left(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40, 39)
    for days_ago in (100, 40, 39):
        await past_delivery(pool, webhook_id, days_ago)
        await past_delivery(pool, webhook_id, days_ago, "failed")
        await past_open(pool, webhook_id, days_ago)
    monkeypatch.setattr(partitions, "AHEAD", 1)
    session, lives = schedule._session, itertools.count()

    @asynccontextmanager
    async def mortal_session(database: Any) -> AsyncIterator[Any]:
        async with session(database) as connection:
            yield Mortal(connection, next(lives))

    monkeypatch.setattr(schedule, "_session", mortal_session)
    killed = 0
    while True:
        try:
            # The lock of the one before goes when the database notices that it is gone.
            async with asyncio.timeout(5):
                while await retention.run(database_settings(database_url), SETTINGS) is None:
                    pass
        except (KilledError, asyncpg.InterfaceError):
            killed += 1
            await assert_sound(pool)
        else:
            break

    # Each run does what those before left, so there are fewer than one whole run has statements.
    assert killed > 20
    assert await pool.fetchval("SELECT count(*) FROM finished_deliveries") == 2
    assert await pool.fetchval("SELECT count(*) FROM attempts") == 2
    assert await pool.fetchval("SELECT count(*) FROM events") == 5
    assert await pool.fetchval("SELECT count(completed_at) FROM retention_runs") > 0
    assert not [part for part in await partitions.parts(pool) if part.day.date < day_of(30).date]


async def test_one_at_a_time_over_all_processes(pool: Any, database_url: str) -> None:
    settings = database_settings(database_url)
    ran = await asyncio.gather(*(retention.run(settings, SETTINGS) for _ in range(4)))

    assert len([done for done in ran if done is not None]) == 1
    # Nothing stays held.
    await run(database_url)


async def test_what_is_attempted_while_its_day_is_looked_through_is_not_dropped_with_it(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    delivery_id, _ = await past_open(pool, webhook_id, 40, state="ready")
    [delivery] = await queue.claim(pool, 1, 60)
    keep_history = prune.keep_history
    looks: list[int] = []

    async def and_then_it_fails(*arguments: Any, **options: Any) -> int:
        kept = await keep_history(*arguments, **options)
        if not looks:
            await settle(
                pool,
                settlement(delivery, outcome=Outcome.TIMEOUT, final_state=DeliveryState.FAILED),
            )
        looks.append(kept)
        return kept

    monkeypatch.setattr(prune, "keep_history", and_then_it_fails)
    await run(database_url)

    assert looks == [0, 1]
    assert await part_of(pool, "finished_deliveries", delivery_id) == "finished_deliveries_kept"
    assert await part_of(pool, "attempts", delivery_id, "delivery_id") == "attempts_kept"
    await assert_sound(pool)


async def test_a_redelivery_under_way_is_waited_for_and_its_event_stays(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run(database_url)
    webhook_id = await make_webhook_config(pool)
    delivery_id, event_id = await past_delivery(pool, webhook_id, 40)
    waiting = asyncio.Event()
    monkeypatch.setattr(prune, "patiently", _noting(partitions.patiently, waiting))
    async with pool.acquire() as connection:
        transaction = connection.transaction()
        await transaction.start()
        made = await queue.redeliver(connection, MERCHANT, delivery_id)
        running = asyncio.create_task(run(database_url))
        await asyncio.wait_for(waiting.wait(), 10)
        await transaction.commit()
        await running

    assert await ids(pool, "finished_deliveries") == set()
    assert await ids(pool, "delivery_queue") == {made}
    assert await ids(pool, "events") == {event_id}


def _noting(patiently: Any, waiting: asyncio.Event) -> Any:
    async def noting(call: Any, *arguments: Any) -> Any:
        async def noted(*given: Any) -> Any:
            try:
                return await call(*given)
            except asyncpg.LockNotAvailableError:
                waiting.set()
                raise

        return await patiently(noted, *arguments)

    return noting


async def test_a_day_that_somebody_holds_waits_and_goes_later(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run(database_url)
    monkeypatch.setattr("core.retention.partitions._TRIES", 1)
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    await past_delivery(pool, webhook_id, 40)
    # As pg_dump holds every table for as long as it takes.
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("LOCK TABLE events, finished_deliveries IN ACCESS SHARE MODE")
        done = await run(database_url)
        assert done.days_waiting == [str(day_of(40).date)] * 2
        assert await pool.fetchval("SELECT count(*) FROM events") == 1
        await assert_sound(pool)

    assert len((await run(database_url)).days_dropped) == 3


async def test_what_would_hold_others_up_for_long_is_left_to_another_time(
    pool: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    await past_delivery(pool, webhook_id, 40)
    await pool.execute("""
        CREATE FUNCTION dawdle() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
            PERFORM pg_sleep(10);
        END $$;
        CREATE EVENT TRIGGER dawdle ON ddl_command_start WHEN TAG IN ('ALTER TABLE', 'DROP TABLE')
            EXECUTE FUNCTION dawdle();
    """)
    monkeypatch.setattr(partitions, "HOLD_SECONDS", 0.05)
    monkeypatch.setattr(partitions, "AHEAD", 1)
    monkeypatch.setattr(
        prune, "_OPEN_EVENTS", prune._OPEN_EVENTS.replace("DROP TABLE IF EXISTS", "--")
    )

    done = await run(database_url)

    made = [str(day_of(number).date) for number in (0, -1)]
    assert done.days_waiting == [*made, *[str(day_of(40).date)] * 2]
    await assert_sound(pool)


async def test_rows_of_a_day_that_were_there_before_its_part_keep_it_from_being_made(
    pool: Any, database_url: str
) -> None:
    await make_webhook_config(pool)
    [event] = await enqueue_events(pool)
    assert await part_of(pool, "events", event.id) == "events_default"

    done = await run(database_url)

    today = str(day_of(0).date)
    assert (done.days_waiting, len(done.days_made)) == ([today], 7)
    assert await retention.days_ahead(pool) == -1
    [after] = await enqueue_events(pool)
    assert await part_of(pool, "events", after.id) == "events_default"
    await assert_sound(pool)


@pytest.mark.slow
async def test_publishers_and_engines_feel_nothing_while_days_are_made_and_dropped(
    pool: Any, database_url: str
) -> None:
    """The slowest statement beside it waits no longer than retention does for a lock."""
    webhook_id = await make_webhook_config(pool)
    past = range(35, 45)
    await make_days(pool, *past)
    for days_ago in past:
        for state in ("delivered", "failed"):
            await past_delivery(pool, webhook_id, days_ago, state)
    slowest, sent, stop = 0.0, 0, asyncio.Event()

    async def deliver_on_and_on() -> None:
        nonlocal slowest, sent
        while not stop.is_set():
            for step in (enqueue_one, claim_and_settle):
                began = monotonic()
                await step()
                slowest = max(slowest, monotonic() - began)
            sent += 1

    async def enqueue_one() -> None:
        await queue.enqueue(pool, [make_event()])

    async def claim_and_settle() -> None:
        async with pool.acquire() as connection, connection.transaction():
            # As every connection of ours: an error is what must not come of it.
            await connection.execute("SET LOCAL lock_timeout = '5s'")
            leased = await queue.claim(connection, 10, 60)
            await queue.settle(connection, [settlement(one) for one in leased], 10)

    working = [asyncio.create_task(deliver_on_and_on()) for _ in range(4)]
    done = await run(database_url)
    stop.set()
    await asyncio.gather(*working)

    assert len(done.days_dropped) == 3 * len(past)
    assert (done.days_waiting, len(done.days_made)) in (([str(day_of(0).date)], 7), ([], 8))
    assert sent > 20
    # Three tables' locks after each other, and this machine's own slowness.
    assert slowest < 3 * partitions.LOCK_SECONDS + 1.0, slowest
    assert await pool.fetchval("SELECT count(*) FROM events") >= sent
    await assert_sound(pool)


async def test_who_freezes_while_a_day_is_made_leaves_no_lock_behind(pool: Any) -> None:
    sent: list[str] = []
    async with pool.acquire() as connection:
        connection.add_query_logger(lambda query: sent.append(query.query))
        assert await partitions.make_day(connection, day_of(40))
    # Whatever locks is one message with its own end, which asks the client for nothing more.
    [change] = [query for query in sent if "TABLE" in query]
    assert change.count("ATTACH PARTITION") == 3
    assert not any("BEGIN" in query for query in sent)


async def test_a_merchant_erased_while_its_day_goes_is_erased_in_what_is_kept(
    pool: Any, database_url: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    _, event_id = await past_delivery(pool, webhook_id, 40, "failed")
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute(
            "UPDATE events SET payload = '', content_type = '' WHERE id = $1", event_id
        )
        running = asyncio.create_task(run(database_url))
        # Until it waits for our row.
        async with asyncio.timeout(10):
            while not await pool.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"):
                pass
    await running

    assert await pool.fetchval("SELECT payload FROM events") == b""
    assert await part_of(pool, "events", event_id) == "events_kept"


async def test_idempotency_keys_and_audit_entries_go_when_their_time_is_over(
    pool: Any, database_url: str
) -> None:
    for key, days_ago in (("young", 29), ("old", 31)):
        await pool.execute(
            "INSERT INTO idempotency_keys VALUES ('m_1', $1, '', $2, $3)",
            key,
            id_of(days_ago),
            datetime.now(UTC) - timedelta(days=days_ago),
        )
    for actor, years in (("young", 6.9), ("old", 7.1)):
        await pool.execute(
            "INSERT INTO audit_entries (id, actor, action, resource, result, request_id,"
            " created_at) VALUES ($1, $2, 'X', 'x', 'OK', '', $3)",
            id_of(years * 365.25),
            actor,
            datetime.now(UTC) - timedelta(days=years * 365.25),
        )

    done = await run(database_url, operator=Operator("cli:ann", "host", "postrider/0"))

    assert (done.idempotency_keys_removed, done.audit_entries_removed) == (1, 1)
    assert await ids(pool, "idempotency_keys", "key") == {"young"}
    # A person's run is on record, itself.
    assert await ids(pool, "audit_entries", "actor") == {"young", "cli:ann"}
    entry = await pool.fetchrow("SELECT * FROM audit_entries WHERE actor = 'cli:ann'")
    assert (entry["action"], entry["caller_address"]) == ("RunRetention", "host")
    assert entry["user_agent"] == "postrider/0"


async def test_a_look_says_what_a_run_would_do_and_changes_nothing(
    pool: Any, database_url: str
) -> None:
    webhook_id = await make_webhook_config(pool)
    await make_days(pool, 40)
    for days_ago in (40, 50):
        await past_delivery(pool, webhook_id, days_ago)
        await past_delivery(pool, webhook_id, days_ago, "failed")
    before = await pool.fetch("SELECT relname FROM pg_class ORDER BY 1")

    would = await retention.look(database_settings(database_url), SETTINGS)

    assert await pool.fetch("SELECT relname FROM pg_class ORDER BY 1") == before
    assert await pool.fetchval("SELECT count(*) FROM finished_deliveries") == 4
    assert await retention.last_completed(pool) is None
    did = await run(database_url)
    assert sorted(would.days_dropped) == sorted(did.days_dropped)
    assert would.days_made == did.days_made
    assert (would.deliveries_kept, would.deliveries_removed) == (1, 1)
    assert (did.deliveries_kept, did.deliveries_removed) == (1, 1)
    assert await retention.last_completed(pool) is not None


# --- what was there before there were days


async def test_what_was_there_before_stays_visible_and_goes_in_its_time(
    pool: Any, database_url: str
) -> None:
    settings = database_settings(database_url)
    await asyncio.to_thread(migrate, settings, down_to="20261123_signatures")
    webhook_id = await make_webhook_config(pool)
    await past_delivery(pool, webhook_id, 40)
    failed, failed_event = await past_delivery(pool, webhook_id, 40, "failed")
    _, waiting_event = await past_open(pool, webhook_id, 40)
    await asyncio.to_thread(migrate, settings)
    await pool.expire_connections()

    assert await part_of(pool, "finished_deliveries", failed) == "finished_deliveries_before"
    # As the previous release writes beside us.
    young, young_event = await past_delivery(pool, webhook_id, 1)
    assert await part_of(pool, "attempts", young, "delivery_id") == "attempts_default"
    await assert_sound(pool)
    assert (await run(database_url)).parts_dropped == []
    assert await ids(pool, "finished_deliveries") == {failed, young}
    assert await ids(pool, "events") == {failed_event, waiting_event, young_event}
    await assert_sound(pool)
    strict = RetentionSettings(retention_undelivered_days=30)
    assert (await run(database_url, strict)).parts_dropped == [
        "finished_deliveries_before",
        "attempts_before",
    ]
    assert await ids(pool, "events") == {waiting_event, young_event}
    await assert_sound(pool)
    await asyncio.to_thread(migrate, settings, down_to="20261123_signatures")
    await pool.expire_connections()
    assert await ids(pool, "events") == {waiting_event, young_event}
    assert await ids(pool, "finished_deliveries") == {young}


async def test_what_was_there_is_not_locked_while_the_migration_reads_it(
    pool: Any, database_url: str
) -> None:
    settings = database_settings(database_url)
    await asyncio.to_thread(migrate, settings, down_to="20261123_signatures")
    await past_event(pool, 1)
    # Broken off where it has read everything, by somebody who holds the table.
    async with pool.acquire() as connection:
        await connection.execute("""
            CREATE FUNCTION stop() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
                IF to_regclass('events_undivided') IS NOT NULL THEN RAISE 'stopped'; END IF;
            END $$;
            CREATE EVENT TRIGGER stop ON ddl_command_end EXECUTE FUNCTION stop();
        """)
        with pytest.raises(ConfigurationError, match="stopped"):
            await asyncio.to_thread(migrate, settings)
        await connection.execute("DROP EVENT TRIGGER stop; DROP FUNCTION stop()")
        constraint = "SELECT convalidated FROM pg_constraint WHERE conname = 'events_unmarked'"
        assert await connection.fetchval(constraint) is True
    # As the previous release goes on writing, for as long as that takes.
    await past_event(pool, 0)
    await asyncio.to_thread(migrate, settings)
    await pool.expire_connections()
    assert await pool.fetchval("SELECT count(*) FROM events_before") == 2


async def test_old_runs_are_forgotten_but_not_what_they_removed(
    pool: Any, database_url: str
) -> None:
    await make_webhook_config(pool)
    # Of a time when next to nothing was kept: the second removed more than any later one.
    for days_ago, removed in ((300, 250.0), (200, 150.0), (100, 1.0)):
        await pool.execute(
            "INSERT INTO retention_runs (id, actor, began_at, removed_before)"
            " VALUES (new_uuid7(), 'engine', $1, $2)",
            datetime.now(UTC) - timedelta(days=days_ago),
            datetime.now(UTC) - timedelta(days=removed),
        )

    await run(database_url)

    kept = await pool.fetch("SELECT began_at FROM retention_runs ORDER BY began_at")
    assert [(datetime.now(UTC) - row["began_at"]).days for row in kept] == [100, 0]
