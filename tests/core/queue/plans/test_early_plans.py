"""Generic plans made while the tables were almost empty stay right when they grow."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from cli.dev.postgres import EmbeddedPostgres
from core.ids import first_id_at, new_id
from core.lifecycle import DeliveryState, Outcome
from core.queue import backlog, breakers, ordering, rate_limit, redelivery
from core.queue.claim import _CLAIM
from core.queue.enqueue import _ENQUEUE, _EVENT, _ranks
from core.queue.settle import _CANCEL_WEBHOOK, _HELD
from core.retention import prune
from server.admin import erasure
from server.deliveries import store as delivery_store
from server.events import store as event_store
from tests.support.crowded_queue import CROWD, crowded_database, quiet_config
from tests.support.factories import STARTED_AT, make_event
from tests.support.query_plans import execution, explain

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


#: Statements that are planned while the tables are almost empty.
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
    """A connection with generic plans that are older than the rows."""
    async with crowded_database(postgres, "grown_query_plans", range(-2, 2)) as connection:
        few = CROWD.replace("4000", "20").replace("20000", "20")
        await connection.execute(few)
        await connection.execute("VACUUM ANALYZE")
        await connection.execute("SET plan_cache_mode = force_generic_plan")
        for number, statement in enumerate(_PLANNED_EARLY.values()):
            await connection.execute(f"PREPARE early_{number} AS {statement}")
            types = (await connection.prepare(statement)).get_parameters()
            nulls = ", ".join("NULL" for _ in types)
            await connection.execute(f"EXPLAIN EXECUTE early_{number}({nulls})")
        # The statistics and the plans keep the earlier row counts.
        for table in ("delivery_queue", "attempts", "finished_deliveries", "events"):
            await connection.execute(f"DELETE FROM {table}")  # noqa: S608 - of constants
        await connection.execute("DELETE FROM idempotency_keys; DELETE FROM webhook_configs")
        await connection.execute(CROWD)
        yield connection


@pytest.mark.parametrize("name", _PLANNED_EARLY)
async def test_plan_made_for_few_rows_is_right_for_many(grown: Any, name: str) -> None:
    arguments = await _arguments(grown, name)
    early = f"early_{list(_PLANNED_EARLY).index(name)}"

    plan = await explain(grown, await execution(grown, early, _PLANNED_EARLY[name], arguments))

    # A page with few finished deliveries may read a whole day in index order.
    read = max(
        scan.rows + scan.filtered
        for scan in plan.scans
        if scan.kind != "CTE Scan"
        and not (name.startswith("page") and scan.relation.startswith("finished_deliveries"))
    )
    # One config has 1,400 of more than 20,000 rows.
    assert read <= 1500, plan.scans


async def _arguments(connection: Any, name: str) -> Sequence[Any]:
    """Arguments that match about 100 rows."""
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
        "enqueue": [*_EVENT.arguments(events), _ranks(events)],
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
        "cancel": (await quiet_config(connection), 1000),
        "classify": redelivery._arguments(failed, redelivery.BEGINNING, 100),
        "erase keys": ("m_1", 100, now),
        "erase events": ("m_1", UUID(int=0), 100, now),
        "erase attempts": ("m_1", UUID(int=0), 100, now),
        "remove keys": (now - timedelta(days=1), 100),
        "remove entries": (now - timedelta(days=1), 100, first_id_at(now)),
    }
    return arguments[name]
