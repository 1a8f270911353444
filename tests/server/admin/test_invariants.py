"""CheckInvariants: counts, examples and the time budget."""

from datetime import timedelta
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode

from core.queue import invariants
from core.queue.invariants import INVARIANTS
from postrider.v1 import admin_service_pb2 as pb
from tests.support.factories import enqueue_events, make_webhook_config
from tests.support.platform import Platform
from tests.support.refused_calls import refused


async def check(platform: Platform, **fields: Any) -> dict[str, pb.InvariantCheck]:
    answer = await platform.as_operator().CheckInvariants(**fields)
    return {check.name: check for check in answer.checks}


async def test_check_reports_each_invariant_with_example_ids(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "_SECOND_LOOK_SECONDS", 0.01)
    await make_webhook_config(pool)
    events = await enqueue_events(pool, 12)
    healthy = await check(platform)
    assert [check.name for check in healthy.values()] == [i.name for i in INVARIANTS]
    assert [check.description for check in healthy.values()] == [i.says for i in INVARIANTS]
    assert {(check.broken, check.complete) for check in healthy.values()} == {(0, True)}

    await pool.execute("DELETE FROM delivery_queue")
    found = (await check(platform))["event_has_deliveries"]
    assert (found.examined, found.broken) == (12, 12)
    newest = sorted((event.id for event in events), reverse=True)[:10]
    assert list(found.examples) == [f"evt_{id_.hex}" for id_ in newest]


@pytest.mark.parametrize("seconds", [-1, 0, 0.9, 60.1])
async def test_invariant_budget_out_of_bounds_is_refused(
    platform: Platform, seconds: float
) -> None:
    budget = Duration()
    budget.FromTimedelta(timedelta(seconds=seconds))
    async with refused(StatusCode.INVALID_ARGUMENT, "BUDGET_INVALID"):
        await check(platform, budget=budget)
