"""Redelivers failed deliveries of many merchants, in pages of one transaction each.

A page skips the deliveries that an interrupted call has redelivered, so the call can be repeated.
"""

from collections.abc import Callable
from uuid import UUID

from sqlalchemy import select

from core import queue
from core.ids import format_id, is_merchant_id
from core.postgres.protocols import Pool
from core.queue import FailedFilter, RedeliveredPage, RedeliveryPosition
from server.database import Sessions, driver_connection
from server.rpc.audit import record_change

#: Deliveries read per transaction, and transactions per call: tenths of a second in all.
_PAGE = 500
_PAGES = 10

# Merchant ids contain no space, so no merchant's lock has this key.
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('redeliver failed', 0))"


async def redeliver_failed(
    sessions: Sessions, wanted: FailedFilter, after: RedeliveryPosition, notify: Callable[[], None]
) -> RedeliveredPage:
    """Redeliver the next pages and return their totals. Calls `notify` after each commit."""
    pages: list[RedeliveredPage] = []
    end: RedeliveryPosition | None = after
    while end is not None and len(pages) < _PAGES:
        page = await _redeliver_page(sessions, wanted, end)
        if page.redelivered:
            notify()
        pages.append(page)
        end = page.end
    return RedeliveredPage(
        sum(page.redelivered for page in pages),
        sum(page.already_redelivered for page in pages),
        sum(page.skipped for page in pages),
        end,
    )


async def count_failed(
    pool: Pool, wanted: FailedFilter, after: RedeliveryPosition
) -> RedeliveredPage:
    """Return the numbers without redelivering."""
    return await queue.redeliver_failed(pool, wanted, after, _PAGE * _PAGES, dry_run=True)


def position_text(position: RedeliveryPosition) -> str:
    return f"{position.merchant_id}/{position.delivery_id.hex}"


def parse_position(text: str) -> RedeliveryPosition:
    """Raises ValueError for a malformed position."""
    merchant_id, _, digits = text.partition("/")
    if not is_merchant_id(merchant_id):
        raise ValueError(text)
    return RedeliveryPosition(merchant_id, UUID(hex=digits))


async def _redeliver_page(
    sessions: Sessions, wanted: FailedFilter, after: RedeliveryPosition
) -> RedeliveredPage:
    async with sessions.begin() as session:
        # Concurrent calls run one after the other, so that each sees the other's redeliveries.
        await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        # A statement of the session starts its transaction.
        await session.execute(select(1))
        connection = await driver_connection(session)
        await connection.execute(_LOCK)
        page = await queue.redeliver_failed(connection, wanted, after, _PAGE)
        if page.redelivered:
            resource = format_id("wh", wanted.webhook_id) if wanted.webhook_id else ""
            record_change(
                session,
                action="RedeliverDeliveries",
                resource=resource or wanted.merchant_id or "",
                merchant_id=wanted.merchant_id,
                comment=_comment(wanted, page),
            )
    return page


def _comment(wanted: FailedFilter, page: RedeliveredPage) -> str:
    start, end = wanted.start_at.isoformat(), wanted.end_at.isoformat()
    outcomes = f", {' or '.join(wanted.outcomes)}" if wanted.outcomes else ""
    return f"{page.redelivered} of those made from {start} to {end}{outcomes}"
