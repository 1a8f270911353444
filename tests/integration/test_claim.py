"""The claim stage: what comes too late is given back."""

from collections.abc import Callable
from typing import Any

import pytest

from core import queue
from core.measures import SHORT, Histogram
from delivery.claim import claim
from tests.factories import enqueue_events, make_webhook_config

LEASE_SECONDS = 60.0


def clock(*moments: float) -> Callable[[], float]:
    return iter(moments).__next__


async def test_what_the_database_leased_long_ago_is_given_back(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_webhook_config(pool)
    await enqueue_events(pool, 3)
    monkeypatch.setattr("delivery.claim.monotonic", clock(0, LEASE_SECONDS / 2 + 1))

    late = await claim(pool, 10, LEASE_SECONDS, Histogram(SHORT))

    assert (late.taken, list(late.deliveries)) == (3, [])
    assert len(await queue.claim(pool, 10, LEASE_SECONDS)) == 3


async def test_what_took_less_than_half_a_lease_is_attempted(
    pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_webhook_config(pool)
    await enqueue_events(pool, 3)
    monkeypatch.setattr("delivery.claim.monotonic", clock(0, LEASE_SECONDS / 2 - 1))

    assert len((await claim(pool, 10, LEASE_SECONDS, Histogram(SHORT))).deliveries) == 3
