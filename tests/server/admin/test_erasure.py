"""EraseMerchant: removes personal data, cancels deliveries and leaves other merchants alone."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web
from grpc import StatusCode

from core.ids import first_id_at, format_id, new_id
from postrider.v1 import admin_service_pb2 as pb
from postrider.v1 import webhook_config_service_pb2
from server.admin import erasure
from server.rpc.audit_refusals import CHANGES
from tests.support.factories import (
    count_rows,
    fail_open_delivery,
    make_delivery,
    make_webhook_config,
)
from tests.support.platform import Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refusal_of, refused

#: Personal data: a name, an address and a reference. `fill` stores them in every column for such.
SECRETS = ("jane-doe", "10.9.8.7", "order-4711")


async def erase(platform: Platform, merchant_id: str = "m_1") -> tuple[int, int]:
    answer = await platform.as_operator().EraseMerchant(merchant_id=merchant_id)
    return answer.deleted_webhook_configs, answer.erased_events


async def everything(pool: Any, merchant_id: str) -> str:
    """All rows of a merchant in every table, as text."""
    found = []
    for table in (
        "webhook_configs",
        "events",
        "idempotency_keys",
        "delivery_queue",
        "finished_deliveries",
        "audit_entries",
    ):
        found += await pool.fetch(
            f"SELECT '{table}', t::text FROM {table} t WHERE merchant_id = $1",  # noqa: S608
            merchant_id,
        )
    found += await pool.fetch(
        "SELECT 'attempts', a::text FROM attempts a JOIN finished_deliveries d"
        " ON d.id = a.delivery_id WHERE d.merchant_id = $1",
        merchant_id,
    )
    return "\n".join(sorted(" ".join(row) for row in found))


async def fill(platform: Platform, receiver: Receiver, pool: Any, merchant_id: str) -> None:
    """Store a delivered and a pending event and a deleted config, with all of SECRETS."""
    gone = await platform.register(receiver.url + "?jane-doe", merchant_id)
    await platform.as_merchant(merchant_id).DeleteWebhookConfig(id=gone.webhook_config.id)
    config = await platform.register(
        receiver.url + "?jane-doe", merchant_id, description="jane-doe's"
    )
    delivered = len(receiver.webhooks)
    async with platform.engine():
        await platform.publish('"order-4711"', merchant_id, idempotency_key="order-4711")
        await receiver.wait_for(delivered + 1)
    await pool.execute(
        "UPDATE attempts SET response_excerpt = 'jane-doe', remote_address = '10.9.8.7'"
    )
    # During a rotation the database holds two secrets.
    await pool.execute(
        'UPDATE webhook_configs SET headers = \'{"x-name": "jane-doe"}\','
        " previous_secret_ciphertext = 'sealed', previous_secret_key_id = 'k1',"
        " previous_secret_expires_at = now() + interval '1 day' WHERE deleted_at IS NULL"
    )
    await platform.as_operator().DeactivateWebhookConfig(
        id=config.webhook_config.id, reason="jane-doe asked"
    )
    await platform.publish('"order-4711"', merchant_id, ordering_key="order-4711")


async def test_erasure_removes_personal_data_and_keeps_outcomes(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await fill(platform, receiver, pool, "m_1")
    await fill(platform, receiver, pool, "m_2")
    before, other = await everything(pool, "m_1"), await everything(pool, "m_2")
    assert all(secret in before for secret in SECRETS)

    assert await erase(platform) == (1, 2)

    after = await everything(pool, "m_1")
    assert not [secret for secret in SECRETS if secret in after]
    assert "delivery_queue" not in after
    assert "idempotency_keys" not in after
    rows = await pool.fetch("SELECT * FROM webhook_configs WHERE merchant_id = 'm_1'")
    assert len(rows) == 2
    for row in rows:
        assert (row["secret_ciphertext"], row["previous_secret_ciphertext"]) == (b"", None)
        assert row["deleted_at"] is not None
    events = await pool.fetch("SELECT * FROM events WHERE merchant_id = 'm_1'")
    erased = [(e["payload"], e["content_type"], e["ordering_key"]) for e in events]
    assert erased == [(b"", "", None)] * 2
    states = await pool.fetch(
        "SELECT state FROM finished_deliveries WHERE merchant_id = 'm_1' ORDER BY id"
    )
    assert [row["state"] for row in states] == ["delivered", "cancelled"]
    last = await pool.fetchrow("SELECT * FROM audit_entries ORDER BY id DESC LIMIT 1")
    assert (last["action"], last["resource"]) == ("EraseMerchant", "m_1")
    assert await everything(pool, "m_2") == other


async def test_repeated_or_unknown_erasure_changes_nothing(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await fill(platform, receiver, pool, "m_1")
    await erase(platform)
    versions = await pool.fetch("SELECT id, version FROM webhook_configs ORDER BY id")
    assert await erase(platform) == (0, 0)
    assert await erase(platform, "m_nobody") == (0, 0)
    assert await pool.fetch("SELECT id, version FROM webhook_configs ORDER BY id") == versions


async def test_erasure_anonymises_the_merchants_audit_entries(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    jane = bearer(platform.token("webhooks:manage", merchant_id="m_1", subject="jane-doe"))
    own = [*jane, ("x-request-id", "jane-doe-request")]
    gone = await platform.register(receiver.url)
    await platform.webhooks.DeleteWebhookConfig(
        webhook_config_service_pb2.DeleteWebhookConfigRequest(id=gone.webhook_config.id),
        metadata=own,
    )
    # Refused calls: a malformed id, an unknown id and a call for operators.
    for name in ("jane-doe@merchant.example", format_id("wh", new_id())):
        request = webhook_config_service_pb2.DeleteWebhookConfigRequest(id=name)
        await refusal_of(platform.webhooks.DeleteWebhookConfig(request, metadata=own))
    forbidden = pb.EraseMerchantRequest(merchant_id="m_1")
    await refusal_of(platform.admin.EraseMerchant(forbidden, metadata=own))
    before = await pool.fetch("SELECT * FROM audit_entries ORDER BY id")
    assert sum(row["actor"] == "jane-doe" for row in before) == 4

    await erase(platform)

    after = await pool.fetch("SELECT * FROM audit_entries ORDER BY id")
    assert not [row for row in after if "jane-doe" in str(dict(row))]
    for row in after[:-1]:
        assert (row["actor"], row["caller_address"], row["user_agent"]) == ("erased", "", "")
    facts = ("id", "merchant_id", "action", "result", "changed_fields", "created_at")
    assert [[row[f] for f in facts] for row in after[:-1]] == [
        [row[f] for f in facts] for row in before
    ]
    named = [row["resource"] for row in before]
    named[named.index("jane-doe@merchant.example")] = "erased"
    assert [row["resource"] for row in after[:-1]] == named
    # The operator's own entry stays complete, also after a second erasure.
    erasing = dict(after[-1])
    assert (erasing["action"], erasing["actor"]) == ("EraseMerchant", "tester")
    assert erasing["caller_address"]
    await erase(platform)
    again = await pool.fetch("SELECT * FROM audit_entries ORDER BY id")
    assert [dict(row) for row in again[:-1]] == [dict(row) for row in after]


async def test_erasure_keeps_operators_redelivery_entries(platform: Platform, pool: Any) -> None:
    now = datetime.now(UTC)
    webhook_id = await make_webhook_config(pool)
    await make_delivery(pool, webhook_id, id=first_id_at(now, timedelta(minutes=-1)))
    await fail_open_delivery(pool)
    answer = await platform.as_operator().RedeliverDeliveries(
        merchant_id="m_1", start_time=now - timedelta(hours=1), end_time=now
    )
    assert answer.redelivered == 1
    before = await pool.fetch("SELECT * FROM audit_entries")

    await erase(platform)

    assert before == await pool.fetch(
        "SELECT * FROM audit_entries WHERE action <> 'EraseMerchant' ORDER BY id"
    )


def test_erasure_knows_every_operator_action() -> None:
    theirs = {method.name for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods}
    # Event types belong to no merchant.
    assert {name for name in theirs & CHANGES if not name.endswith("EventType")} == set(
        erasure._OPERATORS_ACTIONS
    )


async def test_next_erasure_completes_an_interrupted_one(
    platform: Platform, receiver: Receiver, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_CHUNK", 2)
    await platform.register(receiver.url)
    for number in range(5):
        await platform.publish(f"{number}", idempotency_key=f"{number}")
    # Refuses the second chunk of events, as a lost database would.
    await pool.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF OLD.payload = '3' THEN RAISE EXCEPTION 'broken off'; END IF;
            RETURN NEW;
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON events_default
            FOR EACH ROW EXECUTE FUNCTION refuse();
    """)
    async with refused(StatusCode.INTERNAL, "INTERNAL"):
        await erase(platform)
    left = await pool.fetch("SELECT payload FROM events WHERE payload <> '' ORDER BY id")
    assert [row["payload"] for row in left] == [b"2", b"3", b"4"]
    assert await count_rows(pool, "delivery_queue") == 0

    await pool.execute("DROP TRIGGER refuse ON events_default")
    assert await erase(platform) == (0, 3)
    assert await pool.fetchval("SELECT count(*) FROM events WHERE payload <> ''") == 0


