"""The demo of `postrider run` and `postrider demo`: registers a webhook and publishes events."""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from cli.dev.demo_receiver import DemoReceiver
from cli.dev.platform import LocalPlatform
from postrider.v1 import (
    event_pb2,
    event_service_pb2,
    event_service_pb2_grpc,
    webhook_config_pb2,
    webhook_config_service_pb2,
    webhook_config_service_pb2_grpc,
)

EVENT_TYPES = ("payment.created", "payment.succeeded", "refund.created")

_CALL_SECONDS = 30
#: Longer than the default retry schedule with jitter.
_ARRIVAL_SECONDS = 120

pb = webhook_config_service_pb2


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Counts of the receiver. `published` counts the events that gRPC calls acknowledged."""

    published: int
    delivered: int
    retried: int
    verified: int
    duplicates: int
    lost: int
    seconds: float

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class DemoMerchant:
    """One merchant, one webhook, and the platform service that publishes its events."""

    def __init__(self, platform: LocalPlatform, merchant_id: str, receiver: DemoReceiver):
        self._merchant_id = merchant_id
        self._receiver = receiver
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{platform.port}")
        self._channel = channel
        self._webhooks = webhook_config_service_pb2_grpc.WebhookConfigServiceStub(channel)
        self._events = event_service_pb2_grpc.EventServiceStub(channel)
        token = platform.token("webhooks:manage", "events:publish", merchant_id=merchant_id)
        self._metadata = (("authorization", f"Bearer {token}"),)

    async def close(self) -> None:
        await self._channel.close()

    async def register(self) -> str:
        """Create the webhook, give its secret to the receiver, and return its id."""
        config = webhook_config_pb2.WebhookConfig(
            url=self._receiver.url, events=EVENT_TYPES, description="Demo receiver on loopback"
        )
        created = await self._webhooks.CreateWebhookConfig(
            pb.CreateWebhookConfigRequest(webhook_config=config),
            metadata=self._metadata,
            timeout=_CALL_SECONDS,
        )
        self._receiver.secret = created.secret
        return created.webhook_config.id

    async def resume(self, state_file: Path) -> str:
        """Move the webhook of an earlier run to this receiver, or create one. Returns its id."""
        webhook_id = await self._resumed(_read_state(state_file))
        if webhook_id is None:
            webhook_id = await self.register()
            _write_state(state_file, webhook_id, self._receiver.secret)
        return webhook_id

    async def _resumed(self, state: dict[str, str] | None) -> str | None:
        if state is None:
            return None
        config = webhook_config_pb2.WebhookConfig(id=state["webhook_id"], url=self._receiver.url)
        self._receiver.secret = state["secret"]
        try:
            updated = await self._webhooks.UpdateWebhookConfig(
                pb.UpdateWebhookConfigRequest(
                    webhook_config=config, update_mask=FieldMask(paths=["url"])
                ),
                metadata=self._metadata,
                timeout=_CALL_SECONDS,
            )
        except grpc.aio.AioRpcError as error:
            # The earlier run may have used another database.
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise
        return updated.webhook_config.id if updated.webhook_config.active else None

    async def delete(self, webhook_id: str) -> None:
        await self._webhooks.DeleteWebhookConfig(
            pb.DeleteWebhookConfigRequest(id=webhook_id),
            metadata=self._metadata,
            timeout=_CALL_SECONDS,
        )

    async def publish(self, count: int) -> list[str]:
        """Publish the first event alone and the others in batches. Returns the ids."""
        inputs = [self._event(number) for number in range(count)]
        first = await self._events.PublishEvent(
            event_service_pb2.PublishEventRequest(event=inputs[0]),
            metadata=self._metadata,
            timeout=_CALL_SECONDS,
        )
        ids = [first.event.id]
        for start in range(1, count, 1000):
            batch = await self._events.PublishEvents(
                event_service_pb2.PublishEventsRequest(events=inputs[start : start + 1000]),
                metadata=self._metadata,
                timeout=_CALL_SECONDS,
            )
            ids += [result.event.id for result in batch.results if result.event.id]
        return ids

    def _event(self, number: int) -> event_pb2.EventInput:
        payload = {"id": f"pay_{number + 1}", "amount": 1000 + number, "currency": "EUR"}
        return event_pb2.EventInput(
            merchant_id=self._merchant_id,
            type=EVENT_TYPES[number % len(EVENT_TYPES)],
            payload_text=json.dumps(payload),
            idempotency_key=f"demo-{os.urandom(8).hex()}",
        )


async def play(merchant: DemoMerchant, receiver: DemoReceiver, events: int) -> DemoResult:
    """Publish events, refuse the first attempt of one, and count the arrivals."""
    began = perf_counter()
    receiver.refusals_left = 1
    published = await merchant.publish(events)
    with suppress(TimeoutError):
        await receiver.wait_for(set(published), _ARRIVAL_SECONDS)
    return count(receiver, published, perf_counter() - began)


def count(receiver: DemoReceiver, published: Sequence[str], seconds: float) -> DemoResult:
    """Compare the receiver's receipts with the acknowledged ids."""
    expected = set(published)
    delivered = receiver.accepted_ids & expected
    receipts = [r for r in receiver.receipts if r.message_id in expected]
    accepted = [r for r in receipts if r.verified and r.status == 200]
    return DemoResult(
        published=len(published),
        delivered=len(delivered),
        retried=len({r.message_id for r in receipts if r.attempt > 1}),
        verified=sum(r.verified for r in receipts),
        duplicates=len(accepted) - len(delivered),
        lost=len(expected - delivered),
        seconds=round(seconds, 3),
    )


def _read_state(path: Path) -> dict[str, str] | None:
    try:
        state: dict[str, str] = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return state if {"webhook_id", "secret"} <= state.keys() else None


def _write_state(path: Path, webhook_id: str, secret: str) -> None:
    path.touch(mode=0o600)
    path.write_text(json.dumps({"webhook_id": webhook_id, "secret": secret}))
