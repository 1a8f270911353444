"""Guards of the plans: every statement of the queue finds its rows by an index.

The statements run for real, in transactions that are rolled back, on a crowded queue: 20,000 rows,
most of them parked, and a history as long.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy.dialects import postgresql

from cli.dev.postgres import EmbeddedPostgres
from cli.ops.migrate import migrate
from core.ids import first_id_at, new_id
from core.lifecycle import AttemptResult, DeliveryState, Outcome
from core.postgres.connect import Connector
from core.postgres.planner import equal
from core.queue import (
    NewEvent,
    Settlement,
    backlog,
    breakers,
    open_ranges,
    ordering,
    rate_limit,
    redelivery,
    stats,
)
from core.queue.claim import _CLAIM, _RECLAIM, _RECLAIMED_OFTEN, _RELEASE, _RELEASE_CLAIMED
from core.queue.enqueue import (
    _ENQUEUE,
    _ENQUEUE_BURST,
    _ENQUEUE_IN_ORDER,
    _EVENT,
    _READY_MAX,
    _ranks,
)
from core.queue.invariants import INVARIANTS, Invariant
from core.queue.settle import _CANCEL_WEBHOOK, _HELD, _INPUT, _SETTLE
from core.retention import move, partitions, prune
from delivery import database_stats
from server.admin import audit_log, erasure, queue_status
from server.deliveries import store as delivery_store
from server.events import store as event_store
from tests.conftest import database_settings
from tests.support.factories import STARTED_AT, make_event
from tests.support.plans import execution

_CROWD = """
INSERT INTO webhook_configs
    (id, merchant_id, url, events, secret_ciphertext, secret_key_id, consecutive_failures, ordered)
SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000 + n)::bigint - 5000), 12, '0')
        || right(replace(new_uuid7()::text, '-', ''), 20))::uuid,
    'm_' || n / 2, 'https://merchant.example/', '{payment.succeeded}', '', 'k1', 1, true
FROM generate_series(1, 4000) n;

INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count)
SELECT new_uuid7(), 'm_1', 'payment.succeeded', 'application/json', repeat('x', 500)::bytea, 1
FROM generate_series(1, 20000);

-- Of 20 rows 14 are parked, for few configs; 4 are ready, half of them due; 2 are leased.
WITH configs AS (
    SELECT id, row_number() OVER (ORDER BY id) AS n FROM webhook_configs
), numbered AS (
    SELECT id AS event_id, row_number() OVER (ORDER BY id) AS n FROM events
)
INSERT INTO delivery_queue
    (id, webhook_id, event_id, merchant_id, event_type, state, due_at, lease_id, lease_until)
SELECT new_uuid7(), c.id, e.event_id, 'm_' || e.n % 2000, 'payment.succeeded',
    CASE WHEN e.n % 20 < 14 THEN 'parked' WHEN e.n % 20 < 18 THEN 'ready' ELSE 'leased' END,
    now() + (e.n % 2 * 2 - 1) * (e.n % 997 + 1) * interval '1 minute',
    CASE WHEN e.n % 20 >= 18 THEN new_uuid7() END,
    CASE WHEN e.n % 20 >= 18 THEN now() + (e.n % 40 - 30) * interval '1 minute' END
FROM numbered e JOIN configs c
    ON c.n = CASE WHEN e.n % 20 < 14 THEN 1 + e.n % 10 ELSE 1 + e.n % 4000 END;

INSERT INTO finished_deliveries
    (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at)
SELECT new_uuid7(), 'delivered', webhook_id, event_id, merchant_id, event_type, 1, now()
FROM delivery_queue;

INSERT INTO attempts (delivery_id, number, outcome, detail, started_at, duration_us)
SELECT id, 1, 'succeeded', '200 OK', now(), 1 FROM finished_deliveries;

-- Over 200 partitions, by 100 actors, on 1,000 resources of 500 merchants.
INSERT INTO audit_entries
    (id, actor, merchant_id, action, resource, result, request_id, created_at)
SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0')
        || right(replace(new_uuid7()::text, '-', ''), 20))::uuid,
    'actor ' || n % 100, 'm_' || n % 500, 'X', 'resource ' || n % 1000, 'OK', '', at
FROM generate_series(1, 20000) n, LATERAL (SELECT now() - n * interval '15 minutes' AS at) t;

INSERT INTO idempotency_keys SELECT 'm_1', n, '', new_uuid7(), now() - n * interval '1 minute'
FROM generate_series(1, 20000) n;

-- Of 5 configs with a backlog, 40 chains of 25; every second one has lost its first.
INSERT INTO delivery_queue (id, webhook_id, event_id, merchant_id, event_type, state, due_at,
    ordering_key, ordering_position)
SELECT new_uuid7(), c.id, e.id, c.merchant_id, 'payment.succeeded',
    CASE WHEN place = 1 THEN 'ready' ELSE 'blocked' END,
    CASE WHEN place = 1 THEN now() + interval '1 day' ELSE 'infinity' END, 'key ' || key, place
FROM (
    SELECT id, merchant_id FROM webhook_configs
    WHERE id IN (SELECT webhook_id FROM delivery_queue WHERE state = 'parked')
    ORDER BY id LIMIT 5
) c, generate_series(1, 40) key, generate_series(1, 25) place,
    (SELECT id, row_number() OVER (ORDER BY id) AS n, count(*) OVER () AS events FROM events) e
