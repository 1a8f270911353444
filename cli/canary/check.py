"""Checks the promises to merchants and producers through the public API.

A canary creates a webhook config at its own receiver, publishes, rotates, pauses and deletes, and
times each step. It always deletes its config. The description contains an expiry, so that the next
canary deletes the config of a killed one.
"""

import asyncio
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from functools import partial

import grpc

from cli.canary.api import CanaryApi
from cli.canary.receiver import CanaryReceiver
from core.errors import PostriderError
from postrider.v1 import delivery_pb2
from postrider_client import VerificationKey

#: Time after the timeout, to find the reason and to delete the config.
REASON_SECONDS, CLEANUP_SECONDS = 5.0, 10.0
#: How long nothing may arrive after a pause and after the deletion.
QUIET_SECONDS = 1.0

_DESCRIPTION = re.compile(r"postrider canary [0-9a-f]{16} until ([0-9]{10})")


class CanaryError(Exception):
    """The service broke a promise."""


@dataclass
class CanaryReport:
    """The result. `steps` has the seconds of each completed step, in order."""

    ok: bool = False
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    webhook_id: str = ""
    steps: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    failed_step: str | None = None
    error: str | None = None
    removed_leftovers: int = 0
    cleaned: bool = True

    def as_json(self) -> str:
        return json.dumps(asdict(self))


