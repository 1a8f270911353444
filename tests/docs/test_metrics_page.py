"""docs/operate/metrics.md. tests/e2e/test_metrics.py compares its rows with real processes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.metrics_page import PAGE, ROWS


def test_metrics_page_rows_are_complete() -> None:
    assert len(ROWS) == len(re.findall(r"^\| `postrider_", PAGE, re.MULTILINE))
    for name, row in ROWS.items():
        assert name in row.query
        assert name.endswith("_total") == (row.kind == "counter")


def test_metrics_page_queries_are_valid(tmp_path: Path) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    rules = [{"record": f"asked:{name}", "expr": row.query} for name, row in ROWS.items()]
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]}))

    checked = subprocess.run(
        [promtool, "check", "rules", file], capture_output=True, text=True, check=False
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr
