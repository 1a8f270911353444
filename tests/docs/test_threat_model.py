"""docs/design/threat-model.md names a test for each of its rows."""

import re

from tests.support.paths import ROOT

PAGE = (ROOT / "docs/design/threat-model.md").read_text()
NAMED = re.findall(r"`([a-z0-9_/]+)::(test_[a-z0-9_]+)`", PAGE)


def test_threat_model_names_existing_tests() -> None:
    tests = ROOT / "tests"
    files = {str(p.relative_to(tests))[:-3]: p.read_text() for p in tests.rglob("test_*.py")}
    missing = [
        f"{file}::{test}"
        for file, test in NAMED
        if not re.search(rf"^(?:async )?def {test}\(", files.get(file, ""), re.MULTILINE)
    ]
    assert missing == []
    assert len(NAMED) > 90


def test_threat_model_rows_have_a_test_or_are_not_done() -> None:
    rows = re.findall(r"^\| (?!rule|#|who)(?!-)(.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 50
    assert [row for row in rows if "::" not in row and not row.startswith("**Not done**")] == []
