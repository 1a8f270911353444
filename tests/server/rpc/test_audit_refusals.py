"""Refused changes of a known caller are audited; calls without a valid token are only logged."""

import asyncio
from collections import Counter
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from postrider.v1.event_pb2 import EventInput
from postrider.v1.webhook_config_pb2 import EventType, WebhookConfig
from server.rpc import audit_refusals
from tests.support.factories import count_rows, locked, until_blocked
from tests.support.platform import Calls, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refusal_of, refused

UNKNOWN_ID = "wh_00000000000000000000000000"


async def refused_entries(pool: Any) -> list[dict[str, Any]]:
    rows = await pool.fetch("SELECT * FROM audit_entries WHERE result <> 'OK' ORDER BY id")
    return [dict(row) for row in rows]


async def until_recorded(pool: Any) -> None:
    async with asyncio.timeout(10):
        while not await refused_entries(pool):
            pass


async def test_entry_names_the_caller_the_action_and_the_reason(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    me, op, foreign = platform.as_merchant(), platform.as_operator(), platform.as_merchant("m_2")

    def update(calls: Calls, path: str) -> Any:
        changed = WebhookConfig(id=config.id, description="new", etag="stale")
        mask = FieldMask(paths=[path])
        return calls.UpdateWebhookConfig(webhook_config=changed, update_mask=mask)

    cases = (
        (me.CreateWebhookConfig(), "m_1", "CreateWebhookConfig", "", "URL_NOT_HTTPS"),
        (update(me, "description"), "m_1", "UpdateWebhookConfig", config.id, "ETAG_MISMATCH"),
        (update(me, "secret"), "m_1", "UpdateWebhookConfig", config.id, "MASK_FIELD_UNKNOWN"),
        (
            update(foreign, "description"),
            *("m_2", "UpdateWebhookConfig", config.id, "WEBHOOK_CONFIG_NOT_FOUND"),
        ),
        (
            foreign.DeleteWebhookConfig(id=config.id),
            *("m_2", "DeleteWebhookConfig", config.id, "WEBHOOK_CONFIG_NOT_FOUND"),
        ),
        (op.RotateSecret(id=config.id), None, "RotateSecret", config.id, "SCOPE_MISSING"),
        (
            op.CreateEventType(event_type=EventType(name="payment.failed")),
            *(None, "CreateEventType", "payment.failed", "EVENT_TYPE_EXISTS"),
        ),
        (me.EraseMerchant(merchant_id="m_1"), "m_1", "EraseMerchant", "m_1", "SCOPE_MISSING"),
    )
    for call, *_ in cases:
        await refusal_of(call)

    # gRPC runs the calls concurrently, so the order of the entries varies.
    assert Counter(
        (entry["merchant_id"], entry["action"], entry["resource"], entry["result"])
        for entry in await refused_entries(pool)
    ) == Counter(tuple(expected) for _, *expected in cases)


async def test_operators_list_refusals_with_address_and_agent(platform: Platform) -> None:
    calls = platform.calls([*platform.merchant(), ("x-request-id", "request-of-the-test")])
    await refusal_of(calls.DeleteWebhookConfig(id=UNKNOWN_ID))
    answer = await platform.as_operator().ListAuditEntries(resource=UNKNOWN_ID)
    [entry] = answer.audit_entries
    assert (entry.actor, entry.result) == ("tester", "WEBHOOK_CONFIG_NOT_FOUND")
    assert entry.request_id == "request-of-the-test"
    assert entry.caller_address.startswith("127.0.0.1:")
    assert entry.user_agent.startswith("grpc-python-asyncio/")
    assert not entry.changed_fields


async def test_refused_reads_are_audited_only_without_permission(
    platform: Platform, pool: Any
) -> None:
    event = EventInput(merchant_id="m_2", type="payment.succeeded", payload=b"{}")
    publisher = platform.calls(bearer(platform.token("events:publish", merchant_id="m_1")))
    for call in (
        publisher.PublishEvent(event=event),
        platform.as_merchant().ListAuditEntries(),
        platform.as_merchant().GetWebhookConfig(id=UNKNOWN_ID),
        platform.publish("not JSON"),
    ):
        await refusal_of(call)
    stream = platform.events.StreamEvents(metadata=platform.merchant())
    assert await stream.code() is StatusCode.PERMISSION_DENIED

    recorded = [(e["action"], e["resource"], e["result"]) for e in await refused_entries(pool)]
    assert sorted(recorded) == [
        ("ListAuditEntries", "", "SCOPE_MISSING"),
        ("PublishEvent", "m_2", "MERCHANT_MISMATCH"),
        ("StreamEvents", "", "SCOPE_MISSING"),
    ]


async def test_call_without_valid_token_is_only_logged(
    platform: Platform, pool: Any, logged: list[Any]
) -> None:
    for metadata in ([], bearer("junk"), bearer(platform.token(issuer="https://else"))):
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
            await platform.calls(metadata).DeleteWebhookConfig(id=UNKNOWN_ID)
    assert await count_rows(pool, "audit_entries") == 0
    lines = [entry for entry in logged if entry.get("code") == "UNAUTHENTICATED"]
    assert len(lines) == 3
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in lines)


