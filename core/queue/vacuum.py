"""Vacuums the queue table before dead rows slow the claims down."""

from core.postgres.protocols import Executor

#: Dead rows that are tolerated: a number, and a share of the live rows, because vacuum reads all
#: indexes.
_DEAD_MAX = 5_000
_DEAD_SHARE_MAX = 0.05

_MANY_DEAD = """
SELECT n_dead_tup > $1 + $2 * n_live_tup FROM pg_stat_user_tables
WHERE relid = 'delivery_queue'::regclass
"""

# SKIP_LOCKED: another engine may be vacuuming. TRUNCATE would need an exclusive lock.
_VACUUM = """
VACUUM (INDEX_CLEANUP ON, TRUNCATE FALSE, PROCESS_TOAST FALSE, SKIP_LOCKED TRUE) delivery_queue
"""


async def has_many_dead(connection: Executor) -> bool:
    """Return whether PostgreSQL's statistics show too many dead rows."""
    return bool(await connection.fetchval(_MANY_DEAD, _DEAD_MAX, _DEAD_SHARE_MAX))


async def vacuum(connection: Executor) -> None:
    """Remove dead rows and their index entries. Call it outside a transaction.

    Each delivery leaves at least two dead rows. Claims read the index of due times from its
    beginning, where most of them are. Autovacuum runs once a minute at most.
    """
    await connection.execute(_VACUUM)
