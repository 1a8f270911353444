"""`postrider verify` as an operator or a job runs it."""

import asyncio
from typing import Any

import orjson
import pytest

from tests.support.factories import enqueue_events, make_webhook_config
from tests.support.processes import POSTRIDER


async def verify(database_url: str, *options: str) -> tuple[int | None, str, str]:
    """Exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        POSTRIDER,
        "verify",
        *options,
        env={"WEBHOOK_DATABASE_URL": database_url, "PATH": str(POSTRIDER.parent)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


@pytest.fixture
async def events(pool: Any) -> list[str]:
    await make_webhook_config(pool)
    return [f"evt_{event.id.hex}" for event in await enqueue_events(pool, 3)]


async def test_a_sound_database_is_0_and_a_table(database_url: str, events: list[str]) -> None:
    code, out, err = await verify(database_url)
    assert (code, err) == (0, "")
    assert "           3        0  every accepted event has all its deliveries" in out
    assert out.splitlines()[-1].startswith("everything was checked")


async def test_violation_exits_with_1_and_prints_ids(
    database_url: str, events: list[str], pool: Any
) -> None:
    await pool.execute("DELETE FROM delivery_queue WHERE event_id = $1", events[1][4:])
    (code, out, _), (json_code, json, _) = await asyncio.gather(
        verify(database_url), verify(database_url, "--json", "--seconds", "5")
    )
    assert (code, json_code) == (1, 1)
    # With what to do about it, and nothing of the kind about the others.
    after = out.partition(events[1])[2].splitlines()
    assert after[1].strip().startswith("missing deliveries are not sent")
    assert "engine runs" not in out
    assert events[0] not in out
    told = orjson.loads(json)
    assert (told["broken"], told["complete"]) == (1, True)
    [broken] = [invariant for invariant in told["invariants"] if invariant["broken"]]
    assert broken["name"] == "event_has_deliveries"
    assert broken["examples"] == [events[1]]
    assert broken["advice"] == after[1].strip()
    assert {i["advice"] for i in told["invariants"] if not i["broken"]} == {None}


async def test_a_database_that_is_away_is_2(database_url: str) -> None:
    code, out, err = await verify("postgresql://127.0.0.1:1/none")
    assert (code, out) == (2, "")
    assert err.startswith("postrider: the database cannot be reached")
