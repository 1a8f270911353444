"""Erases a merchant's data in chunks: configs and open deliveries first, then contents.

An interrupted erasure is completed by a second call. Ids, types, times and outcomes of events and
deliveries stay. The audit log keeps the actions and their times, without the people of the
merchant. An erased event is marked by an empty content type. Events that are accepted after the
erasure started stay.
"""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import func, select

from core import queue
from core.ids import format_id
from core.models import WebhookConfig
from core.postgres.planner import equal, hidden
from core.postgres.protocols import Pool
from server.database import Sessions, driver_connection
from server.rpc.audit import record_change

#: Rows of one statement. It takes tens of milliseconds, so locks are held briefly.
_CHUNK = 500
_FIRST = UUID(int=0)
#: Actions that only operators can do to a merchant.
_OPERATORS_ACTIONS = (
    "DeactivateWebhookConfig",
    "EraseMerchant",
    "ReactivateWebhookConfig",
    "RedeliverDeliveries",
)

# Includes deleted configs. Their rows stay, because the history refers to their ids.
_ERASE_CONFIGS = """
UPDATE webhook_configs
SET url = 'https://erased.invalid/', description = '', headers = '{}', secret_ciphertext = '',
    previous_secret_ciphertext = NULL, previous_secret_key_id = NULL,
    previous_secret_expires_at = NULL, public_key = NULL, previous_public_key = NULL,
    header_prefix = '', deleted_at = coalesce(deleted_at, now()),
    version = version + 1, updated_at = now()
WHERE id = ANY ($1) AND (deleted_at IS NULL OR url <> 'https://erased.invalid/')
"""

_ERASE_COMMENTS = """
UPDATE audit_entries SET comment = '' WHERE resource = ANY ($1) AND comment <> ''
"""

# hidden(), because an index by time would read the keys of all merchants.
_ERASE_KEYS = f"""
WITH chunk AS MATERIALIZED (
    SELECT merchant_id, key FROM idempotency_keys
    WHERE merchant_id = $1 AND {hidden("created_at")} <= $3 LIMIT $2
)
DELETE FROM idempotency_keys k USING chunk c
WHERE {equal("k.merchant_id", "c.merchant_id")} AND {equal("k.key", "c.key")}
"""  # noqa: S608 - of constants

_ERASE_EVENTS = f"""
WITH chunk AS (
    SELECT id, content_type <> '' AS whole FROM events
    WHERE merchant_id = $1 AND id > $2 AND created_at <= $4 ORDER BY id LIMIT $3
), erased AS (
    UPDATE events e SET payload = '', content_type = '', ordering_key = NULL
    FROM chunk c WHERE {equal("e.id", "c.id")} AND c.whole
)
SELECT count(*) FILTER (WHERE whole) AS erased, (array_agg(id ORDER BY id DESC))[1] AS last_id
FROM chunk
"""  # noqa: S608 - of constants

# Entries keep the action, the resource id and the result. Actor, origin and free text are erased.
# Entries of operators keep their actor and lose the comment.
_ERASE_ENTRIES = f"""
WITH chunk AS (
    SELECT id, actor = 'erased' OR (result = 'OK' AND action = ANY ($5)) AS done
    FROM audit_entries
    WHERE merchant_id = $1 AND id > $2 AND created_at <= $4 ORDER BY id LIMIT $3
), erased AS (
    UPDATE audit_entries a
    SET actor = 'erased', caller_address = '', user_agent = '', request_id = '', comment = '',
        resource = CASE
            WHEN a.result = 'OK' OR a.resource IN ('', $1)
                OR a.resource ~ '^(wh|evt|dlv)_[0-9a-f]{{32}}$' THEN a.resource
            ELSE 'erased' END
    FROM chunk c WHERE {equal("a.id", "c.id")} AND NOT c.done
)
SELECT 0 AS erased, (array_agg(id ORDER BY id DESC))[1] AS last_id FROM chunk
"""  # noqa: S608 - of constants

# The responses and addresses of receivers are as personal as the payloads.
_ERASE_ATTEMPTS = f"""
WITH chunk AS (
    SELECT id FROM finished_deliveries
    WHERE merchant_id = $1 AND id > $2 AND created_at <= $4 ORDER BY id LIMIT $3
), erased AS (
    UPDATE attempts a SET detail = 'erased', response_excerpt = '', remote_address = NULL
    FROM chunk c WHERE {equal("a.delivery_id", "c.id")} AND a.detail <> 'erased'
)
SELECT 0 AS erased, (array_agg(id ORDER BY id DESC))[1] AS last_id FROM chunk
"""  # noqa: S608 - of constants


@dataclass(frozen=True, slots=True)
class Erased:
    """The numbers that this erasure erased, without those of an earlier one."""

    webhook_configs: int
    events: int


async def erase_merchant(sessions: Sessions, pool: Pool, merchant_id: str) -> Erased:
    """Erase a merchant. After it returns, only requests that are already open can still arrive."""
    configs, began_at = await _erase_configs(sessions, merchant_id)
    for webhook_id in configs:
        await queue.cancel_webhook(pool, webhook_id)
    while await pool.execute(_ERASE_KEYS, merchant_id, _CHUNK, began_at) == f"DELETE {_CHUNK}":
        pass
    events = await _erase_in_chunks(pool, _ERASE_EVENTS, merchant_id, began_at)
    await _erase_in_chunks(pool, _ERASE_ATTEMPTS, merchant_id, began_at)
    await _erase_in_chunks(pool, _ERASE_ENTRIES, merchant_id, began_at, _OPERATORS_ACTIONS)
    return Erased(sum(deleted_at is None for deleted_at in configs.values()), events)


async def _erase_configs(
    sessions: Sessions, merchant_id: str
) -> tuple[dict[UUID, datetime | None], datetime]:
    """Erase all configs. Returns their ids with earlier deletion times, and the current time."""
    async with sessions.begin() as session:
        # The lock that CreateWebhookConfig takes, so that no config is added.
        await session.execute(
            select(func.pg_advisory_xact_lock(func.hashtextextended(merchant_id, 0)))
        )
        rows = await session.execute(
            select(WebhookConfig.id, WebhookConfig.deleted_at)
            .where(WebhookConfig.merchant_id == merchant_id)
            # The order in which engines lock configs.
            .order_by(WebhookConfig.id)
            .with_for_update()
        )
        configs: dict[UUID, datetime | None] = {row.id: row.deleted_at for row in rows}
        connection = await driver_connection(session)
        await connection.execute(_ERASE_CONFIGS, list(configs))
        resources = [format_id("wh", webhook_id) for webhook_id in configs]
        await connection.execute(_ERASE_COMMENTS, resources)
        record_change(
            session, action="EraseMerchant", resource=merchant_id, merchant_id=merchant_id
        )
        began_at = (await session.execute(select(func.now()))).scalar_one()
    return configs, began_at


async def _erase_in_chunks(
    pool: Pool, statement: str, merchant_id: str, began_at: datetime, *more: object
) -> int:
    erased, last_id = 0, _FIRST
    while True:
        row = await pool.fetchrow(statement, merchant_id, last_id, _CHUNK, began_at, *more)
        if row["last_id"] is None:
            return erased
        erased += row["erased"]
        last_id = row["last_id"]
