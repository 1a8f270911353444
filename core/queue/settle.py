"""The end of a lease by a result: a final state or a new due time, the attempt, the failures."""

from collections.abc import Collection, Sequence
from uuid import UUID

from core.lifecycle import DeactivationReason, DeliveryState
from core.postgres.planner import equal
from core.postgres.pool import Pool
from core.queue.backlog import park_webhooks
from core.queue.types import Chain, Connection, Settled, Settlement

# Deletes or reschedules, writes the attempts, and counts failures per config, in one statement.
# Only rows whose lease still holds take part in any of it.
_SETTLE = f"""
WITH given AS (
    SELECT * FROM unnest(
        $2::uuid[], $3::uuid[], $4::text[], $5::int[], $6::text[], $7::timestamptz[], $8::int[],
        $9::text[], $10::float8[], $11::int[], $12::int[], $13::int[], $14::int[], $15::text[],
        $16::text[], $17::int[]
    ) WITH ORDINALITY AS t(delivery_id, lease_id, outcome, status_code, detail, started_at,
        duration_us, wanted_state, retry_after, dns_us, connect_us, tls_us, first_byte_us,
        remote_address, response_excerpt, blamed_version, position)
), outdated AS (
    -- Its merchant has changed the config since, to another URL perhaps: this is not the last word.
    -- That we made the config inactive is no such change.
    SELECT g.delivery_id, g.position
    FROM given g
    JOIN delivery_queue q ON {equal("q.id", "g.delivery_id")} AND q.lease_id = g.lease_id
    JOIN webhook_configs c ON {equal("c.id", "q.webhook_id")}
    WHERE g.wanted_state = 'failed' AND g.blamed_version < c.version
    AND (c.active OR c.deactivation_reason = 'paused')
), input AS (
    SELECT g.*, CASE WHEN o.position IS NULL THEN g.wanted_state END AS final_state
    FROM given g LEFT JOIN outdated o ON o.position = g.position
), finished AS (
    DELETE FROM delivery_queue q USING input i
    WHERE {equal("q.id", "i.delivery_id")} AND q.lease_id = i.lease_id AND i.final_state IS NOT NULL
    RETURNING q.*, i.final_state, i.outcome, i.status_code, i.blamed_version, i.position
), history AS (
    INSERT INTO finished_deliveries
        (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
        redelivery_of)
    SELECT id, final_state, webhook_id, event_id, merchant_id, event_type, attempt_count + 1,
        created_at, redelivery_of
    FROM finished
), rescheduled AS (
    UPDATE delivery_queue q
    SET state = 'ready', lease_id = NULL, lease_until = NULL, attempt_count = q.attempt_count + 1,
        fault_count = q.fault_count + (i.outcome = 'internal_error')::int,
        due_at = now() + i.retry_after * interval '1 second'
    FROM input i
    WHERE {equal("q.id", "i.delivery_id")} AND q.lease_id = i.lease_id AND i.final_state IS NULL
    RETURNING q.id, q.attempt_count, i.position
), settled AS (
    SELECT id, position, attempt_count + 1 AS number FROM finished
    UNION ALL
    SELECT id, position, attempt_count FROM rescheduled
), recorded AS (
    -- By position: the batch may hold a delivery twice, once under a lease that is lost.
    INSERT INTO attempts
        (delivery_id, number, outcome, status_code, detail, started_at, duration_us, dns_us,
        connect_us, tls_us, first_byte_us, remote_address, response_excerpt)
    SELECT s.id, s.number, i.outcome, i.status_code, i.detail, i.started_at, i.duration_us,
        i.dns_us, i.connect_us, i.tls_us, i.first_byte_us, i.remote_address, i.response_excerpt
    FROM settled s JOIN input i ON i.position = s.position
), tally AS (
    SELECT webhook_id, last_delivered IS NOT NULL AS delivered, last_version,
        count(*) FILTER (
            WHERE final_state = 'failed' AND outcome <> 'internal_error' AND is_of_last
            AND position > coalesce(last_delivered, 0)
        ) AS failures,
        -- 410 Gone: nobody will ever be there again, so no further failures are waited for.
        bool_or(status_code = 410 AND is_of_last) AS gone
    FROM (
        SELECT *, blamed_version IS NOT DISTINCT FROM last_version AS is_of_last
        FROM (
            SELECT *, max(blamed_version) OVER (PARTITION BY webhook_id) AS last_version,
                max(position) FILTER (WHERE final_state = 'delivered')
                    OVER (PARTITION BY webhook_id) AS last_delivered
            FROM finished
        ) f
    ) f
    GROUP BY webhook_id, last_delivered, last_version
), locked AS (
    -- Healthy configs are not written at all; the others are locked in one order by every engine.
    -- A failure says nothing of a config that has been changed since it was sent.
    SELECT c.id, c.active, t.gone AND coalesce(t.last_version >= c.version, true) AS gone,
        CASE WHEN t.delivered THEN 0 ELSE c.consecutive_failures END
            + CASE WHEN t.last_version < c.version THEN 0 ELSE t.failures END AS failures
    FROM webhook_configs c JOIN tally t ON t.webhook_id = c.id
    WHERE t.failures > 0 OR t.gone OR (t.delivered AND c.consecutive_failures > 0)
    ORDER BY c.id
    FOR NO KEY UPDATE OF c
), judged AS (
    SELECT id, failures, CASE
        WHEN active AND gone THEN 'gone'
        WHEN active AND failures >= $1 THEN 'failures'
    END AS ends_by
    FROM locked
), counted AS (
    UPDATE webhook_configs c
    SET consecutive_failures = j.failures,
        active = c.active AND j.ends_by IS NULL,
        deactivation_reason = coalesce(j.ends_by, c.deactivation_reason),
        version = c.version + (j.ends_by IS NOT NULL)::int,
        updated_at = CASE WHEN j.ends_by IS NULL THEN c.updated_at ELSE now() END
    FROM judged j WHERE c.id = j.id
    RETURNING c.id, j.ends_by
)
SELECT id, 'settled' AS kind, NULL AS ordering_key, NULL AS ends_by FROM settled
UNION ALL
SELECT id, 'deactivated', NULL, ends_by FROM counted WHERE ends_by IS NOT NULL
UNION ALL
SELECT webhook_id, 'chain', ordering_key, NULL FROM finished WHERE ordering_key IS NOT NULL
UNION ALL
SELECT delivery_id, 'outdated', NULL, NULL FROM outdated
"""  # noqa: S608 - of constants

