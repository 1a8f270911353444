"""What has left the queue, or moved in it, is cleared away before claims have to pass it."""

from core.queue.types import Connection

#: Dead rows that nobody minds, and as a share of the live ones, since vacuum reads all indexes.
_DEAD_MAX = 5_000
_DEAD_SHARE_MAX = 0.05

_MANY_DEAD = """
SELECT n_dead_tup > $1 + $2 * n_live_tup FROM pg_stat_user_tables
WHERE relid = 'delivery_queue'::regclass
"""

# Does not wait for another engine that is at it, nor take the lock that shortening the table needs.
_VACUUM = """
VACUUM (INDEX_CLEANUP ON, TRUNCATE FALSE, PROCESS_TOAST FALSE, SKIP_LOCKED TRUE) delivery_queue
"""


async def has_many_dead(connection: Connection) -> bool:
    """Whether it is time for vacuum(), as far as PostgreSQL's statistics know."""
    return bool(await connection.fetchval(_MANY_DEAD, _DEAD_MAX, _DEAD_SHARE_MAX))


async def vacuum(connection: Connection) -> None:
    """Clear away dead rows and what indexes still say of them; outside of any transaction.

    Each delivery leaves two dead rows or more, and claims read the index of due times from its
    beginning, where most of them are. Autovacuum looks once a minute at most.
    """
    await connection.execute(_VACUUM)