WHERE e.n = 1 + (key * 25 + place) % e.events AND (place > 1 OR key % 2 = 1);
"""


# What a vacuum at a quiet moment leaves behind. The planner multiplies it by the pages there are
# when it plans, and what it plans then may be kept while the queue grows.
_KNOWN_AS_EMPTY = """
UPDATE pg_class SET reltuples = 0, relpages = 100
WHERE oid = 'delivery_queue'::regclass
    OR oid IN (SELECT indexrelid FROM pg_index WHERE indrelid = 'delivery_queue'::regclass)
"""


@asynccontextmanager
async def _database(postgres: EmbeddedPostgres, name: str, numbers: range) -> AsyncIterator[Any]:
    """A connection to a new database with these partitions, by their distance from today."""
    admin = await asyncpg.connect(postgres.url())
    await admin.execute(f"CREATE DATABASE {name}")
    settings = database_settings(postgres.url(name))
    await asyncio.to_thread(migrate, settings)
    # As everything of ours connects.
    connection = await Connector(settings, "query-plans").connect()
    today = await partitions.today(connection)
    for number in numbers:
        assert await partitions.create_day(connection, today.later(number))
    yield connection
    await connection.close()
    await admin.execute(f"DROP DATABASE {name}")
    await admin.close()


@pytest.fixture(scope="module")
async def burst(postgres: EmbeddedPostgres) -> AsyncIterator[Any]:
    """A connection to a database with all these rows, analysed."""
    async with _database(postgres, "query_plans", range(-30, 8)) as connection:
        await connection.execute(_CROWD)
        await connection.execute("VACUUM ANALYZE")
        yield connection


@pytest.fixture(params=["analysed", "vacuumed when it was empty"])
async def crowded(burst: Any, request: pytest.FixtureRequest) -> Any:
    """That connection, when the planner knows of the crowd and when it thinks there is none."""
    if request.param == "analysed":
        await burst.execute("VACUUM ANALYZE delivery_queue")
    else:
        await burst.execute(_KNOWN_AS_EMPTY)
    return burst


@dataclass(frozen=True, slots=True)
class Scan:
    """One node that reads a table or an index, with what it read in all its loops."""

    kind: str
    relation: str
    index: str | None
    rows: float
    filtered: float
    pages: int
    entered: bool


@dataclass(frozen=True, slots=True)
class Plan:
    scans: list[Scan]
    pages: int
    kinds: set[str]
    #: PostgreSQL before 18 rounds the rows of a loop: half a row is none.
    whole_rows: bool

    def index_scan(self, index: str) -> Scan:
        """The scan of this index, `_day_` standing for any day; fails when there is none."""
        found = [scan for scan in self.scans if scan.index == index]
        assert found, f"{index} is not used, but {[(s.kind, s.relation) for s in self.scans]}"
        # Of several partitions, the one that has something.
        return max(found, key=lambda scan: scan.rows + scan.filtered)

    def days_entered(self, table: str) -> int:
        """How many days of a table were really looked into."""
        return sum(s.entered for s in self.scans if re.fullmatch(rf"{table}_\d{{8}}", s.relation))

    def assert_nothing_is_walked(self) -> None:
        """Every table that grows is entered by an index.

        A batch may walk the webhook configs: for these few thousand that is the better plan.
        """
        walked = {scan.relation for scan in self.scans if scan.kind == "Seq Scan"}
        assert walked <= {"webhook_configs"}


async def test_a_claim_walks_the_due_index_and_reads_no_more_than_it_takes(crowded: Any) -> None:
    plan = await _explain(crowded, _CLAIM, 100, new_id(), timedelta(seconds=60))

    due = plan.index_scan("delivery_queue_due")
    assert (due.rows, due.filtered) == (100, 0)
    assert plan.index_scan("delivery_queue_pkey").rows == 100
    assert plan.index_scan("events_day_pkey").rows == 100
    # Of all the days there are.
    assert plan.days_entered("events") == 1
    plan.assert_nothing_is_walked()


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.name)
async def test_a_page_of_an_invariant_reads_that_page(crowded: Any, invariant: Invariant) -> None:
    plan = await _explain(crowded, invariant.page(100), UUID(int=(1 << 128) - 1))
    plan.assert_nothing_is_walked()
    # Of 20,000 rows and more; what is made within a second of a page is read with it.
    read = max(scan.rows + scan.filtered for scan in plan.scans if scan.kind != "CTE Scan")
    near = {"event_has_deliveries", "backlog_let_in", "lease_taken_back"}
    # What waits in chains is put in ordering, all of it, by a planner that thinks there is none.
    bound = 5000 if invariant.name == "chain_has_first" else 200
    assert invariant.name in near or read <= bound, plan.scans


async def test_a_claim_costs_the_same_however_much_is_parked(crowded: Any) -> None:
    arguments = (100, new_id(), timedelta(seconds=60))
    before = await _explain(crowded, _CLAIM, *arguments)
    transaction = crowded.transaction()
    await transaction.start()
    # All of it due longer than anything that is ready, so a claim that saw it would meet it first.
    await crowded.execute("""
        INSERT INTO delivery_queue
            (id, webhook_id, event_id, merchant_id, event_type, state, due_at)
        SELECT new_uuid7(), webhook_id, event_id, merchant_id, event_type, 'parked',
            now() - interval '1 year'
        FROM delivery_queue, generate_series(1, 2)
    """)
    after = await _explain(crowded, _CLAIM, *arguments)
    await transaction.rollback()
    await crowded.execute("VACUUM delivery_queue")

    fewer, more = before.index_scan("delivery_queue_due"), after.index_scan("delivery_queue_due")
    assert (more.rows, more.filtered) == (fewer.rows, 0)
    assert more.pages <= fewer.pages + 2


async def test_a_reclaim_walks_the_leases_that_ended(crowded: Any) -> None:
    plan = await _explain(crowded, _RECLAIM, 100)

    lease = plan.index_scan("delivery_queue_lease")
    ended = await crowded.fetchval("SELECT count(*) FROM delivery_queue WHERE lease_until < now()")
    assert 100 <= lease.rows <= ended < 2000
    assert lease.filtered == 0
    assert plan.index_scan("delivery_queue_pkey").rows == 100
    plan.assert_nothing_is_walked()
    # With a limit above what has ended, the leases that still hold are not looked at either.
    whole = (await _explain(crowded, _RECLAIM, ended + 100)).index_scan(lease.index or "")
    assert (whole.rows, whole.filtered) == (ended, 0)

    ids = [row["id"] for row in await crowded.fetch("SELECT id FROM delivery_queue LIMIT 100")]
    often = await _explain(crowded, _RECLAIMED_OFTEN, ids, 3)
    looked_at = often.index_scan("delivery_queue_pkey")
    assert looked_at.rows + looked_at.filtered == 100
    often.assert_nothing_is_walked()


@pytest.mark.parametrize("most", [None, 8])
async def test_letting_in_counts_and_chooses_by_the_configs_own_indexes(
    crowded: Any, most: int | None
) -> None:
    webhook_ids = await backlog.webhooks_with_backlog(crowded)
    assert len(webhook_ids) == 10

    plan = await _explain(crowded, backlog._ADMIT, webhook_ids, [16] * 10, most)

    assert plan.index_scan("delivery_queue_of_webhook").rows <= 16 * len(webhook_ids)
    chosen = plan.index_scan("delivery_queue_parked")
    assert 0 < chosen.rows <= (most or 16) * len(webhook_ids)
    assert chosen.filtered == 0
    assert plan.index_scan("webhook_configs_pkey").rows == len(webhook_ids)
    plan.assert_nothing_is_walked()


async def test_the_backlog_scan_probes_once_a_config_however_long_its_backlog(crowded: Any) -> None:
    plan = await _explain(crowded, backlog._WEBHOOKS_WITH_BACKLOG)

    scans = [scan for scan in plan.scans if scan.index == "delivery_queue_parked"]
    # 14,000 are parked. One probe finds the first config, one the next of each; PostgreSQL before
    # 18 rounds the last probe, which finds nothing, up to a row.
    assert 10 <= sum(scan.rows for scan in scans) <= 11
    assert plan.pages <= 60
    plan.assert_nothing_is_walked()


async def test_what_is_held_is_found_by_the_keys_of_what_is_asked_about(crowded: Any) -> None:
    ids = [row["id"] for row in await crowded.fetch("SELECT id FROM delivery_queue LIMIT 100")]
    plan = await _explain(crowded, _HELD, ids, ids[:50])
    queue_scans = [scan for scan in plan.scans if scan.relation == "delivery_queue"]
    assert [scan.rows + scan.filtered for scan in queue_scans] == [100, 100]
    plan.assert_nothing_is_walked()


async def test_a_settle_touches_its_deliveries_and_configs_by_their_keys(crowded: Any) -> None:
    leased = await crowded.fetch(
        "SELECT id, lease_id, webhook_id FROM delivery_queue WHERE state = 'leased' LIMIT 100"
    )
    states = [DeliveryState.DELIVERED, DeliveryState.FAILED, None, None] * 25
    settlements = [
        Settlement(
            delivery_id=row["id"],
            lease_id=row["lease_id"],
            webhook_id=row["webhook_id"],
            merchant_id="m_1",
            due_since=STARTED_AT,
            number=1,
            started_at=STARTED_AT,
            result=AttemptResult(Outcome.HTTP_ERROR, 500, "500", first_byte_us=1),
            final_state=state,
            next_attempt_in_seconds=60.0,
            blamed_version=1 if state is DeliveryState.FAILED else None,
        )
        for row, state in zip(leased, states, strict=True)
    ]

    plan = await _explain(
        crowded,
        _SETTLE,
        10,
        *_INPUT.arguments(settlements),
    )

    by_key = [scan for scan in plan.scans if scan.index == "delivery_queue_pkey"]
    # Of what is to fail, to be finished and to go on.
    assert sorted(scan.rows + scan.filtered for scan in by_key) == [25, 50, 50]
    assert plan.index_scan("webhook_configs_pkey").rows <= 50
    plan.assert_nothing_is_walked()


@pytest.mark.parametrize("statement", [_ENQUEUE, _ENQUEUE_BURST])
async def test_enqueueing_finds_configs_and_what_they_have_by_index(
    crowded: Any, statement: str
) -> None:
    events = [make_event(merchant_id=f"m_{n}", idempotency_key=f"k{n}") for n in (10, 20, 30)]

    plan = await _explain(
        crowded,
        statement,
        *_EVENT.arguments(events),
        _ranks(events),
    )

    assert plan.index_scan("webhook_configs_of_merchant").rows <= 20
    # Of a backlog its first row at the most, of the others as many as may be ready.
    matched = 2 * len(events)
    parked = plan.index_scan("delivery_queue_parked")
    assert (parked.rows <= matched, parked.filtered) == (True, 0)
    if statement == "_ENQUEUE_CROWD":
        due = plan.index_scan("delivery_queue_of_webhook")
        assert (due.rows <= matched * _READY_MAX, due.filtered) == (True, 0)
    plan.assert_nothing_is_walked()


async def test_events_without_ordering_keys_look_for_no_chains(crowded: Any) -> None:
    events = [make_event(merchant_id="m_1") for _ in range(3)]

    plan = await _explain(crowded, _ENQUEUE, *_EVENT.arguments(events), _ranks(events))

    chains = {"delivery_queue_first", "delivery_queue_blocked"}
    assert not chains & {scan.index for scan in plan.scans}
    assert "WindowAgg" not in plan.kinds


async def test_enqueueing_in_order_reads_the_ends_of_its_chains_only(crowded: Any) -> None:
    merchant_id, configs = await crowded.fetchrow("""
        SELECT merchant_id, count(DISTINCT webhook_id) FROM delivery_queue
        WHERE state = 'blocked' GROUP BY merchant_id LIMIT 1
    """)
    keys = [f"key {n}" for n in range(1, 21)]
    events = [make_event(merchant_id=merchant_id, ordering_key=key) for key in keys]

    plan = await _explain(
        crowded,
        _ENQUEUE_IN_ORDER,
        *_EVENT.arguments(events),
        _ranks(events),
    )

    # In each chain 24 wait, in every second one behind a first.
    last = plan.index_scan("delivery_queue_blocked")
    assert (last.rows, last.filtered) == (20 * configs, 0)
    first = plan.index_scan("delivery_queue_first")
    assert (first.rows, first.filtered) == (_halves(plan, 10 * configs), 0)
    plan.assert_nothing_is_walked()


async def test_promoting_reads_the_beginnings_of_its_chains_only(crowded: Any) -> None:
    chains = await ordering.chains_after(crowded, None, 1000)
    assert len(chains) == 200

    plan = await _explain(
        crowded,
        ordering._PROMOTE,
        [chain.webhook_id for chain in chains],
        [chain.ordering_key for chain in chains],
    )

    assert plan.index_scan("delivery_queue_first").rows == _halves(plan, 100)
    # One each; those that have a first may have been looked at, too.
    assert 100 <= plan.index_scan("delivery_queue_blocked").rows <= 200
    assert plan.index_scan("delivery_queue_pkey").rows == 100
    plan.assert_nothing_is_walked()


async def test_looking_through_chains_probes_once_a_chain_however_long_it_is(crowded: Any) -> None:
    found, after = [], None
    while page := await ordering.chains_after(crowded, after, 30):
        found += page
        after = page[-1]
    assert len(found) == len(set(found)) == 200

    plan = await _explain(crowded, ordering._CHAINS, UUID(int=0), "", 50)

    scans = [scan for scan in plan.scans if scan.index == "delivery_queue_blocked"]
    assert sum(scan.rows for scan in scans) == 50
    assert sum(scan.filtered for scan in scans) == 0
    plan.assert_nothing_is_walked()


async def test_a_breaker_opens_by_the_keys_of_its_config_and_of_what_it_has_due(
    crowded: Any,
) -> None:
    [webhook_id, *_] = await backlog.webhooks_with_backlog(crowded)
    ready = await crowded.fetchval(
        "SELECT count(*) FROM delivery_queue WHERE webhook_id = $1 AND state <> 'parked'",
        webhook_id,
    )

    opening = await _explain(
        crowded, breakers._OPEN, [webhook_id], [None], [True], [0.0], 5.0, 300.0, [1]
    )
    closing = await _explain(crowded, breakers._CLOSE, [webhook_id])

    assert opening.index_scan("webhook_configs_pkey").rows == 1
    due = opening.index_scan("delivery_queue_of_webhook")
    assert due.rows + due.filtered <= ready
    assert closing.index_scan("webhook_configs_pkey").rows <= 1
    for plan in (opening, closing):
        plan.assert_nothing_is_walked()


async def test_a_claim_probes_the_backlogs_of_its_configs_and_reads_none(crowded: Any) -> None:
    plan = await _explain(crowded, _CLAIM, 100, new_id(), timedelta(seconds=60))

    assert plan.index_scan("delivery_queue_parked").rows <= 100


async def test_spending_of_a_rate_finds_the_configs_by_key(crowded: Any) -> None:
    await crowded.execute("UPDATE webhook_configs SET rate_limit = 5")
    ids = [row["id"] for row in await crowded.fetch("SELECT id FROM webhook_configs LIMIT 20")]

    plan = await _explain(crowded, rate_limit._SPEND_RATE, ids, [3] * len(ids))

    assert plan.index_scan("webhook_configs_pkey").rows <= len(ids)
    plan.assert_nothing_is_walked()


async def test_what_unanswered_claims_took_is_found_among_what_is_leased(crowded: Any) -> None:
    lease_ids = [
        row["lease_id"]
        for row in await crowded.fetch(
            "SELECT lease_id FROM delivery_queue WHERE state = 'leased' LIMIT 10"
        )
    ]

    plan = await _explain(crowded, _RELEASE_CLAIMED, lease_ids)

    leased = await crowded.fetchval("SELECT count(*) FROM delivery_queue WHERE state = 'leased'")
    scan = plan.index_scan("delivery_queue_lease")
    assert (scan.rows, scan.rows + scan.filtered) == (10, leased)
    plan.assert_nothing_is_walked()


@pytest.mark.parametrize("statement", [_RELEASE, backlog._PARK_LEASED])
async def test_leases_are_given_up_by_key(crowded: Any, statement: str) -> None:
    leased = await crowded.fetch(
        "SELECT id, lease_id FROM delivery_queue WHERE state = 'leased' LIMIT 50"
    )

    plan = await _explain(
        crowded,
        statement,
        [row["id"] for row in leased],
        [row["lease_id"] for row in leased],
    )

    assert plan.index_scan("delivery_queue_pkey").rows == 50
    plan.assert_nothing_is_walked()


async def test_parking_a_config_reads_its_ready_part_only(crowded: Any) -> None:
    [webhook_id, *_] = await backlog.webhooks_with_backlog(crowded)
    waiting = "SELECT count(*) FROM delivery_queue WHERE webhook_id = $1 AND state = 'blocked'"
    assert await crowded.fetchval(waiting, webhook_id) == 960

    plan = await _explain(crowded, backlog._PARK_WEBHOOKS, [webhook_id])

    ready = plan.index_scan("delivery_queue_of_webhook")
    # Its 960 blocked ones are due never, and are not looked at.
    assert ready.rows + ready.filtered <= 100
    plan.assert_nothing_is_walked()


async def test_parking_a_crowd_reads_what_is_due_of_its_config(crowded: Any) -> None:
    webhook_id = await crowded.fetchval(
        "SELECT webhook_id FROM delivery_queue WHERE state = 'ready' AND due_at <= now() LIMIT 1"
    )
    due = await crowded.fetchval(
        "SELECT count(*) FROM delivery_queue"
        " WHERE webhook_id = $1 AND state <> 'parked' AND due_at <= now()",
        webhook_id,
    )

    plan = await _explain(crowded, backlog._PARK_DUE, [webhook_id])

    read = plan.index_scan("delivery_queue_of_webhook")
    assert read.rows + read.filtered == due
    plan.assert_nothing_is_walked()


async def test_cancelling_a_config_reads_its_own_deliveries_only(crowded: Any) -> None:
    webhook_id = await _quiet_config(crowded)
    own = await crowded.fetchval(
        "SELECT count(*) FROM delivery_queue WHERE webhook_id = $1", webhook_id
    )

    plan = await _explain(crowded, _CANCEL_WEBHOOK, webhook_id, 1000)

    of_queue = [scan for scan in plan.scans if scan.relation == "delivery_queue"]
    assert sum(scan.rows + scan.filtered for scan in of_queue) <= 4 * own
    plan.assert_nothing_is_walked()


async def test_finished_deliveries_and_their_attempts_are_read_by_key(crowded: Any) -> None:
    ids = await crowded.fetchval(
        "SELECT array_agg(id) FROM (SELECT id FROM finished_deliveries LIMIT 50) f"
    )

    finished = await _explain(crowded, "SELECT * FROM finished_deliveries WHERE id = ANY ($1)", ids)
    attempts = await _explain(
        crowded, "SELECT * FROM attempts WHERE delivery_id = ANY ($1) ORDER BY number", ids
    )

    assert finished.index_scan("finished_deliveries_day_pkey").rows == 50
    assert (finished.days_entered("finished_deliveries"), attempts.days_entered("attempts")) == (
        1,
        1,
    )
    assert attempts.index_scan("attempts_day_pkey").rows == 50


@pytest.mark.parametrize(
    ("column", "index"),
    [
        ("webhook_id", "finished_deliveries_day_webhook_id_id_idx"),
        ("event_id", "finished_deliveries_day_event_id_idx"),
    ],
)
async def test_a_page_of_the_history_is_read_in_the_order_of_an_index(
    crowded: Any, column: str, index: str
) -> None:
    value = await crowded.fetchval(f"SELECT {column} FROM finished_deliveries LIMIT 1")  # noqa: S608

    plan = await _explain(
        crowded,
        f"SELECT * FROM finished_deliveries WHERE {column} = $1 ORDER BY id DESC LIMIT 50",  # noqa: S608
        value,
    )

    assert plan.index_scan(index).rows <= 50


@pytest.mark.parametrize("merchant_id", [None, "m_1"])
async def test_a_page_of_redeliveries_reads_that_page_of_what_failed(
    crowded: Any, merchant_id: str | None
) -> None:
    transaction = crowded.transaction()
    await transaction.start()
    await crowded.execute("""
        UPDATE finished_deliveries SET state = 'failed'
        WHERE id::text ~ '[0-1]$' OR merchant_id = 'm_1';
        INSERT INTO delivery_queue
            (id, webhook_id, event_id, merchant_id, event_type, state, redelivery_of)
        SELECT new_uuid7(), webhook_id, event_id, merchant_id, event_type, 'ready', id
        FROM finished_deliveries WHERE state = 'failed' AND id::text ~ '0$';
        ANALYZE finished_deliveries; ANALYZE delivery_queue
    """)
    wanted = redelivery.FailedFilter(
        STARTED_AT, STARTED_AT.replace(year=2100), merchant_id, outcomes=[Outcome.SUCCEEDED]
    )
    of_merchant = " AND f.merchant_id = $8" if merchant_id else ""
    statement = redelivery._CLASSIFY.format(
        of_merchant=of_merchant, lock="FOR KEY SHARE OF f", made=redelivery._MAKE
    )
    plan = await _explain(
        crowded, statement, *redelivery._arguments(wanted, redelivery.BEGINNING, 100)
    )
    await transaction.rollback()

    page = plan.index_scan("finished_deliveries_day_merchant_id_id_idx1")
    assert (0 < page.rows <= 100, page.filtered) == (True, 0)
    assert plan.index_scan("delivery_queue_redeliveries").rows <= 500
    for index in ("events_day_pkey", "attempts_day_pkey"):
        assert plan.index_scan(index).rows <= 100, plan.scans
    plan.assert_nothing_is_walked()


@pytest.mark.parametrize("statement", ["_ERASE_EVENTS", "_ERASE_ATTEMPTS"])
async def test_a_chunk_of_an_erasure_reads_no_more_than_it_erases(
    crowded: Any, statement: str
) -> None:
    end = datetime(9999, 1, 1, tzinfo=UTC)
    plan = await _explain(crowded, getattr(erasure, statement), "m_1", UUID(int=0), 50, end)

    assert max(scan.rows for scan in plan.scans) <= 50
    assert max(scan.filtered for scan in plan.scans) <= 50
    plan.assert_nothing_is_walked()


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        ("NOT active", "webhook_configs_inactive"),
        ("NOT active AND deactivation_reason = 'failures'", "webhook_configs_inactive"),
        ("merchant_id = 'm_7'", "webhook_configs_of_merchant"),
        ("true", "webhook_configs_pkey"),
    ],
)
async def test_a_page_of_all_configs_is_read_in_the_order_of_an_index(
    crowded: Any, condition: str, index: str
) -> None:
    plan = await _explain(
        crowded,
        f"SELECT * FROM webhook_configs WHERE deleted_at IS NULL AND {condition}"  # noqa: S608
        " ORDER BY id DESC LIMIT 51",
    )
    assert plan.index_scan(index).rows <= 51


async def test_a_page_of_deliveries_reads_what_it_shows_of_each_part(crowded: Any) -> None:
    statement, arguments = delivery_store._page("m_1", delivery_store.DeliveryFilter(), 51)

    plan = await _explain(crowded, statement, *arguments)

    for index in ("delivery_queue_parked", "delivery_queue_blocked_of_webhook"):
        assert plan.index_scan(index).rows <= 2 * 51
    assert plan.index_scan("delivery_queue_of_webhook").rows <= 2 * 50


async def test_a_backlog_is_counted_by_its_index_alone(crowded: Any) -> None:
    statement = queue_status._OF_ALL
    # That the index holds all that is asked for; whether it pays on so small a table depends on how
    # much of it the last vacuum could mark as visible to all.
    await crowded.execute("SET enable_seqscan = off; SET enable_bitmapscan = off")
    plan = await _explain(crowded, statement, 20)
    await crowded.execute("RESET enable_seqscan; RESET enable_bitmapscan")

    parked = plan.index_scan("delivery_queue_parked")
    assert (parked.kind, parked.rows) == ("Index Only Scan", 14_000)
    blocked = [scan for scan in plan.scans if "blocked" in (scan.index or "")]
    assert [(scan.kind, scan.rows) for scan in blocked] == [("Index Only Scan", 4_800)]


async def test_how_deep_the_queue_is_reads_no_more_of_a_state_than_is_counted(crowded: Any) -> None:
    # As all our connections have it.
    await crowded.execute("SET enable_seqscan = off")
    await crowded.execute(stats._IN_INDEX_ORDER.replace("LOCAL ", ""))
    plan = await _explain(crowded, stats._DELIVERIES, 1000)
    oldest = await _explain(crowded, stats._OLDEST_DUE)
    breakers = await _explain(crowded, stats._BREAKERS, 1000)
    of_three = await _explain(crowded, stats._BREAKERS, 3)
    await crowded.execute("RESET enable_seqscan; RESET enable_sort")

    read = {scan.index: scan.rows for scan in plan.scans if scan.index != "pg_class_oid_index"}
    assert read == {
        "delivery_queue_due": 1000,
        "delivery_queue_parked": 1000,
        "delivery_queue_lease": 1000,
        "delivery_queue_blocked_of_webhook": 1000,
    }
    assert {(scan.index, scan.rows) for scan in oldest.scans} == {
        ("delivery_queue_due", 1),
        ("delivery_queue_lease", 1),
    }
    # One probe for each of 10 configs with a backlog, and one that finds no more.
    assert breakers.index_scan("delivery_queue_parked").rows <= 11
    assert 3 <= sum(s.rows for s in of_three.scans if s.index == "delivery_queue_parked") <= 4
    for one in (plan, oldest, breakers):
        one.assert_nothing_is_walked()


async def test_webhook_configs_are_counted_by_their_indexes(crowded: Any) -> None:
    plan = await _explain(crowded, database_stats._CONFIGS, 1000)

    assert plan.index_scan("webhook_configs_of_merchant").rows == 1000
    assert all(scan.rows <= 1000 for scan in plan.scans)


@pytest.mark.parametrize(
    ("fields", "index"),
    [
        ({}, "audit_entries_pkey"),
        ({"actor": "actor 7"}, "audit_entries_of_actor"),
        ({"resource": "resource 7"}, "audit_entries_of_resource"),
    ],
)
@pytest.mark.parametrize("bounded", [False, True])
async def test_a_page_of_the_audit_log_is_read_in_the_order_of_an_index(
    crowded: Any, fields: dict[str, str], index: str, bounded: bool
) -> None:
    end = datetime.now(UTC) - timedelta(days=50)
    start = end - timedelta(days=60)
    wanted = audit_log.AuditFilter(
        actor=fields.get("actor", ""),
        resource=fields.get("resource", ""),
        start=start if bounded else None,
        end=end if bounded else None,
        before=None,
    )
    dialect: Any = postgresql
    page = audit_log._page(wanted, 51).compile(
        dialect=dialect.dialect(), compile_kwargs={"literal_binds": True}
    )

    plan = await _explain(crowded, str(page))

    scan = plan.index_scan(index)
    # By the ids a day more than the time at its end, of 96 entries a day; or all of an actor's.
    assert scan.rows <= 100
    assert scan.filtered <= (100 if bounded else 0)
    plan.assert_nothing_is_walked()


async def test_what_is_over_is_found_by_its_time(crowded: Any) -> None:
    before = datetime.now(UTC) - timedelta(days=1)
    keys = await _explain(crowded, prune._DELETE_KEYS, before, 100)
    bound = first_id_at(before + timedelta(days=1))
    entries = await _explain(crowded, prune._DELETE_AUDIT_ENTRIES, before, 100, bound)

    assert keys.index_scan("idempotency_keys_created_at").rows == 100
    assert entries.index_scan("audit_entries_pkey").rows == 100
    for plan in (keys, entries):
        plan.assert_nothing_is_walked()


async def test_erasing_a_merchants_entries_reads_those(crowded: Any) -> None:
    end = datetime(9999, 1, 1, tzinfo=UTC)
    actions = list(erasure._OPERATORS_ACTIONS)
    plan = await _explain(crowded, erasure._ERASE_ENTRIES, "m_7", UUID(int=0), 50, end, actions)

    assert plan.index_scan("audit_entries_of_merchant").rows == 40
    plan.assert_nothing_is_walked()


async def test_a_time_of_the_history_enters_its_days_only(crowded: Any) -> None:
    now = datetime.now(UTC)
    times = delivery_store.DeliveryFilter(start_at=now - timedelta(days=2), end_at=now)
    statement, arguments = delivery_store._page("m_1", times, 51)
    listed = await _explain(crowded, statement, *arguments)
    wanted = event_store.EventFilter(start=now - timedelta(days=2), end=now)
    statement, arguments = event_store._page("m_1", wanted, 51)
    events = await _explain(crowded, statement, *arguments)

    assert listed.days_entered("finished_deliveries") == 3
    assert 3 <= events.days_entered("events") <= 4


@pytest.mark.parametrize("dry", [False, True])
async def test_a_page_of_retention_reads_that_page(crowded: Any, dry: bool) -> None:
    today = await partitions.today(crowded)
    end = datetime(9999, 1, 1, tzinfo=UTC)
    last = UUID(int=(1 << 128) - 1)
    partition, first = today.partition("finished_deliveries"), UUID(int=0)
    await crowded.execute(prune._CREATE_OPEN_EVENTS)
    change = "" if dry else move._MOVE_FINISHED
    statement = move._FINISHED.format(partition=partition, change=change)
    plans = [await _explain(crowded, statement, first, last, 100, end)]
    change = "" if dry else prune._DELETE_FINISHED.format(partition=partition)
    statement = prune._FINISHED.format(partition=partition, change=change)
    plans += [await _explain(crowded, statement, first, last, 100, end, end)]
    partition = today.partition("events")
    statement = prune._EVENTS.format(partition=partition, same_id=equal("e.id", "m.id"))
    plans += [await _explain(crowded, statement, first, last, 100, end)]
    plans += [await _explain(crowded, move._NEEDED_EVENTS, first, last, 100)]
    plans += [await _explain(crowded, open_ranges._EVENTS, first, last, 100)]
    plans += [await _explain(crowded, open_ranges._OPEN, first, last, 100)]

    for plan in plans:
        plan.assert_nothing_is_walked()
        # Of 20,000; of an index by event a little more than what is shown.
        assert max(s.rows + s.filtered for s in plan.scans if s.kind != "CTE Scan") <= 300, plan


_PAGES = {
    "all": delivery_store.DeliveryFilter(),
    "times": delivery_store.DeliveryFilter(
        start_at=STARTED_AT, end_at=STARTED_AT.replace(year=2100)
    ),
    "ready": delivery_store.DeliveryFilter(state=DeliveryState.READY),
    "of a config": delivery_store.DeliveryFilter(webhook_id=UUID(int=1)),
    "of an event": delivery_store.DeliveryFilter(event_id=UUID(int=1)),
}
_CLASSIFY = redelivery._CLASSIFY.format(of_merchant="", lock="", made="")
#: Statements that were planned when there was next to nothing.
_PLANNED_EARLY = {
    "enqueue": _ENQUEUE,
    "previous": event_store._PREVIOUS,
    "claim": _CLAIM,
    "held": _HELD,
    "spend": rate_limit._SPEND_RATE,
    "park": backlog._PARK_WEBHOOKS,
    "park due": backlog._PARK_DUE,
    "open breakers": breakers._OPEN,
    "promote": ordering._PROMOTE,
    "cancel": _CANCEL_WEBHOOK,
    "classify": _CLASSIFY,
    "erase keys": erasure._ERASE_KEYS,
    "erase events": erasure._ERASE_EVENTS,
    "erase attempts": erasure._ERASE_ATTEMPTS,
    "remove keys": prune._DELETE_KEYS,
    "remove entries": prune._DELETE_AUDIT_ENTRIES,
} | {f"page {name}": delivery_store._page("m_1", page, 51)[0] for name, page in _PAGES.items()}


@pytest.fixture(scope="module")
async def grown(postgres: EmbeddedPostgres) -> AsyncIterator[Any]:
    """A connection whose plans were made, for any arguments, before the crowd came."""
    async with _database(postgres, "grown_query_plans", range(-2, 2)) as connection:
        few = _CROWD.replace("4000", "20").replace("20000", "20")
        await connection.execute(few)
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        for number, statement in enumerate(_PLANNED_EARLY.values()):
            await connection.execute(f"PREPARE early_{number} AS {statement}")
            types = (await connection.prepare(statement)).get_parameters()
            nulls = ", ".join("NULL" for _ in types)
            await connection.execute(f"EXPLAIN EXECUTE early_{number}({nulls})")
        # Gone, but not for the statistics, nor for what was planned by them.
        for table in ("delivery_queue", "attempts", "finished_deliveries", "events"):
            await connection.execute(f"DELETE FROM {table}")  # noqa: S608 - of constants
        await connection.execute("DELETE FROM idempotency_keys; DELETE FROM webhook_configs")
        await connection.execute(_CROWD)
        yield connection


@pytest.mark.parametrize("name", _PLANNED_EARLY)
async def test_what_was_planned_of_few_rows_is_right_for_many(grown: Any, name: str) -> None:
    arguments = await _arguments(grown, name)
    early = f"early_{list(_PLANNED_EARLY).index(name)}"

    plan = await _explain(grown, await execution(grown, early, _PLANNED_EARLY[name], arguments))

    plan.assert_nothing_is_walked()
    # A page of few finished deliveries may look at a whole day for them, in the order it has.
    read = max(
        scan.rows + scan.filtered
        for scan in plan.scans
        if scan.kind != "CTE Scan"
        and not (name.startswith("page") and scan.relation.startswith("finished_deliveries"))
    )
    # Of 20,000 rows and more, and 4,000 configs; of a backlog 1,400 are one config's.
    assert read <= 1500, plan.scans


async def _arguments(connection: Any, name: str) -> Sequence[Any]:
    """Of about 100 rows, or pages of 100."""
    kind, _, page = name.partition(" ")
    if kind == "page":
        values = delivery_store._page("m_1", _PAGES[page], 51)[1]
        column = {"of a config": "webhook_id", "of an event": "event_id"}.get(page)
        if column:
            found = f"SELECT {column} FROM finished_deliveries LIMIT 1"  # noqa: S608 - of constants
            values[3] = await connection.fetchval(found)
        return values
    now = datetime.now(UTC)
    queue = await connection.fetch("SELECT id FROM delivery_queue LIMIT 100")
    configs = await connection.fetch("SELECT id FROM webhook_configs LIMIT 20")
    ids, config_ids = [row["id"] for row in queue], [row["id"] for row in configs]
    chains = await ordering.chains_after(connection, None, 100)
    events = [make_event(merchant_id=f"m_{n}", idempotency_key=f"k{n}") for n in range(10, 60)]
    failed = redelivery.FailedFilter(STARTED_AT, now, None, outcomes=[Outcome.SUCCEEDED])
    arguments: dict[str, Sequence[Any]] = {
        "enqueue": _parameters(events),
        "previous": (["m_1"] * 50, [str(n) for n in range(50)]),
        "claim": (100, new_id(), timedelta(seconds=60)),
        "held": (ids, ids),
        "spend": (config_ids, [3] * 20),
        "park": (config_ids,),
        "park due": (config_ids,),
        "open breakers": (
            *(config_ids, [None] * 20, [True] * 20, [0.0] * 20),
            *(5.0, 300.0, [1] * 20),
        ),
        "promote": ([c.webhook_id for c in chains], [c.ordering_key for c in chains]),
        "cancel": (await _quiet_config(connection), 1000),
        "classify": redelivery._arguments(failed, redelivery.BEGINNING, 100),
        "erase keys": ("m_1", 100, now),
        "erase events": ("m_1", UUID(int=0), 100, now),
        "erase attempts": ("m_1", UUID(int=0), 100, now),
        "remove keys": (now - timedelta(days=1), 100),
        "remove entries": (now - timedelta(days=1), 100, first_id_at(now)),
    }
    return arguments[name]


def _parameters(events: Sequence[NewEvent]) -> list[Sequence[Any]]:
    return [*_EVENT.arguments(events), _ranks(events)]


async def _explain(connection: Any, statement: str, *arguments: Any) -> Plan:
    """Run a statement for real and take it back; its plan with what was read."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        text = await connection.fetchval(
            f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {statement}", *arguments
        )
    finally:
        await transaction.rollback()
    root = json.loads(text)[0]["Plan"]
    scans = [
        Scan(
            kind=node["Node Type"],
            relation=node.get("Relation Name", ""),
            index=re.sub(r"_\d{8}_", "_day_", node.get("Index Name", "")) or None,
            rows=round(node["Actual Rows"] * node["Actual Loops"]),
            filtered=round(node.get("Rows Removed by Filter", 0) * node["Actual Loops"]),
            pages=_pages(node),
            entered=node["Actual Loops"] > 0,
        )
        for node in _nodes(root)
        if "Scan" in node["Node Type"] and ("Relation Name" in node or "Index Name" in node)
    ]
    return Plan(
        scans,
        _pages(root),
        {node["Node Type"] for node in _nodes(root)},
        whole_rows=connection.get_server_version().major < 18,
    )


def _halves(plan: Plan, rows: int) -> int:
    """What a plan says that so many rows were, of which every second loop had one."""
    return 0 if plan.whole_rows else rows


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def _pages(node: dict[str, Any]) -> int:
    return int(node["Shared Hit Blocks"] + node["Shared Read Blocks"])


async def _quiet_config(connection: Any) -> UUID:
    """A config with a few open deliveries and no backlog."""
    found = await connection.fetchval("""
        SELECT webhook_id FROM delivery_queue WHERE state = 'ready' AND webhook_id NOT IN (
            SELECT webhook_id FROM delivery_queue WHERE state = 'parked'
        ) LIMIT 1
    """)
    return UUID(str(found))
