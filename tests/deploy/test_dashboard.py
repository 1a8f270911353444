"""Queries of the dashboard and the alerts, run on a real Prometheus that scrapes real processes."""

import math
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from tests.support.monitored_stack import (
    ENGINES,
    MonitoredStack,
    monitored_stack,
    stopped_is_inactive,
    traffic,
)
from tests.support.paths import ROOT
from tests.support.prometheus import Prometheus, needs_prometheus
from tests.support.receiver import Receiver

DASHBOARD = orjson.loads((ROOT / "deploy/grafana/postrider.json").read_bytes())
RULES = (ROOT / "deploy/prometheus/alerts.yml").read_text()
#: Grafana's variables. A rate covers four scrapes.
VARIABLES = {"$__rate_interval": "4s", "$__range": "1m"}
#: Series without data here: retention runs once a day, and no call fails.
MAY_BE_EMPTY = {
    "postrider_retention_last_run_timestamp_seconds",
    'postrider_rpcs_total{code=~"INTERNAL|UNKNOWN|UNAVAILABLE",method!~"Health/.+"}',
}

#: Files that name metrics.
NAMING = (
    "deploy/grafana/postrider.json",
    "deploy/prometheus/alerts.yml",
    "docs/operate/runbook.md",
)


def queries() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each query of the dashboard with the name of its panel."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            assert "$" not in expression, panel["title"]
            yield panel["title"], {**target, "expr": expression}


async def has_data(prometheus: Prometheus, target: dict[str, Any], since: float) -> bool:
    """Whether a query returns a number, as an instant or range query like its panel."""
    if target["instant"]:
        values = [series["value"] for series in await prometheus.instant(target["expr"])]
    else:
        window = {"start": str(since), "end": str(time.time()), "step": "1"}
        data = await prometheus.get("query_range", query=target["expr"], **window)
        values = [value for series in data["result"] for value in series["values"]]
    return any(math.isfinite(float(value)) for _, value in values)


@pytest.mark.parametrize("file", NAMING)
def test_named_metrics_are_documented(file: str) -> None:
    name = re.compile(r"\bpostrider_[a-z_]+\b")
    documented = set(name.findall((ROOT / "docs/operate/metrics.md").read_text()))
    named = set(name.findall((ROOT / file).read_text()))

    assert named
    histograms = {metric: re.sub(r"_(bucket|count|sum)$", "", metric) for metric in named}
    assert [it for it in named if not {it, histograms[it]} & documented] == []


def test_grafana_loads_the_dashboard_and_its_source() -> None:
    folder = ROOT / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((folder / "datasources/prometheus.yaml").read_text())["datasources"]
    [provider] = yaml.safe_load((folder / "dashboards/postrider.yaml").read_text())["providers"]
    scraping = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())

    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
    assert provider["type"] == "file"
    assert provider["options"]["path"].startswith("/")


@pytest.mark.slow
@needs_prometheus
async def test_every_query_of_dashboard_and_alerts_is_answered(
    database_url: str, ca_file: Path, tmp_path: Path, receiver: Receiver
) -> None:
    since = time.time()
    async with monitored_stack(database_url, ca_file, tmp_path, receiver) as stack:
        prometheus = stack.prometheus
        async with traffic(stack.platform):
            await receiver.wait_for(100)
            await stopped_is_inactive(stack)
            # A rate needs four scrapes, and some series are read every 5 s.
            await prometheus.scrapes.further(12)
            empty = {
                (title, target["expr"])
                for title, target in queries()
                if not await has_data(prometheus, target, since)
            }
        assert {
            panel for panel in empty if not any(name in panel[1] for name in MAY_BE_EMPTY)
        } == set()
        await assert_dashboard_shows_the_traffic(stack)
        await assert_rules_evaluate(prometheus)
        await assert_stopped_engines_raise_alerts(stack)


async def assert_dashboard_shows_the_traffic(stack: MonitoredStack) -> None:
    figures = {
        (title, target["legendFormat"]): {
            tuple(sorted(series["metric"].items())): float(series["value"][1])
            for series in await stack.prometheus.instant(target["expr"])
        }
        for title, target in queries()
    }

    def of(panel: str, legend: str = "") -> list[float]:
        return list(figures[panel, legend].values())

    assert of("Engines") == [ENGINES]
    assert of("Servers") == [1]
    assert of("Deactivated webhooks") == [1]
    [delivered] = of("Delivered")
    assert 0 < delivered < 1


async def assert_rules_evaluate(prometheus: Prometheus) -> None:
    """Each rule evaluates, and each of its selectors matches a series."""
    groups = (await prometheus.get("rules"))["groups"]
    assert [rule for group in groups for rule in group["rules"] if rule["health"] != "ok"] == []
    selectors = set(
        re.findall(
            r"\b(?:postrider_\w+|up)(?:\{[^}]*\})?",
            "".join(rule["query"] for group in groups for rule in group["rules"]),
        )
    )
    missing = {selector for selector in selectors if not await prometheus.instant(selector)}
    assert missing <= MAY_BE_EMPTY


async def assert_stopped_engines_raise_alerts(stack: MonitoredStack) -> None:
    """The alerts become pending. Firing would take minutes."""
    gone = {"PostriderNoEngine", "PostriderProcessDown"}
    assert not gone & await active_alerts(stack.prometheus)

    stack.engines.send(signal.SIGTERM)
    await stack.engines.exit_code()
    await stack.prometheus.scrapes.further(4)

    assert gone <= await active_alerts(stack.prometheus)


async def active_alerts(prometheus: Prometheus) -> set[str]:
    """Firing and pending alerts."""
    return {alert["labels"]["alertname"] for alert in (await prometheus.get("alerts"))["alerts"]}
