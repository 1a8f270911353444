"""What a known caller was refused is on record, with who, what and why; strangers leave none."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from postrider.v1 import (
    admin_service_pb2,
    event_pb2,
    event_service_pb2,
    webhook_config_service_pb2,
)
from postrider.v1.webhook_config_pb2 import EventType, WebhookConfig
from server.rpc import audit_refusals
from tests.support.platform import Metadata, Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refusal_of, refused

pb = webhook_config_service_pb2
UNKNOWN_ID = "wh_00000000000000000000000000"


async def refused_entries(pool: Any) -> list[dict[str, Any]]:
    rows = await pool.fetch("SELECT * FROM audit_entries WHERE result <> 'OK' ORDER BY id")
    return [dict(row) for row in rows]


def updating(config: WebhookConfig, *paths: str) -> pb.UpdateWebhookConfigRequest:
    return pb.UpdateWebhookConfigRequest(webhook_config=config, update_mask=FieldMask(paths=paths))


async def test_each_refused_change_says_who_what_and_why(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    config = (await platform.register(receiver.url)).webhook_config
    webhooks, admin = platform.webhooks, platform.admin
    me, op, foreign = platform.merchant(), platform.operator(), platform.merchant("m_2")
    changed = WebhookConfig(id=config.id, description="new", etag="stale")
    taken = EventType(name="payment.failed")
    for call in (
        webhooks.CreateWebhookConfig(pb.CreateWebhookConfigRequest(), metadata=me),
        webhooks.UpdateWebhookConfig(updating(changed, "description"), metadata=me),
        webhooks.UpdateWebhookConfig(updating(changed, "secret"), metadata=me),
        webhooks.UpdateWebhookConfig(updating(changed, "description"), metadata=foreign),
        webhooks.DeleteWebhookConfig(pb.DeleteWebhookConfigRequest(id=config.id), metadata=foreign),
        webhooks.RotateSecret(pb.RotateSecretRequest(id=config.id), metadata=op),
        admin.CreateEventType(
            admin_service_pb2.CreateEventTypeRequest(event_type=taken), metadata=op
        ),
        admin.EraseMerchant(admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"), metadata=me),
    ):
        await refusal_of(call)

    # The calls are under way together.
    assert Counter(
        (e["merchant_id"], e["action"], e["resource"], e["result"])
        for e in await refused_entries(pool)
    ) == Counter(
        [
            ("m_1", "CreateWebhookConfig", "", "URL_NOT_HTTPS"),
            ("m_1", "UpdateWebhookConfig", config.id, "ETAG_MISMATCH"),
            ("m_1", "UpdateWebhookConfig", config.id, "MASK_FIELD_UNKNOWN"),
            ("m_2", "UpdateWebhookConfig", config.id, "WEBHOOK_CONFIG_NOT_FOUND"),
            ("m_2", "DeleteWebhookConfig", config.id, "WEBHOOK_CONFIG_NOT_FOUND"),
            (None, "RotateSecret", config.id, "SCOPE_MISSING"),
            (None, "CreateEventType", "payment.failed", "EVENT_TYPE_EXISTS"),
            ("m_1", "EraseMerchant", "m_1", "SCOPE_MISSING"),
        ]
    )


async def test_an_entry_says_where_the_call_came_from_and_operators_see_it(
    platform: Platform, pool: Any
) -> None:
    me: Metadata = [*platform.merchant(), ("x-request-id", "request-of-the-test")]
    await refusal_of(
        platform.webhooks.DeleteWebhookConfig(
            pb.DeleteWebhookConfigRequest(id=UNKNOWN_ID), metadata=me
        )
    )
    answer = await platform.admin.ListAuditEntries(
        admin_service_pb2.ListAuditEntriesRequest(resource=UNKNOWN_ID), metadata=platform.operator()
    )
    [entry] = answer.audit_entries
    assert (entry.actor, entry.result) == ("tester", "WEBHOOK_CONFIG_NOT_FOUND")
    assert entry.request_id == "request-of-the-test"
    assert entry.caller_address.startswith("127.0.0.1:")
    assert entry.user_agent.startswith("grpc-python-asyncio/")
    assert not entry.changed_fields


async def test_what_is_not_permitted_is_on_record_and_other_refusals_of_reads_are_not(
    platform: Platform, pool: Any
) -> None:
    event = event_pb2.EventInput(merchant_id="m_2", type="payment.succeeded", payload=b"{}")
    publisher = bearer(platform.token("events:publish", merchant_id="m_1"))
    calls = (
        platform.events.PublishEvent(
            event_service_pb2.PublishEventRequest(event=event), metadata=publisher
        ),
        platform.admin.ListAuditEntries(
            admin_service_pb2.ListAuditEntriesRequest(), metadata=platform.merchant()
        ),
        platform.webhooks.GetWebhookConfig(
            pb.GetWebhookConfigRequest(id=UNKNOWN_ID), metadata=platform.merchant()
        ),
        platform.publish("not JSON"),
    )
    for call in calls:
        await refusal_of(call)
    stream = platform.events.StreamEvents(metadata=platform.merchant())
    assert await stream.code() is StatusCode.PERMISSION_DENIED

    recorded = await refused_entries(pool)
    assert {(e["action"], e["resource"], e["result"]) for e in recorded} == {
        ("PublishEvent", "m_2", "MERCHANT_MISMATCH"),
        ("ListAuditEntries", "", "SCOPE_MISSING"),
        ("StreamEvents", "", "SCOPE_MISSING"),
    }
    assert len(recorded) == 3


async def test_strangers_leave_a_log_line_and_no_entry(
    platform: Platform, pool: Any, logged: list[Any]
) -> None:
    for metadata in ([], bearer("junk"), bearer(platform.token(issuer="https://else"))):
        async with refused(StatusCode.UNAUTHENTICATED, "TOKEN_INVALID"):
            await platform.webhooks.DeleteWebhookConfig(
                pb.DeleteWebhookConfigRequest(id=UNKNOWN_ID), metadata=metadata
            )
    assert await pool.fetchval("SELECT count(*) FROM audit_entries") == 0
    lines = [entry for entry in logged if entry.get("code") == "UNAUTHENTICATED"]
    assert len(lines) == 3
    assert all(line["peer"].startswith("ipv4:127.0.0.1:") for line in lines)


async def test_a_caller_that_is_refused_again_and_again_cannot_fill_the_table(
    platform: Platform, pool: Any
) -> None:
    async def attempt(metadata: Metadata) -> None:
        request = admin_service_pb2.EraseMerchantRequest(merchant_id="m_1")
        await refusal_of(platform.admin.EraseMerchant(request, metadata=metadata))

    for _ in range(audit_refusals.BURST + 20):
        await attempt(platform.merchant())
    await attempt(platform.merchant("m_2"))
    counts = await pool.fetch(
        "SELECT merchant_id, count(*) FROM audit_entries GROUP BY 1 ORDER BY 1"
    )
    # One more came free if the attempts took longer than usual.
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
async def test_whatever_a_caller_names_is_kept_as_one_bounded_line(
    platform: Platform, pool: Any, given: str, kept: str
) -> None:
    await refusal_of(
        platform.webhooks.DeleteWebhookConfig(
            pb.DeleteWebhookConfigRequest(id=given), metadata=platform.merchant()
        )
    )
    [entry] = await refused_entries(pool)
    assert entry["resource"] == kept


async def test_a_refusal_is_told_also_when_it_cannot_be_written(
    platform: Platform, pool: Any, logged: list[Any]
) -> None:
    await pool.execute("ALTER TABLE audit_entries ADD CHECK (false) NOT VALID")
    async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"):
        await platform.admin.EraseMerchant(
            admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"), metadata=platform.merchant()
        )
    [lost] = [entry for entry in logged if entry["event"] == "audit_refusal_lost"]
    assert (lost["actor"], lost["action"], lost["resource"]) == ("tester", "EraseMerchant", "m_1")


async def test_a_refusal_that_waits_for_the_database_is_told_in_time(
    platform: Platform, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_refusals, "WRITE_SECONDS", 0.1)
    async with pool.acquire() as other, other.transaction():
        await other.execute("LOCK TABLE audit_entries")
        async with refused(StatusCode.PERMISSION_DENIED, "SCOPE_MISSING"), asyncio.timeout(10):
            await platform.admin.EraseMerchant(
                admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"),
                metadata=platform.merchant(),
            )
    # And is written all the same, once the database has time.
    async with asyncio.timeout(10):
        while not await refused_entries(pool):
            pass


async def test_a_caller_that_hangs_up_at_once_is_on_record_all_the_same(
    start_platform: Callable[..., Any], pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_refusals, "WRITE_SECONDS", 20.0)
    async with start_platform() as platform, pool.acquire() as other:
        async with other.transaction():
            await other.execute("LOCK TABLE audit_entries")
            call = platform.admin.EraseMerchant(
                admin_service_pb2.EraseMerchantRequest(merchant_id="m_1"),
                metadata=platform.merchant(),
            )
            async with asyncio.timeout(10):
                while not await other.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"):
                    pass
            call.cancel()
            with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError)):
                await call
        async with asyncio.timeout(10):
            while not await refused_entries(pool):
                pass
