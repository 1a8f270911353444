"""A client connected to a fake EventService that a test can make fail."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from grpc import StatusCode

from postrider.v1.event_pb2 import EventInput
from postrider_client import CallPolicy, PostriderClient, Token, TokenSource
from tests.support.event_service import FakeEventService, Refusal, serving

#: Short backoff with the default deadlines.
QUICK = CallPolicy(backoff_seconds=0.001, backoff_max_seconds=0.01)
UNAVAILABLE = Refusal(StatusCode.UNAVAILABLE)


def event(key: str = "", **fields: Any) -> EventInput:
    fields = {"merchant_id": "m_1", "type": "payment.succeeded", "payload": b"{}", **fields}
    return EventInput(idempotency_key=key, **fields)


async def token() -> Token:
    return Token("t-1")


@pytest.fixture
async def service() -> FakeEventService:
    return FakeEventService()


@asynccontextmanager
async def client_of(
    service: Any, policy: CallPolicy = QUICK, source: TokenSource = token
) -> AsyncIterator[PostriderClient]:
    """Serve the fake service and connect a client to it."""
    async with (
        serving(service) as address,
        PostriderClient(address, source, tls=False, policy=policy) as client,
    ):
        yield client


@pytest.fixture
async def client(service: FakeEventService) -> AsyncIterator[PostriderClient]:
    async with client_of(service) as client:
        yield client
