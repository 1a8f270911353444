"""An engine that is told to stop while its database is away: it ends all the same, and says so."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from aiohttp import web

from delivery.claim import claim
from tests.support.own_postgres import OwnPostgres
from tests.support.platform import Platform, running_platform
from tests.support.receiver import Receiver


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
async def test_stop_without_database_leaves_results_to_leases(
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


@pytest.mark.parametrize("answered", [True, False])
async def test_unanswered_statements_do_not_lengthen_drain(
    own_postgres: OwnPostgres,
    *,
    receiver: Receiver,
    ca_file: Path,
    tmp_path: Path,
    logged: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    answered: bool,
) -> None:
    assert own_postgres.server is not None
    asked, answer, claiming = asyncio.Event(), asyncio.Event(), asyncio.Event()

    def claim_and_tell(*args: Any) -> Any:
        claiming.set()
        return claim(*args)

    monkeypatch.setattr("delivery.engine.claim", claim_and_tell)

    async def wait(_: web.Request) -> web.StreamResponse:
        asked.set()
        await answer.wait()
        return web.Response()

    merchant_id = f"silent_{answered}"
    # With the timeouts that an operator has, of which the claim under way would take all.
    async with running_platform(own_postgres.server.url(), ca_file, tmp_path) as platform:
        await platform.register(receiver.url, merchant_id)
        receiver.default = wait
        engine = platform.engine(delivery_drain_seconds=1.0)
        await engine.__aenter__()
        await platform.publish(merchant_id=merchant_id)
        await asyncio.wait_for(asked.wait(), 10)
        with own_postgres.frozen():
            claiming.clear()
            await asyncio.wait_for(claiming.wait(), 10)
            began = monotonic()
            stopping = asyncio.create_task(engine.__aexit__(None, None, None))
            if answered:
                answer.set()
            await asyncio.wait_for(stopping, 40)
            # Two drains, and a good-bye that is waited for 2 s.
            assert monotonic() - began < 8
        answer.set()
    told = [entry["event"] for entry in logged]
    assert ("results_left_to_leases" if answered else "release_failed") in told
