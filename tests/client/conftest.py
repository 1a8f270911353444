"""A client on a fake EventService, which a test may let fail."""

from collections.abc import AsyncIterator

import pytest

from postrider_client import CallPolicy, PostriderClient, Token
from tests.support.event_service import FakeEventService, serving

#: Short waits; deadlines as in production.
QUICK = CallPolicy(backoff_seconds=0.001, backoff_max_seconds=0.01)


async def token() -> Token:
    return Token("t-1")


@pytest.fixture
async def service() -> FakeEventService:
    return FakeEventService()


@pytest.fixture
async def client(service: FakeEventService) -> AsyncIterator[PostriderClient]:
    async with (
        serving(service) as address,
        PostriderClient(address, token, tls=False, policy=QUICK) as client,
    ):
        yield client
