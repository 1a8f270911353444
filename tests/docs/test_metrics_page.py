"""docs/operate/metrics.md says of each metric what the code does, and the code has no others."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cli.metrics import families
from cli.metrics.families import Family
from tests.support.paths import ROOT

PAGE = (ROOT / "docs/operate/metrics.md").read_text()
_ROW = re.compile(
    r"^\| `(postrider_\w+)` \| (\w+) \|([^|]*)\| ([^|]+) \| (.+) \| [^|`]+\? `(.+)` \|$",
    re.MULTILINE,
)
ROWS = {row[0]: row for row in _ROW.findall(PAGE)}
FAMILIES = {family.name: family for family in vars(families).values() if isinstance(family, Family)}


def test_every_metric_has_a_row_and_every_row_a_metric() -> None:
    assert len(ROWS) == len(re.findall(r"^\| `postrider_", PAGE, re.MULTILINE))
    assert set(ROWS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_row_has_type_labels_and_a_query_of_its_metric(family: Family) -> None:
    _, kind, labels, _, _, query = ROWS[family.name]

    assert kind == family.kind
    assert tuple(re.findall(r"`(\w+)`", labels)) == family.labels
    assert family.name in query
    assert family.name.endswith("_total") == (kind == "counter")


def test_every_query_can_be_asked(tmp_path: Path) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [
        {"record": f"asked:{name}", "expr": row[-1].replace("\\|", "|")}
        for name, row in ROWS.items()
    ]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]}))

    checked = subprocess.run(
        [promtool, "check", "rules", file], capture_output=True, text=True, check=False
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
