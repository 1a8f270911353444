"""When a JWKS document is fetched, and how long its keys stay valid."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from cli.metrics.server import ServerCollector
from core.errors import Unavailable
from server.auth import jwks as jwks_module
from server.auth.jwks import JwksKeys, VerificationKey
from server.metrics import ServerMetrics
from tests.support.clock import ManualClock
from tests.support.jwks import EC, FakeIssuer, make_jwk, make_jwks

# Repeated here because they are documented.
FETCH_INTERVAL_SECONDS = 30
REFRESH_AFTER_SECONDS = 300
STALE_AFTER_SECONDS = 24 * 3600


async def fetch_ends(jwks: JwksKeys) -> None:
    """Wait for the running fetch."""
    assert jwks._fetching is not None
    await jwks._fetching


async def test_concurrent_calls_share_one_fetch(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    found = await asyncio.gather(*(jwks.keys_for("ed") for _ in range(100)))
    assert all(len(keys) == 1 for keys in found)
    assert issuer.fetches == 1


async def test_cancelled_call_does_not_cancel_the_fetch(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    issuer.gate.clear()
    impatient = asyncio.create_task(jwks.keys_for("ed"))
    patient = asyncio.create_task(jwks.keys_for("ed"))
    await issuer.begun.wait()
    impatient.cancel()
    issuer.gate.set()
    assert len(await patient) == 1
    assert impatient.cancelled()
    assert issuer.fetches == 1


async def test_unknown_kids_fetch_once_in_30_seconds(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock
) -> None:
    started = clock.now
    for number in range(1000):
        clock.now = started + number * 0.1
        assert await jwks.keys_for(f"unknown-{number}") == ()
    assert issuer.fetches == 4  # at 0, 30, 60 and 90 seconds


async def test_few_unknown_kids_wait_for_a_slow_issuer(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock
) -> None:
    await jwks.keys_for("ed")
    clock.now += FETCH_INTERVAL_SECONDS
    issuer.gate.clear()
    calls = [asyncio.create_task(jwks.keys_for(f"unknown-{number}")) for number in range(1000)]
    done, waiting = await asyncio.wait(calls, timeout=0)
    while len(waiting) > jwks_module.WAITING_MAX:
        done, waiting = await asyncio.wait(calls, timeout=0)
    assert len(waiting) == jwks_module.WAITING_MAX
    assert {task.result() for task in done} == {()}
    assert len(await jwks.keys_for("ed")) == 1
    issuer.gate.set()
    assert set(await asyncio.gather(*calls)) == {()}
    assert issuer.fetches == 2
    # The next caller may wait again.
    clock.now += FETCH_INTERVAL_SECONDS
    issuer.document = make_jwks(make_jwk(EC, "new"))
    assert len(await jwks.keys_for("new")) == 1


async def test_new_key_is_fetched_for_its_first_token(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock
) -> None:
    await jwks.keys_for("ed")
    issuer.document = make_jwks(make_jwk(EC, "new"))
    clock.now += FETCH_INTERVAL_SECONDS - 1
    assert await jwks.keys_for("new") == ()
    clock.now += 1
    assert await jwks.keys_for("new") == (VerificationKey.of(EC.public_key()),)
    assert await jwks.keys_for("ed") == ()
    assert issuer.fetches == 2


async def test_refresh_does_not_delay_calls(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock
) -> None:
    await jwks.keys_for("ed")
    clock.now += REFRESH_AFTER_SECONDS
    await jwks.keys_for("ed")
    assert issuer.fetches == 1
    clock.now += 1
    issuer.document = make_jwks(make_jwk(EC, "new"))
    issuer.gate.clear()
    assert len(await jwks.keys_for("ed")) == 1
    issuer.gate.set()
    await fetch_ends(jwks)
    assert issuer.fetches == 2
    assert len(await jwks.keys_for("new")) == 1


@pytest.mark.parametrize(
    "failure",
    [
        OSError("connection refused"),
        b"<html>502 Bad Gateway</html>",
        b"\xff",
        b"[]",
        b'{"keys": null}',
        make_jwks(),
        make_jwks({"kty": "oct", "k": "c2VjcmV0"}),
    ],
    ids=["no connection", "HTML", "not UTF-8", "a list", "keys null", "no keys", "no usable keys"],
)
async def test_keys_stay_valid_for_a_day_of_failed_fetches(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock, failure: bytes | Exception
) -> None:
    await jwks.keys_for("ed")
    loaded = clock.now
    issuer.document = failure
    clock.now = loaded + REFRESH_AFTER_SECONDS + 1
    await jwks.keys_for("ed")
    await fetch_ends(jwks)
    clock.now = loaded + STALE_AFTER_SECONDS
    assert len(await jwks.keys_for("ed")) == 1
    await fetch_ends(jwks)
    assert issuer.fetches == 3
    clock.now = loaded + STALE_AFTER_SECONDS + FETCH_INTERVAL_SECONDS
    with pytest.raises(Unavailable):
        await jwks.keys_for("ed")
    issuer.document = make_jwks(make_jwk())
    clock.now += FETCH_INTERVAL_SECONDS
    assert len(await jwks.keys_for("ed")) == 1


async def test_calls_without_keys_are_unavailable_and_fetch_rarely(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock, logged: list[Any]
) -> None:
    issuer.document = OSError("no route")
    started = clock.now
    for number in range(100):
        clock.now = started + number * 0.5
        with pytest.raises(Unavailable) as caught:
            await jwks.keys_for(f"kid-{number}")
        assert 1.0 <= caught.value.retry_after_seconds <= FETCH_INTERVAL_SECONDS
    assert issuer.fetches == 2
    assert [entry["event"] for entry in logged] == ["jwks_fetch_failed"] * 2
    issuer.document = make_jwks(make_jwk())
    clock.now = started + 60
    assert len(await jwks.keys_for("ed")) == 1


async def test_hanging_fetch_times_out(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jwks_module, "FETCH_TIMEOUT_SECONDS", 0.0)
    issuer.gate.clear()
    with pytest.raises(Unavailable):
        await jwks.keys_for("ed")
    issuer.gate.set()
    clock.now += FETCH_INTERVAL_SECONDS
    monkeypatch.undo()
    assert len(await jwks.keys_for("ed")) == 1


async def test_fetch_longer_than_the_interval_is_not_repeated(
    issuer: FakeIssuer, jwks: JwksKeys, clock: ManualClock
) -> None:
    issuer.gate.clear()
    waiting = [asyncio.create_task(jwks.keys_for("ed"))]
    await issuer.begun.wait()
    clock.now += FETCH_INTERVAL_SECONDS + 1
    waiting.append(asyncio.create_task(jwks.keys_for("ed")))
    await asyncio.sleep(0)
    issuer.gate.set()
    assert [len(keys) for keys in await asyncio.gather(*waiting)] == [1, 1]
    assert issuer.fetches == 1


async def reported_age(metrics: ServerCollector) -> list[float]:
    return [
        sample.value
        for metric in await metrics.scrape()
        for sample in metric.samples
        if sample.name == "postrider_jwks_age_seconds"
    ]


async def test_metric_is_the_age_of_the_last_successful_fetch(
    jwks: JwksKeys, issuer: FakeIssuer, clock: ManualClock
) -> None:
    sizes = dict.fromkeys(("get_size", "get_idle_size", "get_max_size"), lambda: 0)
    pool: Any = SimpleNamespace(statements=0, **sizes)
    metrics = ServerCollector(ServerMetrics({}), pool, jwks)
    assert await reported_age(metrics) == []

    await jwks.keys_for("ed")
    clock.now += 400
    issuer.document = OSError("away")
    await jwks.keys_for("ed")
    await fetch_ends(jwks)

    assert await reported_age(metrics) == [400]
