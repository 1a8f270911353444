"""Attempts record phases, the address, and the beginning of the body."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from core.addresses import AddressPolicy
from core.lifecycle import AttemptResult, Outcome
from delivery.http.client import WebhookClient, open_client
from delivery.http.request import RequestTemplate, header_lines
from delivery.send import EXCERPT_BYTES, excerpt, send
from tests.support.fake_dns import FakeDns
from tests.support.platform import Platform
from tests.support.raw_receiver import RawReceiver, receiving_raw, server_tls
from tests.support.receiver import Receiver

LOOPBACK_ALLOWED = AddressPolicy((ip_network("127.0.0.0/8"),))
SECONDS = 10.0
HEADERS = header_lines({"Content-Type": "a/b"})


def opening(
    ca_file: Path, policy: AddressPolicy = LOOPBACK_ALLOWED, **options: Any
) -> AbstractAsyncContextManager[WebhookClient]:
    return open_client(policy=policy, ca_file=ca_file, **options)


async def post(client: WebhookClient, url: URL | str, seconds: float = SECONDS) -> AttemptResult:
    return await send(client, RequestTemplate(str(url)), HEADERS, b"{}", seconds)


async def test_first_attempt_records_every_phase(receiver: Receiver, ca_file: Path) -> None:
    async with opening(ca_file) as client:
        result = await post(client, receiver.url.replace("127.0.0.1", "localhost"))
    assert result.outcome is Outcome.SUCCEEDED
    assert result.dns_us is not None
    assert result.connect_us is not None
    assert result.first_byte_us is not None
    # A handshake of TLS takes longer than this anywhere.
    assert result.tls_us is not None
    assert 100 < result.tls_us < result.connect_us
    assert result.first_byte_us > 0
    assert result.dns_us + result.connect_us + result.first_byte_us <= result.duration_us
    assert result.remote_address == "127.0.0.1"


async def test_reused_connection_records_its_address_only(
    receiver: Receiver, ca_file: Path
) -> None:
    async with opening(ca_file) as client:
        await post(client, receiver.url)
        result = await post(client, receiver.url)
    assert (result.dns_us, result.connect_us, result.tls_us) == (None, None, None)
    assert result.first_byte_us is not None
    assert 0 < result.first_byte_us <= result.duration_us
    assert result.remote_address == "127.0.0.1"


async def test_a_slow_answer_is_charged_to_the_first_byte_alone(
    receiver: Receiver, ca_file: Path
) -> None:
    async def slow(_: web.Request) -> web.Response:
        await asyncio.sleep(0.3)
        return web.Response()

    receiver.default = slow
    async with opening(ca_file) as client:
        result = await post(client, receiver.url)
    assert result.first_byte_us is not None
    assert result.connect_us is not None
    assert result.first_byte_us >= 290_000
    assert result.connect_us <= result.duration_us - result.first_byte_us


async def test_a_slow_look_up_is_charged_to_dns_alone(receiver: Receiver, ca_file: Path) -> None:
    async def lookup(_: str) -> list[str]:
        await asyncio.sleep(0.2)
        return ["127.0.0.1"]

    async with opening(ca_file, names=FakeDns(lookup)) as client:
        result = await post(client, receiver.url.replace("127.0.0.1", "merchant.example"))
    # Its certificate is for another name, which is found out after both phases.
    assert result.outcome is Outcome.TLS_ERROR
    assert result.dns_us is not None
    assert result.connect_us is not None
    assert result.dns_us >= 200_000
    assert result.connect_us <= result.duration_us - result.dns_us
    assert result.tls_us is not None
    assert result.tls_us < result.connect_us
    assert (result.first_byte_us, result.remote_address) == (None, "127.0.0.1")


async def test_a_name_that_does_not_resolve_was_never_connected(ca_file: Path) -> None:
    def lookup(_: str) -> list[str]:
        return []

    async with opening(ca_file, names=FakeDns(lookup)) as client:
        result = await post(client, "https://merchant.example/")
    assert result.outcome is Outcome.DNS_ERROR
    assert result.dns_us is not None
    assert (result.connect_us, result.first_byte_us, result.remote_address) == (None, None, None)


async def test_a_connection_that_is_refused_had_no_handshake(ca_file: Path) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        async with opening(ca_file) as client:
            result = await post(client, f"https://127.0.0.1:{bound.getsockname()[1]}/")
    assert result.outcome is Outcome.CONNECTION_ERROR
    assert result.connect_us is not None
    assert result.tls_us is None


async def test_the_handshake_is_told_apart_on_the_loop_of_production(
    receiver: Receiver, ca_file: Path
) -> None:
    async def attempt() -> AttemptResult:
        async with opening(ca_file) as client:
            return await post(client, receiver.url)

    result = await asyncio.to_thread(uvloop.run, attempt())
    assert result.connect_us is not None
    assert result.tls_us is not None
    assert 100 < result.tls_us < result.connect_us


async def test_endless_handshake_counts_as_connect_time(
    ca_file: Path,
) -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        gone.set()

    gone = asyncio.Event()

    server = await asyncio.start_server(mute, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with opening(ca_file) as client:
        result = await post(client, f"https://127.0.0.1:{port}/", 0.3)
    await gone.wait()
    server.close()
    assert result.outcome is Outcome.TIMEOUT
    assert result.connect_us is not None
    assert result.tls_us is not None
    assert 200_000 <= result.tls_us < result.connect_us <= result.duration_us
    assert (result.first_byte_us, result.remote_address) == (None, "127.0.0.1")


async def test_a_refused_address_is_not_told(ca_file: Path) -> None:
    for lookup in (lambda _: ["10.1.2.3"], lambda _: ["192.0.2.1", "10.1.2.3"]):
        async with opening(ca_file, AddressPolicy(()), names=FakeDns(lookup)) as client:
            result = await post(client, "https://merchant.example/")
        assert result.outcome is Outcome.REFUSED
        assert (result.connect_us, result.remote_address) == (None, None)


async def test_replacement_of_a_stale_connection_is_recorded(
    authority: trustme.CA, ca_file: Path
) -> None:
    async def answer_then_close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    tls = server_tls(authority.issue_cert("127.0.0.1"))
    script = RawReceiver(answer_then_close, close, answer_then_close)
    async with receiving_raw(script, tls) as raw, opening(ca_file) as client:
        await post(client, raw.url)
        result = await post(client, raw.url)
    assert result.outcome is Outcome.SUCCEEDED
    assert result.connect_us is not None
    assert result.response_excerpt == "ok"


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        (b"", ""),
        (b'{"ok": true}', '{"ok": true}'),
        ("grüß dich — ok".encode(), "grüß dich — ok"),
        (b"a\nb\r\tc\x00d\x1b[31m\x7f", r"a\x0ab\x0d\x09c\x00d\x1b[31m\x7f"),
        ("\x9b31m\x85".encode(), r"\x9b31m\x85"),
        (b"\xff\xfe ok \xc3", r"\xff\xfe ok \xc3"),
        (b"\xed\xa0\x80", r"\xed\xa0\x80"),
        (b"x" * 5000, "x" * EXCERPT_BYTES),
        (b"x" * 1023 + "ü".encode(), "x" * 1023),
    ],
)
async def test_the_excerpt_is_the_beginning_as_text_that_harms_nobody(
    receiver: Receiver, ca_file: Path, body: bytes, shown: str
) -> None:
    receiver.default = web.Response(body=body, status=500)
    async with opening(ca_file) as client:
        result = await post(client, receiver.url)
    assert (result.status_code, result.response_excerpt) == (500, shown)


@given(st.binary(max_size=3000))
def test_any_body_becomes_text_without_control_characters(body: bytes) -> None:
    text = excerpt(body)
    assert len(text) <= 4 * EXCERPT_BYTES
    assert text.encode().decode() == text
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in text)


async def test_body_that_breaks_off_is_recorded_partly(
    authority: trustme.CA, ca_file: Path
) -> None:
    async def break_off(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 503 x\r\nContent-Length: 9000\r\n\r\nsorry, ")
        await writer.drain()
        writer.write(b"no")
        await writer.drain()
        writer.close()

    tls = server_tls(authority.issue_cert("127.0.0.1"))
    async with receiving_raw(RawReceiver(break_off), tls) as raw, opening(ca_file) as client:
        result = await post(client, raw.url)
    assert (result.status_code, result.response_excerpt) == (503, "sorry, no")


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "7"}, 7),
        (503, {"Retry-After": " 0 "}, 0),
        (
            503,
            {
                "Retry-After": "Sun, 06 Nov 1994 08:50:37 GMT",
                "Date": "Sun, 06 Nov 1994 08:49:37 GMT",
            },
            60,
        ),
        (429, {"Retry-After": "soon"}, None),
        (429, {}, None),
        # Those have other values, or none.
        (500, {"Retry-After": "7"}, None),
        (301, {"Retry-After": "7"}, None),
        (200, {"Retry-After": "7"}, None),
    ],
)
async def test_what_a_busy_receiver_asks_for_is_told(
    receiver: Receiver, ca_file: Path, status: int, headers: dict[str, str], seconds: float | None
) -> None:
    receiver.default = web.Response(status=status, headers=headers)
    async with opening(ca_file) as client:
        result = await post(client, receiver.url)
    assert (result.status_code, result.retry_after_seconds) == (status, seconds)


async def test_the_details_are_stored_with_the_attempt(
    platform: Platform, receiver: Receiver, pool: Any, start_receiver: Callable[[], Any]
) -> None:
    async with start_receiver() as other:
        await platform.register(receiver.url)
        await platform.register(other.url.replace("127.0.0.1", "localhost"))
        receiver.default = web.Response(body=b"nul \x00 \xff", status=418)
        async with platform.engine(max_retries=0):
            await platform.publish()
            await receiver.wait_for(1)
            await other.wait_for(1)
    rows = await pool.fetch("SELECT * FROM attempts ORDER BY status_code DESC")
    teapot, fine = (dict(row) for row in rows)
    assert teapot["response_excerpt"] == r"nul \x00 \xff"
    assert fine["response_excerpt"] == ""
    for row in (teapot, fine):
        assert row["remote_address"] == "127.0.0.1"
        phases = [row["dns_us"], row["connect_us"], row["first_byte_us"]]
        assert None not in phases
        assert 0 < sum(phases) <= row["duration_us"]
        assert 0 < row["tls_us"] < row["connect_us"]
