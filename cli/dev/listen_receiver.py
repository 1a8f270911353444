"""The receiver of `postrider listen`: verifies, shows and answers webhooks."""

import asyncio
import base64
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from aiohttp import web

from cli.dev.forward import Forward
from cli.dev.printable import payload_lines, printable
from cli.receiver import MAX_BODY_BYTES
from core.errors import ConfigurationError
from core.signing import ID_HEADER
from postrider_client import Inspection, VerificationKey, inspect_webhook

#: Events whose arrivals are counted.
_COUNTED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Answers:
    """The responses unless requests are forwarded. Pings get 200 at once."""

    status: int = 200
    after_seconds: float = 0.0
    #: This many requests of each event get 503 first.
    fail_first: int = 0


class ListenerKeys:
    """The secrets of the options, and those of a file that may appear and change."""

    def __init__(self, secrets: Sequence[str], file: Path | None):
        self._given = [_key(secret) for secret in secrets]
        self._file = file

    def current(self) -> list[VerificationKey]:
        if self._file is None or not self._file.exists():
            return self._given
        try:
            texts = self._file.read_text().split()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{self._file} cannot be read: {error}") from error
        return [*self._given, *(_key(text) for text in texts)]


@dataclass(slots=True)
class _Seen:
    times: int = 0
    accepted: bool = False


class Listener:
    """Handles requests. Sets `done` after `count` webhooks."""

    def __init__(
        self,
        keys: ListenerKeys,
        answers: Answers,
        forward: Forward | None,
        write: Callable[[str], None],
        *,
        as_json: bool,
        count: int | None,
    ):
        self._keys = keys
        self._answers = answers
        self._forward = forward
        self._write = write
        self._as_json = as_json
        self._count = count
        self._seen: OrderedDict[str, _Seen] = OrderedDict()
        self.webhooks = self.pings = self.invalid = self.duplicates = 0
        self.done = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            self._write(f"a body above {MAX_BODY_BYTES:,} bytes was refused with 413")
            raise
        try:
            keys = self._keys.current()
        except ConfigurationError as error:
            self._write(f"nothing is verified: {error.message}")
            keys = []
        inspection = inspect_webhook(keys, request.headers, body, now=time.time()) if keys else None
        invalid = inspection is not None and not inspection.valid
        seen = self._seen_before(request.headers.get(ID_HEADER, ""), counts=not invalid)
        is_ping = request.headers.get("X-Webhook-Event") == "webhook.ping"
        duplicate = seen.accepted and not is_ping
        response, note = await self._answer(request, body, seen, plain=is_ping, invalid=invalid)
        seen.accepted |= 200 <= response.status < 300 and not invalid
        self.pings += is_ping
        self.webhooks += not is_ping
        self.invalid += invalid and not is_ping
        self.duplicates += duplicate
        show = self._show_json if self._as_json else self._show
        times = seen.times if duplicate else 0
        show(request, body, inspection, times=times, status=response.status, note=note)
        if self._count is not None and self.webhooks >= self._count:
            # Later, so that the response is sent first.
            asyncio.get_running_loop().call_later(0.1, self.done.set)
        return response

    def summary(self) -> str:
        return (
            f"{self.webhooks} webhooks, {self.invalid} of them invalid, "
            f"{self.duplicates} duplicates; {self.pings} pings"
        )

    def _seen_before(self, message_id: str, *, counts: bool) -> _Seen:
        if not message_id or not counts:
            # An invalid webhook must not affect the counts.
            return _Seen(1)
        seen = self._seen.setdefault(message_id, _Seen())
        self._seen.move_to_end(message_id)
        seen.times += 1
        if len(self._seen) > _COUNTED_MAX:
            self._seen.popitem(last=False)
        return seen

    async def _answer(
        self, request: web.Request, body: bytes, seen: _Seen, *, plain: bool, invalid: bool
    ) -> tuple[web.Response, str]:
        if self._forward is not None:
            forwarded = await self._forward(request, body)
            return forwarded.response, forwarded.reason or "forwarded"
        if plain:
            return web.Response(), ""
        await asyncio.sleep(self._answers.after_seconds)
        if invalid:
            return web.Response(status=401), ""
        if seen.times <= self._answers.fail_first:
            return web.Response(status=503), "on purpose"
        return web.Response(status=self._answers.status), ""

    def _show(
        self,
        request: web.Request,
        body: bytes,
        inspection: Inspection | None,
        *,
        times: int,
        status: int,
        note: str,
    ) -> None:
        event_type = printable(request.headers.get("X-Webhook-Event", "(no type)"))
        message_id = printable(request.headers.get(ID_HEADER, "(no id)"))
        attempt = printable(request.headers.get("X-Webhook-Attempt", "1"))
        tail = f" ({printable(note)})" if note else ""
        self._write(
            f"{time.strftime('%H:%M:%S')}  {event_type[:100]}  {message_id[:100]}  "
            f"attempt {attempt[:10]}  {_verdict(inspection)}  answered {status}{tail}"
        )
        if times:
            self._write(f"  DUPLICATE: it arrived {times} times; drop it by its webhook-id")
        for line in payload_lines(body):
            self._write(f"  {line}")

    def _show_json(
        self,
        request: web.Request,
        body: bytes,
        inspection: Inspection | None,
        *,
        times: int,
        status: int,
        note: str,
    ) -> None:
        shown: dict[str, Any] = {
            "time": time.time(),
            "type": request.headers.get("X-Webhook-Event", ""),
            "id": request.headers.get(ID_HEADER, ""),
            "attempt": request.headers.get("X-Webhook-Attempt", ""),
            "delivery": request.headers.get("X-Webhook-Delivery", ""),
            "valid": None if inspection is None else inspection.valid,
            "reason": inspection.failed.error if inspection and inspection.failed else "",
            "signatures": [
                {"header": check.header, "valid": not check.error, "secret": check.key}
                for check in (inspection.checks if inspection else ())
            ],
            "duplicate": bool(times),
            "status": status,
            "note": note,
            "path": request.path_qs,
        }
        try:
            line = json.dumps(shown | {"payload": json.loads(body)}, allow_nan=False)
        except (ValueError, RecursionError):
            line = json.dumps(shown | {"body_base64": base64.b64encode(body).decode()})
        self._write(line)


def _key(text: str) -> VerificationKey:
    try:
        return VerificationKey.parse(text)
    except ValueError as error:
        raise ConfigurationError(f"a secret cannot be used: {error}") from None


def _verdict(inspection: Inspection | None) -> str:
    if inspection is None:
        return "not verified (no secret given)"
    if (wrong := inspection.failed) is None:
        keys = sorted({check.key + 1 for check in inspection.checks if check.key is not None})
        return click.style(f"VALID (secret {', '.join(map(str, keys))})", fg="green")
    header = f"{printable(wrong.header)}: " if wrong.header else ""
    return click.style(f"INVALID ({header}{printable(wrong.error)})", fg="red")
