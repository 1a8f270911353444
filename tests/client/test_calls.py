"""Tokens, deadlines and repeats of the client's calls, on a real gRPC server."""

import asyncio
from time import monotonic
from typing import Any

import grpc
import pytest
from grpc import StatusCode

from postrider.v1 import event_service_pb2, webhook_config_service_pb2
from postrider.v1.event_pb2 import EventInput
from postrider_client import CallPolicy, PostriderClient, Token, TokenUnavailable
from tests.client.conftest import QUICK, token
from tests.support.event_service import FakeEventService, Refusal, serving

pb = event_service_pb2
AWAY = Refusal(StatusCode.UNAVAILABLE)


def event(key: str = "") -> EventInput:
    return EventInput(
        merchant_id="m_1", type="payment.succeeded", payload=b"{}", idempotency_key=key
    )


async def test_every_call_carries_the_token(
    client: PostriderClient, service: FakeEventService
) -> None:
    await client.publish(event())
    await client.events.GetEvent(pb.GetEventRequest(id="evt_1"))
    assert service.tokens == ["t-1", "t-1"]


async def test_an_event_without_a_key_gets_one_and_keeps_it_through_repeats(
    client: PostriderClient, service: FakeEventService
) -> None:
    given = event()
    service.refusals.extend([AWAY, AWAY])
    published = await client.publish(given)
    assert (published.id, published.duplicate) == ("evt_0", False)
    assert service.calls == ["PublishEvent"] * 3
    assert len(service.stored) == 1
    assert given.idempotency_key == "", "the caller's message is the caller's"


async def test_a_key_that_the_caller_gave_is_kept(
    client: PostriderClient, service: FakeEventService
) -> None:
    request = pb.PublishEventsRequest(events=[event("pay_1"), event(), event("pay_3")])
    await client.events.PublishEvents(request)
    keys = list(service.stored)
    assert keys[0] == "pay_1"
    assert keys[1].startswith("client-")
    assert keys[2] == "pay_3"
    assert (await client.publish(event("pay_1"))).duplicate


async def test_reads_are_repeated_while_the_server_is_away(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.extend([AWAY] * 5)
    response = await client.events.GetEvent(pb.GetEventRequest(id="evt_1"))
    assert response.event.id == "evt_1"
    assert len(service.calls) == 6


async def test_other_refusals_are_not_repeated(
    client: PostriderClient, service: FakeEventService
) -> None:
    for code in (StatusCode.INVALID_ARGUMENT, StatusCode.PERMISSION_DENIED, StatusCode.INTERNAL):
        service.calls.clear()
        service.refusals.append(Refusal(code))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await client.publish(event())
        assert refused.value.code() is code
        assert len(service.calls) == 1


async def test_the_server_is_given_the_time_it_asked_for(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.append(Refusal(StatusCode.UNAVAILABLE, retry_seconds=0.3))
    began = monotonic()
    await client.publish(event())
    assert monotonic() - began >= 0.3


async def test_a_refusal_with_a_delay_is_repeated_whatever_its_code(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.append(Refusal(StatusCode.RESOURCE_EXHAUSTED, retry_seconds=0.01))
    assert (await client.publish(event())).id == "evt_0"


async def test_the_deadline_holds_for_all_repeats_together(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.extend([AWAY] * 10_000)
    began = monotonic()
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await client.publish(event(), timeout=0.3)
    assert refused.value.code() in {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
    assert monotonic() - began < 5
    assert len(service.calls) > 3


async def test_a_frozen_server_costs_one_attempt_and_not_the_deadline(
    service: FakeEventService,
) -> None:
    policy = CallPolicy(attempt_seconds=0.2, backoff_seconds=0.001)
    async with (
        serving(service) as address,
        PostriderClient(address, token, tls=False, policy=policy) as client,
    ):
        service.open_gate.clear()
        publishing = asyncio.create_task(client.publish(event()))
        await service.wait_for_calls(2)
        service.open_gate.set()
        await publishing
    assert len(service.stored) == 1


async def test_calls_have_a_deadline_although_the_caller_gave_none(
    service: FakeEventService,
) -> None:
    policy = CallPolicy(deadline_seconds=0.2)
    async with (
        serving(service) as address,
        PostriderClient(address, token, tls=False, policy=policy) as client,
    ):
        service.open_gate.clear()
        for call in (
            client.publish(event()),
            client.events.ListEvents(pb.ListEventsRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call
            assert refused.value.code() is StatusCode.DEADLINE_EXCEEDED


class CountingConfigs:
    """Answers UNAVAILABLE to a change and counts how often it was asked."""

    def __init__(self) -> None:
        self.count = 0

    async def create(self, _request: bytes, context: Any) -> bytes:
        self.count += 1
        await context.abort(StatusCode.UNAVAILABLE, "away")
        return b""


@pytest.fixture
async def configs() -> CountingConfigs:
    return CountingConfigs()


async def test_changes_are_sent_once_since_they_may_have_been_carried_out(
    configs: CountingConfigs,
) -> None:
    def add(service: CountingConfigs, server: Any) -> None:
        handler: Any = grpc.unary_unary_rpc_method_handler(service.create)
        name = "postrider.v1.WebhookConfigService"
        handlers = {"CreateWebhookConfig": handler}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))

    async with (
        serving(configs, add) as address,
        PostriderClient(address, token, tls=False, policy=QUICK) as client,
    ):
        with pytest.raises(grpc.aio.AioRpcError):
            await client.webhooks.CreateWebhookConfig(
                webhook_config_service_pb2.CreateWebhookConfigRequest()
            )
    assert configs.count == 1


async def test_a_token_source_that_fails_is_told_as_such(service: FakeEventService) -> None:
    async def broken() -> Token:
        raise OSError("the identity provider is away")

    async with (
        serving(service) as address,
        PostriderClient(address, broken, tls=False) as client,
    ):
        with pytest.raises(TokenUnavailable, match="identity provider"):
            await client.publish(event())
    assert service.calls == []


async def test_a_token_source_that_hangs_is_bounded_by_the_deadline(
    service: FakeEventService,
) -> None:
    async def hanging() -> Token:
        await asyncio.Event().wait()
        raise AssertionError

    async with (
        serving(service) as address,
        PostriderClient(address, hanging, tls=False) as client,
    ):
        with pytest.raises(TokenUnavailable, match="deadline"):
            await client.publish(event(), timeout=0.1)
