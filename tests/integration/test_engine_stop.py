"""An engine that is told to stop while its database is away: it ends all the same, and says so."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from aiohttp import web

from tests.fakes.receiver import Receiver
from tests.own_postgres import OwnPostgres
from tests.platform import Platform, running_platform


@pytest.fixture
async def on_own(
    own_postgres: OwnPostgres, ca_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Platform]:
    assert own_postgres.server is not None
    monkeypatch.setenv("WEBHOOK_DATABASE_STATEMENT_TIMEOUT_SECONDS", "0.5")
    monkeypatch.setenv("WEBHOOK_DATABASE_CONNECT_TIMEOUT_SECONDS", "0.5")
    async with running_platform(own_postgres.server.url(), ca_file, tmp_path) as platform:
        yield platform


@contextmanager
def _stopped(own_postgres: OwnPostgres) -> Any:
    own_postgres.stop()
    try:
        yield
    finally:
        own_postgres.start()


@pytest.mark.parametrize("away", [_stopped, OwnPostgres.frozen])
async def test_it_ends_in_time_and_leaves_what_it_could_not_record_to_the_leases(
    own_postgres: OwnPostgres,
    on_own: Platform,
    receiver: Receiver,
    logged: list[Any],
    away: Callable[[OwnPostgres], AbstractContextManager[None]],
) -> None:
    merchant_id = away.__name__.strip("_")
    await on_own.register(receiver.url, merchant_id)
    asked, answer = asyncio.Event(), asyncio.Event()

    async def wait(_: web.Request) -> web.StreamResponse:
        asked.set()
        await answer.wait()
        return web.Response()

    receiver.default = wait
    engine = on_own.engine(delivery_drain_seconds=1.0)
    await engine.__aenter__()
    await on_own.publish(merchant_id=merchant_id)
    await asyncio.wait_for(asked.wait(), 10)
    with away(own_postgres):
        began = monotonic()
        stopping = asyncio.create_task(engine.__aexit__(None, None, None))
        answer.set()
        await asyncio.wait_for(stopping, 15)
        assert monotonic() - began < 12
    [entry] = [entry for entry in logged if entry["event"] == "results_left_to_leases"]
    assert entry["deliveries"] == 1