#: The fields of a settlement that the statement takes, which are its first ones.
_COLUMNS = Settlement._fields.index("blamed_version") + 1


async def settle(
    connection: Connection, settlements: Sequence[Settlement], max_consecutive_failures: int
) -> Settled:
    """End leases with the results of their attempts; to be called in a transaction.

    A settlement whose lease no longer holds is ignored as a whole: no attempt, no count. Failures
    count in the order of the batch, and a delivered one forgives those before it; a 410 ends its
    config at once. No delivery ends as failed on the word of an older version of its config.
    """
    if not settlements:
        return Settled(frozenset(), {})
    columns = list(zip(*settlements, strict=True))[:_COLUMNS]
    # A phase that none of them had is an empty array, which unnest fills up with nulls.
    present = [c if any(value is not None for value in c) else () for c in columns]
    rows = await connection.fetch(_SETTLE, max_consecutive_failures, *present)
    deactivated = {
        row["id"]: DeactivationReason(row["ends_by"])
        for row in rows
        if row["kind"] == "deactivated"
    }
    if deactivated:
        await park_webhooks(connection, list(deactivated))
    return Settled(
        frozenset(row["id"] for row in rows if row["kind"] == "settled"),
        deactivated,
        tuple(Chain(row["id"], row["ordering_key"]) for row in rows if row["kind"] == "chain"),
        frozenset(row["id"] for row in rows if row["kind"] == "outdated"),
    )


# What somebody else has locked: a session that is idle in its transaction, say, for hours.