class Canary:
    """One check. `report` is filled step by step."""

    def __init__(
        self,
        api: CanaryApi,
        receiver: CanaryReceiver,
        timeout_seconds: float,
        announce: Callable[[str], None],
    ):
        self.report = CanaryReport()
        self._api = api
        self._receiver = receiver
        self._timeout = timeout_seconds
        self._announce = announce
        self._step = "start"
        self._webhook_id = ""
        self._event_id = ""
        self._keys: list[str] = []

    async def run(self, stop: asyncio.Event) -> CanaryReport:
        """Run the steps until one fails, the time is up or `stop` is set. Then clean up."""
        began = time.monotonic()
        task = asyncio.create_task(self._steps())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait(
            {task, stopping}, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED
        )
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            self.report.error = (
                "interrupted"
                if stop.is_set()
                else await self._why(f"the timeout of {self._timeout:g} s is over")
            )
        elif error := task.exception():
            self.report.error = await self._explained(error)
        stopping.cancel()
        self.report.ok = self.report.error is None
        self.report.failed_step = None if self.report.ok else self._step
        await self._clean_up()
        self.report.seconds = round(time.monotonic() - began, 3)
        return self.report

    async def _steps(self) -> None:
        steps: Sequence[tuple[str, Callable[[], Awaitable[None]]]] = (
            ("sweep", self._sweep),
            ("create", self._create),
            ("deliver", partial(self._deliver, "deliver")),
            ("idempotency", self._idempotency),
            ("history", self._history),
            ("rotate", self._rotate),
            ("pause", self._pause),
            ("delete", self._delete),
        )
        for name, step in steps:
            self._step = name
            began = time.monotonic()
            await step()
            self.report.steps[name] = round(time.monotonic() - began, 3)
            self._announce(f"{name}: {self.report.steps[name]:.3f} s")

    async def _sweep(self) -> None:
        for config in await self._api.list_configs():
            found = _DESCRIPTION.fullmatch(config.description)
            if found and int(found[1]) < time.time():
                await self._api.delete(config.id)
                self.report.removed_leftovers += 1

    async def _create(self) -> None:
        until = int(time.time() + self._timeout + REASON_SECONDS + CLEANUP_SECONDS)
        description = f"postrider canary {self.report.run} until {until}"
        # Completed even when cancelled, because the id is needed to delete the config.
        creating = asyncio.create_task(
            self._api.create(self._receiver.url(self.report.run), description)
        )
        try:
            created = await asyncio.shield(creating)
        except asyncio.CancelledError:
            async with asyncio.timeout(CLEANUP_SECONDS):
                self._created((await creating).webhook_config.id)
            raise
        self._created(created.webhook_config.id)
        self._keys = [created.secret]

    def _created(self, webhook_id: str) -> None:
        self._webhook_id = self.report.webhook_id = webhook_id

    async def _deliver(self, name: str) -> None:
        self._event_id = (await self._api.publish(self._key(name))).event.id
        await self._receive()

    async def _receive(self) -> None:
        inspect = await self._receiver.wait_for(self._event_id)
        for secret in self._keys:
            inspection = inspect([VerificationKey.parse(secret)])
            if (failed := inspection.failed) is not None:
                raise CanaryError(f"{failed.header}: {failed.error}")
            if {check.header for check in inspection.checks} != {
                "X-Webhook-Signature",
                "webhook-signature",
            }:
                raise CanaryError("a signature header is missing")

    async def _idempotency(self) -> None:
        first = self._event_id
        again = await self._api.publish(self._key("deliver"))
        if again.event.id != first or not again.duplicate:
            raise CanaryError(f"one idempotency key gave {first} and {again.event.id}")
        found = await self._api.deliveries(self._webhook_id, first)
        if len(found) != 1:
            raise CanaryError(f"{first} was published twice and has {len(found)} deliveries")

    async def _history(self) -> None:
        """Wait until the delivery is settled, shortly after the response."""
        while True:
            [delivery] = await self._api.deliveries(self._webhook_id, self._event_id)
            if delivery.state == delivery_pb2.DELIVERY_STATE_DELIVERED:
                break
            await asyncio.sleep(0.1)
        attempts = (await self._api.delivery(delivery.id)).attempts
        if not attempts or attempts[-1].outcome != delivery_pb2.OUTCOME_SUCCEEDED:
            raise CanaryError(f"{delivery.id} is delivered without an attempt that succeeded")

    async def _rotate(self) -> None:
        self._keys.append((await self._api.rotate(self._webhook_id)).secret)
        await self._deliver("rotate")

    async def _pause(self) -> None:
        await self._api.set_active(self._webhook_id, active=False)
        self._event_id = (await self._api.publish(self._key("pause"))).event.id
        await self._quiet("the paused webhook config")
        await self._api.set_active(self._webhook_id, active=True)
        await self._receive()

    async def _delete(self) -> None:
        await self._api.delete(self._webhook_id)
        self._webhook_id = ""
        self._event_id = (await self._api.publish(self._key("delete"))).event.id
        await self._quiet("the deleted webhook config")

    async def _quiet(self, config: str) -> None:
        await asyncio.sleep(QUIET_SECONDS)
        if self._receiver.has(self._event_id):
            raise CanaryError(f"{self._event_id} arrived for {config}")

    def _key(self, name: str) -> str:
        return f"canary-{self.report.run}-{name}"

    async def _explained(self, error: BaseException) -> str:
        if isinstance(error, grpc.aio.AioRpcError):
            return f"{error.code().name}: {error.details()}"
        if isinstance(error, CanaryError):
            return await self._why(str(error))
        if isinstance(error, PostriderError):
            return error.message
        return f"{type(error).__name__}: {error}"

    async def _why(self, problem: str) -> str:
        """Add the state of the expected delivery to the problem."""
        if not (self._webhook_id and self._event_id):
            return problem
        try:
            async with asyncio.timeout(REASON_SECONDS):
                found = await self._api.deliveries(self._webhook_id, self._event_id)
        except (TimeoutError, grpc.aio.AioRpcError, PostriderError):
            return problem
        for delivery in found:
            state = delivery_pb2.DeliveryState.Name(delivery.state).removeprefix("DELIVERY_STATE_")
            problem += f"; {delivery.id} is {state} after {delivery.attempt_count} attempts"
            if delivery.attempts:
                problem += f", the last: {delivery.attempts[-1].detail}"
            elif state == "READY":
                problem += ": check that an engine runs"
        return problem

    async def _clean_up(self) -> None:
        if not self._webhook_id:
            return
        try:
            async with asyncio.timeout(CLEANUP_SECONDS):
                await self._api.delete(self._webhook_id)
        except (TimeoutError, grpc.aio.AioRpcError, PostriderError) as error:
            self.report.cleaned = False
            self._announce(
                f"{self._webhook_id} remains until the next canary deletes it: {error!r}"
            )


async def check(
    api: CanaryApi,
    receiver: CanaryReceiver,
    timeout_seconds: float,
    announce: Callable[[str], None],
    stop: asyncio.Event,
) -> CanaryReport:
    """Run one canary and its receiver. Raises ConfigurationError if the port is in use."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(receiver.listening())
        stack.push_async_callback(api.close)
        return await Canary(api, receiver, timeout_seconds, announce).run(stop)
