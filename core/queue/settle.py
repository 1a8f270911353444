"""Ends leases with the results of their attempts, and ends the deliveries of deleted configs."""

from collections.abc import Collection, Sequence
from uuid import UUID

from core.lifecycle import ATTEMPT_COLUMNS, DeactivationReason, DeliveryState
from core.postgres.planner import equal
from core.postgres.protocols import Connection, Executor
from core.postgres.rows import RowColumns
from core.queue.backlog import park_webhooks
from core.queue.types import Chain, Settlement, SettleResult

_INPUT = RowColumns(
    {
        "delivery_id": "uuid",
        "lease_id": "uuid",
        "started_at": "timestamptz",
        "final_state": "text",
        "next_attempt_in_seconds": "float8",
        "blamed_version": "int",
        **{f"result.{column}": sql_type for column, sql_type in ATTEMPT_COLUMNS.items()},
    },
    first=2,
)

# One statement finishes or reschedules the deliveries, writes the attempts and counts the failures
# of each config. Only rows whose lease is still valid take part.
_SETTLE = f"""
WITH given AS (
    SELECT * FROM unnest({_INPUT.arrays}) WITH ORDINALITY AS t({_INPUT.names}, position)
), outdated AS (
    -- The merchant changed the config after the request, so that the next attempt may succeed. Our
    -- own deactivation also raises the version and is not such a change.
    SELECT g.delivery_id, g.position
    FROM given g
    JOIN delivery_queue q ON {equal("q.id", "g.delivery_id")} AND q.lease_id = g.lease_id
    JOIN webhook_configs c ON {equal("c.id", "q.webhook_id")}
    WHERE g.final_state = 'failed' AND g.blamed_version < c.version
    AND (c.active OR c.deactivation_reason = 'paused')
), input AS (
    -- An outdated delivery stays open.
    SELECT g.*, CASE WHEN o.position IS NULL THEN g.final_state END AS end_state
    FROM given g LEFT JOIN outdated o ON o.position = g.position
), finished AS (
    -- The lease id fences the delete: a late engine finds no row.
    DELETE FROM delivery_queue q USING input i
    WHERE {equal("q.id", "i.delivery_id")} AND q.lease_id = i.lease_id AND i.end_state IS NOT NULL
    RETURNING q.*, i.end_state, i.outcome, i.status_code, i.blamed_version, i.position
), history AS (
    INSERT INTO finished_deliveries
        (id, state, webhook_id, event_id, merchant_id, event_type, attempt_count, created_at,
        redelivery_of)
    SELECT id, end_state, webhook_id, event_id, merchant_id, event_type, attempt_count + 1,
        created_at, redelivery_of
    FROM finished
), rescheduled AS (
    UPDATE delivery_queue q
    SET state = 'ready', lease_id = NULL, lease_until = NULL, attempt_count = q.attempt_count + 1,
        fault_count = q.fault_count + (i.outcome = 'internal_error')::int,
        due_at = now() + i.next_attempt_in_seconds * interval '1 second'
    FROM input i
    WHERE {equal("q.id", "i.delivery_id")} AND q.lease_id = i.lease_id AND i.end_state IS NULL
    RETURNING q.id, q.attempt_count, i.position
), settled AS (
    SELECT id, position, attempt_count + 1 AS number FROM finished
    UNION ALL
    SELECT id, position, attempt_count FROM rescheduled
), recorded AS (
    -- Joined by position, because a batch may hold a delivery twice, once with a lost lease.
    INSERT INTO attempts (delivery_id, number, started_at, {", ".join(ATTEMPT_COLUMNS)})
    SELECT s.id, s.number, i.started_at, {", ".join(f"i.{column}" for column in ATTEMPT_COLUMNS)}
    FROM settled s JOIN input i ON i.position = s.position
), tally AS (
    -- Failures of each config in the order of the batch. A delivered one resets the count, and
    -- only failures of the newest version count.
    SELECT webhook_id, last_delivered IS NOT NULL AS delivered, last_version,
        count(*) FILTER (
            WHERE end_state = 'failed' AND outcome <> 'internal_error' AND is_of_last
            AND position > coalesce(last_delivered, 0)
        ) AS failures,
        -- 410 Gone means that the endpoint is removed for good.
        bool_or(status_code = 410 AND is_of_last) AS gone
    FROM (
        SELECT *, blamed_version IS NOT DISTINCT FROM last_version AS is_of_last
        FROM (
            SELECT *, max(blamed_version) OVER (PARTITION BY webhook_id) AS last_version,
                max(position) FILTER (WHERE end_state = 'delivered')
                    OVER (PARTITION BY webhook_id) AS last_delivered
            FROM finished
        ) f
    ) f
    GROUP BY webhook_id, last_delivered, last_version
), locked AS (
    -- Healthy configs are not written. The others are locked in order, to prevent deadlocks.
    SELECT c.id, c.active, t.gone AND coalesce(t.last_version >= c.version, true) AS gone,
        CASE WHEN t.delivered THEN 0 ELSE c.consecutive_failures END
            + CASE WHEN t.last_version < c.version THEN 0 ELSE t.failures END AS failures
    FROM webhook_configs c JOIN tally t ON t.webhook_id = c.id
    WHERE t.failures > 0 OR t.gone OR (t.delivered AND c.consecutive_failures > 0)
    ORDER BY c.id
    FOR NO KEY UPDATE OF c
), decided AS (
    SELECT id, failures, CASE
        WHEN active AND gone THEN 'gone'
        WHEN active AND failures >= $1 THEN 'failures'
    END AS deactivated_by
    FROM locked
), counted AS (
    UPDATE webhook_configs c
    SET consecutive_failures = d.failures,
        active = c.active AND d.deactivated_by IS NULL,
        deactivation_reason = coalesce(d.deactivated_by, c.deactivation_reason),
        version = c.version + (d.deactivated_by IS NOT NULL)::int,
        updated_at = CASE WHEN d.deactivated_by IS NULL THEN c.updated_at ELSE now() END
    FROM decided d WHERE c.id = d.id
    RETURNING c.id, d.deactivated_by
)
SELECT id, 'settled' AS kind, NULL AS detail FROM settled
UNION ALL
SELECT id, 'deactivated', deactivated_by FROM counted WHERE deactivated_by IS NOT NULL
UNION ALL
SELECT webhook_id, 'chain', ordering_key FROM finished WHERE ordering_key IS NOT NULL
UNION ALL
SELECT delivery_id, 'outdated', NULL FROM outdated
"""  # noqa: S608 - of constants