# What is free is locked here, so that the settle that follows in the same transaction waits for
# nobody. It writes the configs of what failed for good, and those that have failures to forgive.
_HELD = f"""
WITH free AS (
    SELECT id, webhook_id FROM delivery_queue WHERE id = ANY ($1) FOR UPDATE SKIP LOCKED
), wanted AS (
    SELECT c.id FROM free f JOIN webhook_configs c ON {equal("c.id", "f.webhook_id")}
    WHERE f.id = ANY ($2) OR c.consecutive_failures > 0
), locked AS (
    SELECT id FROM webhook_configs WHERE id = ANY (ARRAY(SELECT id FROM wanted))
    ORDER BY id
    FOR NO KEY UPDATE SKIP LOCKED
)
SELECT id FROM delivery_queue WHERE id = ANY ($1) AND id NOT IN (
    SELECT id FROM free
    WHERE webhook_id NOT IN (SELECT id FROM wanted EXCEPT SELECT id FROM locked)
)
"""  # noqa: S608 - of constants


_HELD_WEBHOOKS = """
WITH free AS (
    SELECT id FROM webhook_configs WHERE id = ANY ($1) ORDER BY id FOR NO KEY UPDATE SKIP LOCKED
)
SELECT id FROM webhook_configs WHERE id = ANY ($1) AND id NOT IN (SELECT id FROM free)
"""


async def held(connection: Connection, settlements: Sequence[Settlement]) -> set[UUID]:
    """The deliveries of these that cannot be settled now without waiting for somebody's lock."""
    failed = [s.delivery_id for s in settlements if s.final_state is DeliveryState.FAILED]
    rows = await connection.fetch(_HELD, [s.delivery_id for s in settlements], failed)
    return {row["id"] for row in rows}


async def held_webhooks(connection: Connection, webhook_ids: Collection[UUID]) -> set[UUID]:
    """The configs of these that somebody has locked; the others are, from now on, by us."""
    rows = await connection.fetch(_HELD_WEBHOOKS, list(webhook_ids))
    return {row["id"] for row in rows}


# The end of a deleted config's open deliveries.

#: Deliveries of one statement: tens of milliseconds, so that nobody waits long for what it locks.
_CHUNK = 1000

# Passes by what another statement holds at this moment: to wait for a settle, which may itself be
# waiting for the config our caller has locked, would be a deadlock. The next claim cancels those.
_CANCEL_WEBHOOK = f"""
WITH parked AS (
    -- Apart, since each has an index of its own.
    SELECT id FROM delivery_queue q
    WHERE q.webhook_id = $1 AND q.state = 'parked' LIMIT $2 FOR UPDATE SKIP LOCKED
), others AS (
    SELECT id FROM delivery_queue q
    WHERE q.webhook_id = $1 AND q.state <> 'parked' LIMIT $2 FOR UPDATE SKIP LOCKED
), free AS (
    -- Those that are not parked first: a claim may have them.
    SELECT id FROM others UNION ALL SELECT id FROM parked LIMIT $2
), cancelled AS (
    DELETE FROM delivery_queue q USING free WHERE {equal("q.id", "free.id")} RETURNING q.*
)
INSERT INTO finished_deliveries
    (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
    redelivery_of)
SELECT id, 'cancelled', webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
    redelivery_of
FROM cancelled
"""  # noqa: S608 - of constants


async def cancel_webhook(pool: Pool, webhook_id: UUID) -> int:
    """Finish the open deliveries of a deleted config as cancelled; returns how many.

    In transactions of their own, since there may be a million. What one that breaks off leaves, and
    the few that other statements hold right now, the claims cancel that come across them.
    """
    cancelled = 0
    while (count := await cancel_some(pool, webhook_id)) == _CHUNK:
        cancelled += count
    return cancelled + count


async def cancel_some(connection: Connection, webhook_id: UUID) -> int:
    """The same with one statement, for as many as it may take."""
    tag: str = await connection.execute(_CANCEL_WEBHOOK, webhook_id, _CHUNK)
    return int(tag.rpartition(" ")[2])
