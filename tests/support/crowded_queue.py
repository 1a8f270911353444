"""A queue of 20,000 rows, most of them parked, with a history of the same size."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import asyncpg

from cli.dev.postgres import EmbeddedPostgres
from cli.ops.migrate import migrate
from core.postgres.connect import Connector
from core.retention import partitions
from tests.conftest import database_settings

CROWD = """
INSERT INTO webhook_configs
    (id, merchant_id, url, events, secret_ciphertext, secret_key_id, consecutive_failures, ordered)
SELECT (lpad(to_hex((extract(epoch FROM now()) * 1000 + n)::bigint - 5000), 12, '0')
        || right(replace(new_uuid7()::text, '-', ''), 20))::uuid,
    'm_' || n / 2, 'https://merchant.example/', '{payment.succeeded}', '', 'k1', 1, true
FROM generate_series(1, 4000) n;

INSERT INTO events (id, merchant_id, type, content_type, payload, delivery_count)
SELECT new_uuid7(), 'm_1', 'payment.succeeded', 'application/json', repeat('x', 500)::bytea, 1
FROM generate_series(1, 20000);

-- 14 of 20 rows are parked, for few configs. 4 are ready, half of them due. 2 are leased.
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

-- 100 actors, 1,000 resources and 500 merchants over 200 partitions.
INSERT INTO audit_entries
    (id, actor, merchant_id, action, resource, result, request_id, created_at)
SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0')
        || right(replace(new_uuid7()::text, '-', ''), 20))::uuid,
    'actor ' || n % 100, 'm_' || n % 500, 'X', 'resource ' || n % 1000, 'OK', '', at
FROM generate_series(1, 20000) n, LATERAL (SELECT now() - n * interval '15 minutes' AS at) t;

INSERT INTO idempotency_keys SELECT 'm_1', n, '', new_uuid7(), now() - n * interval '1 minute'
FROM generate_series(1, 20000) n;

-- 40 chains of 25 for each of 5 configs with a backlog. Every second chain has no first delivery.
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


@asynccontextmanager
async def crowded_database(
    postgres: EmbeddedPostgres, name: str, numbers: range
) -> AsyncIterator[Any]:
    """A connection to a new database with partitions for these days from today."""
    admin = await asyncpg.connect(postgres.url())
    await admin.execute(f"CREATE DATABASE {name}")
    settings = database_settings(postgres.url(name))
    await asyncio.to_thread(migrate, settings)
    connection = await Connector(settings, "query-plans").connect()
    today = await partitions.today(connection)
    for number in numbers:
        assert await partitions.create_day(connection, today.later(number))
    yield connection
    await connection.close()
    await admin.execute(f"DROP DATABASE {name}")
    await admin.close()


async def quiet_config(connection: Any) -> UUID:
    """A config with a few pending deliveries and no backlog."""
    found = await connection.fetchval("""
        SELECT webhook_id FROM delivery_queue WHERE state = 'ready' AND webhook_id NOT IN (
            SELECT webhook_id FROM delivery_queue WHERE state = 'parked'
        ) LIMIT 1
    """)
    return UUID(str(found))
