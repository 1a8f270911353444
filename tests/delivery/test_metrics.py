"""Metrics of an engine, read through its listener."""

import asyncio
from collections.abc import Sequence
from typing import Any

import aiohttp
import pytest
from prometheus_client.metrics_core import Metric

from cli.metrics.http import MetricsAddress, serve_metrics
from core.errors import ConfigurationError
from core.lifecycle import Outcome
from delivery.settings import DeliverySettings
from tests.e2e.test_processes import open_deliveries
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.scrape import Scrape, scrape

ANYWHERE = "127.0.0.1:0"


def port_in(logged: list[Any]) -> int:
    [port] = [entry["port"] for entry in logged if entry["event"] == "metrics_listening"]
    return int(port)


class NoMetrics:
    async def scrape(self) -> Sequence[Metric]:
        return []

    async def is_ready(self) -> bool:
        return False


async def scrape_after_the_last_delivery(pool: Any, logged: list[Any]) -> Scrape:
    async with asyncio.timeout(20):
        while await open_deliveries(pool):
            pass
    return await scrape(port_in(logged))


async def test_metrics_count_failures_by_outcome(
    platform: Platform, receiver: Receiver, pool: Any, logged: list[Any]
) -> None:
    receiver.default = 500
    await platform.register(receiver.url)
    async with platform.engine(
        delivery_metrics_address=ANYWHERE,
        max_retries=1,
        retry_schedule_seconds=(0.01,),
        max_consecutive_failures=2,
    ):
        for _ in range(2):
            await platform.publish()
        scraped = await scrape_after_the_last_delivery(pool, logged)

    attempts = {
        outcome: scraped.sum("postrider_attempts_total", outcome=outcome) for outcome in Outcome
    }
    assert attempts == dict.fromkeys(Outcome, 0) | {Outcome.HTTP_ERROR: 4}
    assert scraped.sum("postrider_deliveries_total", state="failed") == 2
    assert scraped.sum("postrider_delivery_attempts_bucket", le="1.0") == 0
    assert scraped.sum("postrider_delivery_attempts_bucket", le="2.0") == 2
    assert scraped.sum("postrider_publish_to_first_attempt_seconds_count") == 2
    assert scraped.sum("postrider_publish_to_delivered_seconds_count") == 0
    assert scraped.sum("postrider_webhook_deactivations_total", reason="failures") == 1
    assert scraped.sum("postrider_webhook_configs", status="failures") == 1
    assert scraped.sum("postrider_in_flight") == 0


async def test_metrics_count_breaker_changes_and_410(
    platform: Platform, receiver: Receiver, pool: Any, logged: list[Any]
) -> None:
    receiver.script.extend([500, 500, 200, 410])
    await platform.register(receiver.url)
    async with platform.engine(
        delivery_metrics_address=ANYWHERE,
        retry_schedule_seconds=(0.01,),
        breaker_failures=2,
        breaker_failing_seconds=0.001,
        breaker_cooldown_seconds=0.1,
    ):
        await platform.publish()
        await receiver.wait_for(3)
        await platform.publish()
        scraped = await scrape_after_the_last_delivery(pool, logged)

    assert scraped.sum("postrider_breaker_changes_total", to="open") == 1
    assert scraped.sum("postrider_breaker_changes_total", to="closed") == 1
    assert scraped.sum("postrider_webhook_deactivations_total", reason="gone") == 1


async def test_latency_metrics_start_when_delivery_is_due(
    platform: Platform, receiver: Receiver, pool: Any, logged: list[Any]
) -> None:
    """Both times are the database's. The engine starts after the event was accepted."""
    await platform.register(receiver.url)
    await platform.publish()
    await pool.execute("UPDATE delivery_queue SET created_at = now() - interval '90 seconds'")
    # Due from its not_before on, which has just passed.
    await platform.publish()
    await pool.execute(
        "UPDATE events SET not_before = now() WHERE id <> (SELECT min(id::text)::uuid FROM events)"
    )
    await pool.execute(
        "UPDATE delivery_queue SET created_at = now() - interval '90 seconds'"
        " WHERE event_id = (SELECT max(id::text)::uuid FROM events)"
    )
    async with platform.engine(delivery_metrics_address=ANYWHERE):
        scraped = await scrape_after_the_last_delivery(pool, logged)

    for name in ("first_attempt", "delivered"):
        buckets = f"postrider_publish_to_{name}_seconds_bucket"
        assert scraped.sum(buckets, le="60.0") == 1
        assert scraped.sum(buckets, le="120.0") == 2


async def test_pool_metrics_count_statements_and_connections(
    platform: Platform, logged: list[Any]
) -> None:
    async with platform.engine(delivery_metrics_address=ANYWHERE, poll_seconds=0.05):
        first = await scrape(port_in(logged))
        async with asyncio.timeout(20):
            while (scraped := await scrape(port_in(logged))).sum(
                "postrider_claim_duration_seconds_count"
            ) < 3:
                pass

    assert scraped.sum("postrider_statements_total") >= first.sum("postrider_statements_total") + 2
    size = scraped.sum("postrider_database_pool_size")
    assert size == platform.settings.database.database_pool_size
    assert 1 <= scraped.sum("postrider_database_pool_connections") <= size


async def test_openmetrics_is_served_on_request(platform: Platform, logged: list[Any]) -> None:
    async with platform.engine(delivery_metrics_address=ANYWHERE):
        accept = {"Accept": "application/openmetrics-text;version=1.0.0"}
        async with (
            aiohttp.ClientSession(headers=accept) as session,
            session.get(f"http://127.0.0.1:{port_in(logged)}/metrics") as response,
        ):
            text = await response.text()

    assert response.content_type == "application/openmetrics-text"
    assert text.endswith("# EOF\n")


async def test_configured_metrics_address_in_use_is_an_error(
    platform: Platform, logged: list[Any]
) -> None:
    async with platform.engine(delivery_metrics_address=ANYWHERE):
        taken = f"127.0.0.1:{port_in(logged)}"
        with pytest.raises(ConfigurationError, match="WEBHOOK_DELIVERY_METRICS_ADDRESS"):
            async with platform.engine(delivery_metrics_address=taken):
                pass


async def test_default_metrics_address_in_use_is_a_warning(
    platform: Platform, logged: list[Any]
) -> None:
    async with platform.engine(delivery_metrics_address=ANYWHERE):
        taken = MetricsAddress(
            f"127.0.0.1:{port_in(logged)}", "WEBHOOK_DELIVERY_METRICS_ADDRESS", True
        )
        async with serve_metrics(taken, NoMetrics()):
            [warning] = [entry for entry in logged if entry["event"] == "metrics_listener_off"]
            assert (await scrape(port_in(logged))).sum("postrider_in_flight") == 0

    assert warning["log_level"] == "warning"
    assert "WEBHOOK_DELIVERY_METRICS_ADDRESS" in warning["message"]


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:http", "[::1]:99999"])
async def test_invalid_metrics_address_is_an_error(address: str) -> None:
    configured = MetricsAddress.from_settings(
        DeliverySettings(delivery_metrics_address=address), "delivery_metrics_address"
    )

    with pytest.raises(ConfigurationError, match="WEBHOOK_DELIVERY_METRICS_ADDRESS"):
        async with serve_metrics(configured, NoMetrics()):
            pass
