"""The alerts we ship: promtool judges and tries them, and each has its section in the runbook."""

import re
import shutil
import subprocess
from collections import defaultdict
from typing import Any

import pytest
import yaml

from tests.support.paths import ROOT

PROMETHEUS = ROOT / "deploy/prometheus"
RUNBOOK = ROOT / "docs/operate/runbook.md"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None,
    reason="promtool is not installed (Debian: apt-get install prometheus)",
)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_configuration_and_its_rules() -> None:
    # Lint, too, which finds an alert that is there twice.
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "alerts.yml")


@needs_promtool
def test_each_alert_fires_when_it_should() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_each_alert_is_tried_both_ways() -> None:
    tried: dict[str, set[bool]] = defaultdict(set)
    for test in yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]:
        for case in test["alert_rule_test"]:
            tried[case["alertname"]].add(bool(case.get("exp_alerts")))

    assert tried == {rule["alert"]: {True, False} for rule in rules()}


def test_each_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning"}, rule
        assert rule["for"], rule
        annotations = rule["annotations"]
        assert annotations.keys() == {"summary", "runbook_url"}, rule
        assert re.search(r"\d|\$value", annotations["summary"]), rule
        assert annotations["runbook_url"] == f"docs/operate/runbook.md#{rule['alert'].lower()}"


def test_runbook_has_one_section_per_alert() -> None:
    [alerts] = re.findall(
        r"^## Alerts$(.*?)(?=^## |\Z)", RUNBOOK.read_text(), re.MULTILINE | re.DOTALL
    )

    sections = re.findall(r"^### (.+)$", alerts, re.MULTILINE)

    assert sections == list(dict.fromkeys(rule["alert"] for rule in rules()))