async def settle(
    connection: Connection, settlements: Sequence[Settlement], max_consecutive_failures: int
) -> SettleResult:
    """End leases with the results of their attempts. Call it in a transaction.

    A settlement whose lease is no longer valid changes nothing. Failures count in the order of the
    batch; a delivered delivery resets the count, and a 410 deactivates its config at once. A
    delivery does not fail if its config changed after the request.
    """
    if not settlements:
        return SettleResult(frozenset(), {})
    rows = await connection.fetch(_SETTLE, max_consecutive_failures, *_INPUT.arguments(settlements))
    kinds: dict[str, list[tuple[UUID, str]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append((row["id"], row["detail"]))
    deactivated = {id_: DeactivationReason(reason) for id_, reason in kinds.get("deactivated", ())}
    if deactivated:
        await park_webhooks(connection, list(deactivated))
    return SettleResult(
        delivery_ids=frozenset(id_ for id_, _ in kinds.get("settled", ())),
        deactivated=deactivated,
        ended_chains=tuple(Chain(id_, key) for id_, key in kinds.get("chain", ())),
        outdated=frozenset(id_ for id_, _ in kinds.get("outdated", ())),
    )


# The deliveries that are free are locked here, so that the settle that follows in the same
# transaction does not wait. It also writes the configs of failed deliveries and those with
# failures to reset.
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
    """Return the deliveries that another session has locked, and lock the others.

    A session that is idle in its transaction can hold such a lock for hours.
    """
    failed = [s.delivery_id for s in settlements if s.final_state is DeliveryState.FAILED]
    rows = await connection.fetch(_HELD, [s.delivery_id for s in settlements], failed)
    return {row["id"] for row in rows}


async def held_webhooks(connection: Connection, webhook_ids: Collection[UUID]) -> set[UUID]:
    """Return the configs that another session has locked, and lock the others."""
    rows = await connection.fetch(_HELD_WEBHOOKS, list(webhook_ids))
    return {row["id"] for row in rows}


#: Deliveries that one statement cancels. It takes tens of milliseconds, so locks are held briefly.
_CHUNK = 1000

# Skips rows that another statement has locked. A settle may wait for the config that our caller has
# locked, so waiting here would deadlock. The next claim cancels the skipped deliveries.
_CANCEL_WEBHOOK = f"""
WITH parked AS (
    -- Separate, because each has its own index.
    SELECT id FROM delivery_queue q
    WHERE q.webhook_id = $1 AND q.state = 'parked' LIMIT $2 FOR UPDATE SKIP LOCKED
), others AS (
    SELECT id FROM delivery_queue q
    WHERE q.webhook_id = $1 AND q.state <> 'parked' LIMIT $2 FOR UPDATE SKIP LOCKED
), free AS (
    -- Deliveries that a claim could take come first.
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


async def cancel_webhook(pool: Executor, webhook_id: UUID) -> int:
    """Cancel the open deliveries of a deleted config and return their number.

    Each chunk is a transaction, because there may be a million. Claims cancel the deliveries that
    an interrupted run leaves.
    """
    cancelled = 0
    while (count := await cancel_some(pool, webhook_id)) == _CHUNK:
        cancelled += count
    return cancelled + count


async def cancel_some(connection: Executor, webhook_id: UUID) -> int:
    """Cancel one chunk of them."""
    tag: str = await connection.execute(_CANCEL_WEBHOOK, webhook_id, _CHUNK)
    return int(tag.rpartition(" ")[2])
