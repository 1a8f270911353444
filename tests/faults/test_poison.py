"""Corrupt rows fail only their own deliveries, and no engine."""

from typing import Any

import pytest
from aiohttp import web

from core.ids import parse_id
from tests.support.system_under_load import PATIENT, Conclude, SystemUnderLoad

# Corrupt values in a webhook config, as after manual SQL, a lost key or a bad restore, and the
# results of its deliveries.
INTERNAL = ("failed", "internal_error")
FAILING = ("failed", "http_error")
REFUSED = ("failed", "refused")
POISON = {
    "secret": ("secret_ciphertext = 'nonsense'", INTERNAL),
    "key": ("secret_key_id = 'lost'", INTERNAL),
    "header": ("""headers = '{"X-Shop": "a\\r\\nX-Injected: 1"}'""", INTERNAL),
    "header_type": ("""headers = '{"X-Shop": 7}'""", ("delivered", "succeeded")),
    "headers_type": ("headers = '[1]'", INTERNAL),
    "url": ("url = 'https://[broken/'", REFUSED),
    "port": ("url = 'https://shop.example:99999/'", REFUSED),
    "host": ("url = 'https:///hook'", REFUSED),
    # Its receiver always answers 500, so that the schedule is looked at.
    "schedule": ("retry_schedule_seconds = '{NaN,Infinity,-1}'", FAILING),
    "previous": (
        """previous_secret_ciphertext = 'nonsense', previous_secret_key_id = 'lost',
        previous_secret_expires_at = now() + interval '1 hour'""",
        ("delivered", "succeeded"),
    ),
}


def merchant_of(kind: str) -> str:
    return f"poison_{kind}"


async def poison(system: SystemUnderLoad, pool: Any) -> None:
    """A config for each kind, spoilt; it may go on being called, were it not for that."""
    for kind, (change, _) in POISON.items():
        webhook_id = await system.register(merchant_of(kind))
        await pool.execute(
            f"UPDATE webhook_configs SET version = version + 1, {change} WHERE id = $1",  # noqa: S608
            parse_id("wh", webhook_id),
        )


async def outcomes(pool: Any) -> dict[str, tuple[int, set[tuple[str, str]]]]:
    """Return the number of attempts of each kind, and its (final state, outcome) pairs."""
    rows = await pool.fetch(
        "SELECT f.merchant_id, f.state, a.outcome FROM finished_deliveries f"
        " JOIN attempts a ON a.delivery_id = f.id WHERE f.merchant_id LIKE 'poison%'"
    )
    return {
        kind: (len(mine), {(row["state"], row["outcome"]) for row in mine})
        for kind in POISON
        if (mine := [row for row in rows if row["merchant_id"] == merchant_of(kind)])
    }


@pytest.mark.slow
async def test_poison_row_fails_only_its_own_deliveries(
    system: SystemUnderLoad, conclude: Conclude, pool: Any
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.endswith(merchant_of("schedule")):
            await system.load.answer(request)
            return web.Response(status=500)
        return await system.load.answer(request)

    system.receiver.default = answer
    await system.engine(**PATIENT, max_retries=2, max_fault_retries=2)
    await poison(system, pool)
    async with system.load.running() as load:
        await load.arrived_more(100)
        for kind, (_, (state, _)) in POISON.items():
            for _ in range(3):
                published = await system.platform.publish(merchant_id=merchant_of(kind))
                if state == "delivered" or kind == "schedule":
                    system.load.acknowledged.append(published.event.id)
        await system.drained("merchant_id LIKE 'poison%'")
        await load.arrived_more(100)

    expected = {
        kind: (9 if result in (INTERNAL, FAILING) else 3, {result})
        for kind, (_, result) in POISON.items()
    }
    assert await outcomes(pool) == expected
    # An internal fault does not count against the receiver. A URL that cannot be called does.
    blamed = await pool.fetch(
        "SELECT merchant_id FROM webhook_configs WHERE consecutive_failures > 0 OR NOT active"
    )
    assert {row["merchant_id"] for row in blamed} == {
        merchant_of(kind) for kind, (_, result) in POISON.items() if result in (REFUSED, FAILING)
    }
    await conclude(system, f"{len(POISON)} kinds of poison rows", 0)