async def test_entries_per_caller_are_rate_limited(platform: Platform, pool: Any) -> None:
    for _ in range(audit_refusals.BURST + 20):
        await refusal_of(platform.as_merchant().EraseMerchant(merchant_id="m_1"))
    await refusal_of(platform.as_merchant("m_2").EraseMerchant(merchant_id="m_1"))
    counts = await pool.fetch(
        "SELECT merchant_id, count(*) FROM audit_entries GROUP BY 1 ORDER BY 1"
    )
    # Slow calls may get a few entries more, because the limit refills.
    assert audit_refusals.BURST <= counts[0]["count"] <= audit_refusals.BURST + 3
    assert dict(counts[1]) == {"merchant_id": "m_2", "count": 1}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("wh_\x00", "wh_\\x00"),
        ("a\nforged=line", "a\\nforged=line"),
        ("x" * 100_000, "x" * 256),
        ("\u202e" * 300, ("\\u202e" * 256)[:256]),
        ("wh_Zoë", "wh_Zoë"),
    ],
    ids=["NUL", "newline", "long", "long and not printable", "printable"],
)
async def test_resource_is_stored_as_one_bounded_line(
    platform: Platform, pool: Any, given: str, kept: str
) -> None:
    await refusal_of(platform.as_merchant().DeleteWebhookConfig(id=given))
    [entry] = await refused_entries(pool)
    assert entry["resource"] == kept


async def test_refusal_is_sent_even_if_its_entry_fails(
    platform: Platform, pool: Any, logged: list[Any]
) -> None:
    await pool.execute("ALTER TABLE audit_entries ADD CHECK (false) NOT VALID")
    async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
        await platform.as_merchant().EraseMerchant(merchant_id="m_1")
    [lost] = [entry for entry in logged if entry["event"] == "audit_refusal_lost"]
    assert (lost["actor"], lost["action"], lost["resource"]) == ("tester", "EraseMerchant", "m_1")


async def test_refusal_does_not_wait_for_a_slow_database(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_refusals, "WRITE_SECONDS", 0.1)
    denied = refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
    async with locked(pool, "audit_entries"), denied, asyncio.timeout(10):
        await platform.as_merchant().EraseMerchant(merchant_id="m_1")
    await until_recorded(pool)


async def test_refusal_of_a_cancelled_call_is_audited(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_refusals, "WRITE_SECONDS", 20.0)
    async with locked(pool, "audit_entries"):
        call = platform.as_merchant().EraseMerchant(merchant_id="m_1")
        await until_blocked(pool)
        call.cancel()
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
            await call
    await until_recorded(pool)
