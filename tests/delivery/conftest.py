"""Fixtures of the engine's tests."""

from collections.abc import Iterator

import pytest
import structlog

from tests.support.event_log import EventLog


@pytest.fixture
def log() -> Iterator[EventLog]:
    """The log entries of the test. Unlike `logged`, a test can wait for one."""
    log = EventLog()
    processors = structlog.get_config()["processors"]
    saved = list(processors)
    processors[:] = [log]
    yield log
    processors[:] = saved
