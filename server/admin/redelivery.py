"""Sends again what failed of many merchants, in pages of a transaction each.

Every page finds by itself what is left of it, so a call that broke off is repeated as it was.
"""

from collections.abc import Callable
from uuid import UUID

from sqlalchemy import text

from core import queue
from core.ids import format_id
from core.postgres.protocols import Pool
from core.queue import FailedFilter, Place, RedeliveredPage
from server.database import Sessions, driver_connection
from server.rpc.audit import record_change
from server.rpc.ids import is_merchant_id

#: Deliveries looked at in one transaction, and transactions of one call: tenths of a second in all.
_PAGE = 500
_PAGES = 10

# The space keeps it apart from the locks of merchants.
_ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtextextended('redeliver failed', 0))")


async def redeliver_failed(
    sessions: Sessions, wanted: FailedFilter, after: Place, made: Callable[[], None]
) -> RedeliveredPage:
    """What came of the next pages together; `made` is called after each that made a delivery."""
    pages: list[RedeliveredPage] = []
    end: Place | None = after
    while end is not None and len(pages) < _PAGES:
        page = await _redeliver_page(sessions, wanted, end)
        if page.redelivered:
            made()
        pages.append(page)
        end = page.end
    return RedeliveredPage(
        sum(page.redelivered for page in pages),
        sum(page.already_redelivered for page in pages),
        sum(page.skipped for page in pages),
        end,
    )


async def count_failed(pool: Pool, wanted: FailedFilter, after: Place) -> RedeliveredPage:
    """What would come of it."""
    return await queue.redeliver_failed(pool, wanted, after, _PAGE * _PAGES, dry_run=True)


def place_text(place: Place) -> str:
    return f"{place.merchant_id}/{place.delivery_id.hex}"


def parse_place(position: str) -> Place:
    """ValueError when it is none."""
    merchant_id, _, digits = position.partition("/")
    if not is_merchant_id(merchant_id):
        raise ValueError(position)
    return Place(merchant_id, UUID(hex=digits))


async def _redeliver_page(
    sessions: Sessions, wanted: FailedFilter, after: Place
) -> RedeliveredPage:
    async with sessions.begin() as session:
        # Of two at once the second has to see what the first has made.
        await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
        await session.execute(_ONE_AT_A_TIME)
        connection = await driver_connection(session)
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
