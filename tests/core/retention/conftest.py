"""Fixtures of the retention tests."""

import pytest


@pytest.fixture(autouse=True)
def _check_invariants_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine runs, so a second look later would find the same."""
    monkeypatch.setattr("core.queue.invariants._SECOND_LOOK_SECONDS", 0)
