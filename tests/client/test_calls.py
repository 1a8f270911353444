"""Tokens, deadlines and repeats of calls, on a real gRPC server."""

import asyncio
from time import monotonic
from typing import Any

import pytest
from grpc import StatusCode

from postrider.v1 import event_service_pb2
from postrider.v1.webhook_config_service_pb2 import CreateWebhookConfigRequest
from postrider.v1.webhook_config_service_pb2_grpc import (
    WebhookConfigServiceServicer,
    add_WebhookConfigServiceServicer_to_server,
)
from postrider_client import CallPolicy, PostriderClient, Token, TokenUnavailable
from tests.client.conftest import QUICK, UNAVAILABLE, client_of, event, token
from tests.support.event_service import FakeEventService, Refusal, serving
from tests.support.rpcs import code_of

pb = event_service_pb2


async def test_every_call_has_the_token(client: PostriderClient, service: FakeEventService) -> None:
    await client.publish(event())
    await client.events.GetEvent(pb.GetEventRequest(id="evt_1"))
    assert service.tokens == ["t-1", "t-1"]


async def test_event_without_key_gets_one_for_all_repeats(
    client: PostriderClient, service: FakeEventService
) -> None:
    given = event()
    service.refusals.extend([UNAVAILABLE, UNAVAILABLE])
    published = await client.publish(given)
    assert (published.id, published.duplicate) == ("evt_0", False)
    assert service.calls == ["PublishEvent"] * 3
    assert len(service.stored) == 1
    assert given.idempotency_key == ""


async def test_idempotency_key_of_the_caller_is_kept(
    client: PostriderClient, service: FakeEventService
) -> None:
    request = pb.PublishEventsRequest(events=[event("pay_1"), event(), event("pay_3")])
    await client.events.PublishEvents(request)
    keys = list(service.stored)
    assert keys[0] == "pay_1"
    assert keys[1].startswith("client-")
    assert keys[2] == "pay_3"
    assert (await client.publish(event("pay_1"))).duplicate


async def test_reads_are_repeated_while_unavailable(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.extend([UNAVAILABLE] * 5)
    response = await client.events.GetEvent(pb.GetEventRequest(id="evt_1"))
    assert response.event.id == "evt_1"
    assert len(service.calls) == 6


@pytest.mark.parametrize(
    "code", [StatusCode.INVALID_ARGUMENT, StatusCode.PERMISSION_DENIED, StatusCode.INTERNAL]
)
async def test_permanent_error_is_not_repeated(
    client: PostriderClient, service: FakeEventService, code: StatusCode
) -> None:
    service.refusals.append(Refusal(code))
    assert await code_of(client.publish(event())) is code
    assert len(service.calls) == 1


async def test_repeat_waits_for_the_requested_delay(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.append(Refusal(StatusCode.UNAVAILABLE, retry_seconds=0.3))
    began = monotonic()
    await client.publish(event())
    assert monotonic() - began >= 0.3


async def test_any_error_with_retry_info_is_repeated(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.append(Refusal(StatusCode.RESOURCE_EXHAUSTED, retry_seconds=0.01))
    assert (await client.publish(event())).id == "evt_0"


async def test_deadline_includes_all_repeats(
    client: PostriderClient, service: FakeEventService
) -> None:
    service.refusals.extend([UNAVAILABLE] * 10_000)
    began = monotonic()
    code = await code_of(client.publish(event(), timeout=0.3))
    assert code in {StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED}
    assert monotonic() - began < 5
    assert len(service.calls) > 3


async def test_frozen_server_ends_only_one_attempt(service: FakeEventService) -> None:
    policy = CallPolicy(attempt_seconds=0.2, backoff_seconds=0.001)
    async with client_of(service, policy) as client:
        service.open_gate.clear()
        publishing = asyncio.create_task(client.publish(event()))
        await service.wait_for_calls(2)
        service.open_gate.set()
        await publishing
    assert len(service.stored) == 1


async def test_calls_have_a_default_deadline(service: FakeEventService) -> None:
    async with client_of(service, CallPolicy(deadline_seconds=0.2)) as client:
        service.open_gate.clear()
        for call in (client.publish(event()), client.events.ListEvents(pb.ListEventsRequest())):
            assert await code_of(call) is StatusCode.DEADLINE_EXCEEDED


async def test_changes_are_sent_once() -> None:
    requests: list[Any] = []

    class Configs(WebhookConfigServiceServicer):
        async def CreateWebhookConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
            requests.append(request)
            await context.abort(StatusCode.UNAVAILABLE, "away")

    configs = Configs()  # type: ignore[abstract]
    async with (
        serving(configs, add_WebhookConfigServiceServicer_to_server) as address,
        PostriderClient(address, token, tls=False, policy=QUICK) as client,
    ):
        call = client.webhooks.CreateWebhookConfig(CreateWebhookConfigRequest())
        assert await code_of(call) is StatusCode.UNAVAILABLE
    assert len(requests) == 1


async def test_failing_token_source_is_reported(service: FakeEventService) -> None:
    async def broken() -> Token:
        raise OSError("the identity provider is away")

    async with client_of(service, source=broken) as client:
        with pytest.raises(TokenUnavailable, match="identity provider"):
            await client.publish(event())
    assert service.calls == []


async def test_hanging_token_source_ends_at_the_deadline(service: FakeEventService) -> None:
    async def hanging() -> Token:
        await asyncio.Event().wait()
        raise AssertionError

    async with client_of(service, source=hanging) as client:
        with pytest.raises(TokenUnavailable, match="deadline"):
            await client.publish(event(), timeout=0.1)
