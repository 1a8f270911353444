"""`postrider config --check`: what the database and the issuer say to the settings."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any

import asyncpg
import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner

from cli.dev.postgres import EmbeddedPostgres
from cli.main import main
from cli.ops import configuration_faults
from tests.support.factories import make_webhook_config
from tests.support.platform import ENCRYPTION_KEYS

# Whose fsync is off, since nothing in it is to survive the tests.
OF_THESE_TESTS = "fsync = off"


@pytest.fixture
async def issuer() -> AsyncIterator[str]:
    """Where an issuer has a key set without a key."""

    async def answer(_: web.Request) -> web.Response:
        return web.json_response({"keys": []})

    app = web.Application()
    app.router.add_get("/keys", answer)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("/keys"))
    await server.close()


@pytest.fixture
def environment(database_url: str) -> dict[str, str]:
    return {
        "WEBHOOK_DATABASE_URL": database_url,
        "WEBHOOK_ENCRYPTION_KEYS": ENCRYPTION_KEYS,
    }


async def problems(environment: Mapping[str, str], process: str = "delivery") -> list[str]:
    """The problems, except fsync, which is off in these tests."""
    arguments = ["config", "--check", "--json", "--for", process]
    done = await asyncio.to_thread(CliRunner().invoke, main, arguments, env=environment)
    found: list[str] = orjson.loads(done.stdout)["problems"]
    assert done.exit_code == bool(found)
    return [problem for problem in found if OF_THESE_TESTS not in problem]


async def test_nothing_is_wrong_with_a_good_database(environment: dict[str, str]) -> None:
    assert await problems(environment) == []


async def test_unreachable_database_is_listed_with_other_problems(
    environment: dict[str, str],
) -> None:
    environment |= {
        "WEBHOOK_DATABASE_URL": "postgresql://127.0.0.1:1/d",
        "WEBHOOK_CLAIM_BATCH": "0",
    }
    wrong_value, away = await problems(environment)
    assert wrong_value.startswith("WEBHOOK_CLAIM_BATCH")
    assert away.startswith("the database cannot be reached; check WEBHOOK_DATABASE_URL")


async def test_an_unmigrated_database_is_told(
    environment: dict[str, str], postgres: EmbeddedPostgres
) -> None:
    [problem] = await problems(environment | {"WEBHOOK_DATABASE_URL": postgres.url("template1")})
    assert problem.endswith("run `postrider migrate` first")


async def test_a_key_that_the_database_needs_and_nobody_has_is_told(
    environment: dict[str, str], pool: Any
) -> None:
    await make_webhook_config(pool, secret_key_id="k7")
    [problem] = await problems(environment)
    assert "are encrypted with the key k7, which is not configured" in problem


async def test_more_connections_than_the_server_takes_are_told(
    environment: dict[str, str],
) -> None:
    [problem] = await problems(
        environment | {"WEBHOOK_DATABASE_POOL_SIZE": "150", "WEBHOOK_DELIVERY_PROCESSES": "2"}
    )
    assert problem.startswith("processes with these settings may open 300 connections")


async def test_an_issuer_without_a_usable_key_is_told(
    environment: dict[str, str], issuer: str
) -> None:
    environment |= {
        "WEBHOOK_JWT_ISSUER": "x",
        "WEBHOOK_JWT_JWKS_URL": issuer,
    }
    [problem] = await problems(environment, "server")
    assert "no key set (ValueError: no usable key in the set)" in problem


@pytest.mark.parametrize(("ahead", "says"), [(5.0, "5.0 s ahead of"), (-5.0, "5.0 s behind")])
async def test_a_clock_that_is_wrong_is_told(
    database_url: str, monkeypatch: pytest.MonkeyPatch, ahead: float, says: str
) -> None:
    here = time.time
    monkeypatch.setattr(time, "time", lambda: here() + ahead)
    async with asyncpg.create_pool(database_url, min_size=1) as pool:
        found = await configuration_faults._server_faults(pool, configuration_faults.Blocks())
    assert any(f"this machine's clock is {says} the database's" in fault for fault in found)
