"""The dashboard is one that Grafana takes as it is, and asks only for metrics that there are."""

import re
from collections import Counter
from typing import Any

import orjson
import yaml

from tests.support.paths import ROOT

DASHBOARD = orjson.loads((ROOT / "deploy/grafana/postrider.json").read_bytes())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
METRICS_PAGE = ROOT / "docs/operate/metrics.md"
#: Whatever speaks of metrics by their names.
ASKING = (
    "deploy/grafana/postrider.json",
    "deploy/prometheus/alerts.yml",
    "docs/operate/runbook.md",
)

_NAME = re.compile(r"\bpostrider_[a-z_]+\b")
_OF_A_HISTOGRAM = re.compile(r"_(bucket|count|sum)$")


def test_every_metric_that_is_asked_for_is_documented() -> None:
    documented = set(_NAME.findall(METRICS_PAGE.read_text()))
    for file in ASKING:
        asked = set(_NAME.findall((ROOT / file).read_text()))
        assert asked, file
        unknown = {name for name in asked if _OF_A_HISTOGRAM.sub("", name) not in documented}
        assert unknown - documented == set(), (
            f"{file} asks for what docs/operate/metrics.md does not have"
        )


def test_panels_stand_side_by_side() -> None:
    taken = Counter(
        (row, column)
        for panel in PANELS
        for at in [panel["gridPos"]]
        for row in range(at["y"], at["y"] + at["h"])
        for column in range(at["x"], at["x"] + at["w"])
    )

    assert [place for place, panels in taken.items() if panels > 1] == []
    assert max(column for _, column in taken) < 24
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_panels_ask_the_source_that_is_chosen_and_explain_themselves() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    for panel in PANELS:
        if panel["type"] == "row":
            continue
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"] == chosen, panel["title"]
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(
            panel["targets"]
        )
        for target in panel["targets"]:
            used = set(re.findall(r"\$(?!__)(\w+)", target["expr"]))
            assert used <= variables.keys(), panel["title"]


def test_grafana_finds_the_dashboard_and_its_source() -> None:
    provisioning = ROOT / "deploy/grafana/provisioning"
    [source] = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())[
        "datasources"
    ]
    [provider] = yaml.safe_load((provisioning / "dashboards/postrider.yaml").read_text())[
        "providers"
    ]
    scraping = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())

    assert source["type"] == "prometheus"
    assert source["jsonData"]["timeInterval"] == scraping["global"]["scrape_interval"]
    assert provider["type"] == "file"
    assert provider["options"]["path"].startswith("/")
