"""What the runbook's Scale reckons with, against what was measured and what the manifests say."""

import json
import re
from typing import Any

import pytest

from tests.support.deployment import DEPLOY, SETTINGS, documents
from tests.support.paths import ROOT

SCALE = (
    (ROOT / "docs/operate/runbook.md").read_text().partition("## Scale")[2].partition("\n## ")[0]
)
END_TO_END: dict[str, Any] = json.loads(
    (ROOT / "docs/design/performance/endtoend.json").read_text()
)


@pytest.mark.parametrize(
    ("row", "process"),
    [("a server's core", "server"), ("an engine's core", "engine"), ("PostgreSQL's", "postgres")],
)
def test_the_costs_are_those_that_were_measured(row: str, process: str) -> None:
    [line] = [line for line in SCALE.splitlines() if line.startswith(f"| {row}")]
    told = [float(text) * 1000 for text in re.findall(r"([\d.]+) ms", line)]
    measured = [END_TO_END["cpu_us"][way][process] for way in ("batch", "unary")]
    # To one digit, and machines differ.
    assert all(cost / 2 <= figure <= cost * 2 for figure, cost in zip(told, measured, strict=True))


def test_the_connections_are_those_of_the_manifests_at_their_most() -> None:
    most = {}
    for name in ("server", "delivery"):
        found = documents(DEPLOY / f"kubernetes/{name}.yaml")
        [scaler] = [it for it in found if it["kind"] == "HorizontalPodAutoscaler"]
        most[name] = scaler["spec"]["maxReplicas"]
    pool = int(SETTINGS["WEBHOOK_DATABASE_POOL_SIZE"])
    connections = most["server"] * (pool + 1) + most["delivery"] * pool + 10
    [told] = re.findall(r"(\d+) servers and (\d+) engines, are (\d+)", SCALE)
    assert tuple(map(int, told)) == (most["server"], most["delivery"], connections)