async def test_erasure_in_chunks_is_complete(
    platform: Platform, receiver: Receiver, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasure, "_CHUNK", 2)
    for _ in range(2):
        await platform.register(receiver.url)
    for number in range(6):
        await platform.publish(f"{number}", idempotency_key=f"{number}")
    assert await erase(platform) == (2, 6)
    cancelled = "SELECT count(*) FROM finished_deliveries WHERE state = 'cancelled'"
    assert await pool.fetchval(cancelled) == 12
    assert await count_rows(pool, "idempotency_keys") == 0


async def test_attempt_in_flight_is_not_retried_after_erasure(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await platform.register(receiver.url)
    other = await platform.register(receiver.url, "m_2")
    asked, answer = asyncio.Event(), asyncio.Event()

    async def hold(_: web.Request) -> web.Response:
        asked.set()
        await answer.wait()
        return web.Response(status=500, text="order-4711")

    receiver.script.append(hold)
    async with platform.engine(max_retries=3, retry_schedule_seconds="0.01"):
        await platform.publish("1")
        async with asyncio.timeout(20):
            await asked.wait()
        await platform.publish("2")
        await receiver.wait_for(2)
        await erase(platform)
        answer.set()
        # The engine delivers for another merchant until after the time of the retry.
        for number in range(3, 6):
            await platform.publish(f"{number}", "m_2")
        await receiver.wait_for(5)
    mine = [request for request in receiver.webhooks if request.body in {b"1", b"2"}]
    assert len(mine) == 2
    assert other.webhook_config.id in await everything(pool, "m_2")
    assert await count_rows(pool, "delivery_queue") == 0
    assert await pool.fetchval("SELECT count(*) FROM attempts WHERE outcome = 'http_error'") == 0


async def test_erased_merchant_can_start_again(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    await fill(platform, receiver, pool, "m_1")
    await erase(platform)
    delivered = len(receiver.webhooks)
    await platform.register(receiver.url)
    answer = await platform.publish('"new"', idempotency_key="order-4711")
    assert (answer.duplicate, answer.event.delivery_count) == (False, 1)
    async with platform.engine():
        assert (await receiver.wait_for(delivered + 1))[-1].body == b'"new"'


async def test_erasure_refuses_malformed_merchant_id(platform: Platform) -> None:
    for merchant_id in ("", "m 1", "\x00", "x" * 65):
        async with refused(StatusCode.INVALID_ARGUMENT, "MERCHANT_ID_INVALID"):
            await erase(platform, merchant_id)


async def test_erasure_keeps_events_accepted_after_it_began(platform: Platform, pool: Any) -> None:
    for payload in ('"old"', '"new"'):
        await platform.publish(payload, idempotency_key=payload)
    for table, column in (("events", "convert_from(payload, 'UTF8')"), ("idempotency_keys", "key")):
        await pool.execute(
            f"UPDATE {table} SET created_at = now() + interval '1 hour' WHERE {column} = $1",  # noqa: S608
            '"new"',
        )
    assert await erase(platform) == (0, 1)
    assert await pool.fetchval("SELECT payload FROM events WHERE payload <> ''") == b'"new"'
    assert await pool.fetchval("SELECT key FROM idempotency_keys") == '"new"'
