"""ListAuditEntries: newest first, filtered by actor, resource and time."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from core.ids import new_id
from postrider.v1 import admin_service_pb2 as pb
from tests.support.platform import Platform
from tests.support.refused_calls import refused
from tests.support.rpcs import pages


async def record(pool: Any, actor: str = "a", resource: str = "r", **fields: Any) -> datetime:
    """Store an entry. `ago` moves its time and the time in its id into the past."""
    ago: timedelta = fields.pop("ago", timedelta())
    created_at = datetime.now(UTC) - ago
    entry_id = new_id()
    if ago:
        milliseconds = int(created_at.timestamp() * 1000).to_bytes(6)
        entry_id = UUID(bytes=milliseconds + entry_id.bytes[6:])
    await pool.execute(
        "INSERT INTO audit_entries (id, actor, merchant_id, action, resource, result,"
        " changed_fields, request_id, created_at, comment, caller_address, user_agent)"
        " VALUES ($1, $2, $3, 'UpdateWebhookConfig', $4, 'OK', '{url}', 'req', $5, 'why',"
        " '[::1]:4711', 'grpc-test/1')",
        entry_id,
        actor,
        fields.get("merchant_id"),
        resource,
        created_at,
    )
    return created_at


async def entries(platform: Platform, **fields: Any) -> list[pb.AuditEntry]:
    answer = await platform.as_operator().ListAuditEntries(**fields)
    return list(answer.audit_entries)


async def test_audit_entry_has_all_stored_fields(platform: Platform, pool: Any) -> None:
    created_at: Any = await record(pool, "op", "wh_1", merchant_id="m_1")
    assert await entries(platform) == [
        pb.AuditEntry(
            create_time=created_at,
            actor="op",
            action="UpdateWebhookConfig",
            resource="wh_1",
            merchant_id="m_1",
            result="OK",
            changed_fields=["url"],
            comment="why",
            request_id="req",
            caller_address="[::1]:4711",
            user_agent="grpc-test/1",
        )
    ]


async def test_audit_filters_combine(platform: Platform, pool: Any) -> None:
    for actor in "ab":
        for resource in "rs":
            await record(pool, actor, resource)

    async def found(**fields: Any) -> list[str]:
        return [entry.actor + entry.resource for entry in await entries(platform, **fields)]

    assert await found() == ["bs", "br", "as", "ar"]
    assert await found(actor="a") == ["as", "ar"]
    assert await found(resource="s") == ["bs", "as"]
    assert await found(actor="b", resource="s") == ["bs"]
    assert await found(actor="c") == []


async def test_audit_time_range_includes_start_and_excludes_end(
    platform: Platform, pool: Any
) -> None:
    times = [await record(pool, f"{days}", ago=timedelta(days=days)) for days in (9, 6, 3, 0)]

    async def found(**fields: datetime) -> list[str]:
        return [entry.actor for entry in await entries(platform, **fields)]

    assert await found(start_time=times[1]) == ["0", "3", "6"]
    assert await found(end_time=times[2]) == ["6", "9"]
    assert await found(start_time=times[1], end_time=times[3]) == ["3", "6"]
    first, last = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)
    assert await found(start_time=first, end_time=last) == ["0", "3", "6", "9"]
    assert await found(end_time=first) == []
    assert await found(start_time=last) == []


async def test_empty_audit_time_range_is_refused(platform: Platform) -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    for end in (moment, moment - timedelta(seconds=1)):
        async with refused(StatusCode.INVALID_ARGUMENT, "TIME_RANGE_EMPTY") as error:
            await entries(platform, start_time=moment, end_time=end)
        assert error.violations == {"end_time": "TIME_RANGE_EMPTY"}


async def test_audit_time_filter_tolerates_hours_of_clock_skew(
    platform: Platform, pool: Any
) -> None:
    created_at = await record(pool)
    # A server with a slow clock made the id, so the time in it is six hours earlier.
    slow = int((created_at - timedelta(hours=6)).timestamp() * 1000).to_bytes(6).hex()
    await pool.execute(
        "UPDATE audit_entries SET id = ($1 || right(replace(id::text, '-', ''), 20))::uuid", slow
    )
    assert await entries(platform, start_time=created_at)


async def test_audit_page_token_requires_the_same_filters(platform: Platform, pool: Any) -> None:
    for number in range(5):
        await record(pool, "a", f"{number}")
    found = await pages(platform.as_operator().ListAuditEntries, actor="a", page_size=2)
    seen = [[entry.resource for entry in page.audit_entries] for page in found]
    assert seen == [["4", "3"], ["2", "1"], ["0"]]
    async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
        await entries(platform, actor="b", page_token=found[0].next_page_token)


async def test_invalid_audit_filter_is_refused(platform: Platform) -> None:
    for text in ("\x00", "x" * 257):
        for field in ("actor", "resource"):
            async with refused(StatusCode.INVALID_ARGUMENT, "FILTER_INVALID") as error:
                await entries(platform, **{field: text})
            assert list(error.violations) == [field]
    for moment in (Timestamp(seconds=1 << 60), Timestamp(nanos=-1), Timestamp(seconds=-(1 << 60))):
        async with refused(StatusCode.INVALID_ARGUMENT, "TIME_INVALID"):
            await entries(platform, start_time=moment)
