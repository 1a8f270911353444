"""Fixtures for the tests of deliveries."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
import trustme

from delivery.http.client import WebhookClient, open_client
from tests.support.attempts import LOOPBACK_ALLOWED, Start
from tests.support.event_log import EventLog
from tests.support.raw_receiver import (
    Behaviour,
    RawReceiver,
    receiving_raw,
    server_tls,
)


@pytest.fixture
def log() -> Iterator[EventLog]:
    """The log entries of the test. Unlike `logged`, a test can wait for one."""
    log = EventLog()
    processors = structlog.get_config()["processors"]
    saved = list(processors)
    processors[:] = [log]
    yield log
    processors[:] = saved


@pytest.fixture
async def client(ca_file: Path) -> AsyncIterator[WebhookClient]:
    async with open_client(policy=LOOPBACK_ALLOWED, ca_file=ca_file) as client:
        yield client


@pytest.fixture
def start(authority: trustme.CA) -> Start:
    """Starts a raw receiver: `async with start(behaviour, …) as receiver`."""

    @asynccontextmanager
    async def start(*script: Behaviour) -> AsyncIterator[RawReceiver]:
        tls = server_tls(authority.issue_cert("127.0.0.1"))
        async with receiving_raw(RawReceiver(*script), tls) as receiver:
            yield receiver

    return start
