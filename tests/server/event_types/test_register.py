"""Event types of operators: enforced schemas, updates and deprecation."""

import json
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask
from grpc import StatusCode

from postrider.v1.event_pb2 import EventInput
from postrider.v1.webhook_config_pb2 import EventType
from tests.support.platform import Platform
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused

NAME = "payment.succeeded"
SCHEMA = json.dumps(
    {"required": ["amount"], "properties": {"amount": {"type": "integer", "minimum": 1}}}
)


async def update(platform: Platform, name: str = NAME, **fields: Any) -> Any:
    answer = await platform.as_operator().UpdateEventType(
        event_type=EventType(name=name, **fields), update_mask=FieldMask(paths=list(fields))
    )
    return answer.event_type


async def test_event_type_fields_are_stored_and_listed(platform: Platform) -> None:
    wanted = EventType(
        name="invoice.sent",
        description="An invoice left",
        json_schema=SCHEMA,
        enforce_schema=True,
        example='{"amount": 5}',
        deprecated=True,
    )
    made = await platform.as_operator().CreateEventType(event_type=wanted)
    assert made.event_type.HasField("create_time")
    made.event_type.ClearField("create_time")
    assert made.event_type == wanted

    changed = await update(platform, "invoice.sent", description="new", deprecated=False)
    listed = await platform.as_merchant().ListEventTypes()
    assert changed in listed.event_types
    changed.ClearField("create_time")
    wanted.description, wanted.deprecated = "new", False
    assert changed == wanted


async def test_enforced_schema_refuses_payload_by_path_and_rule(
    platform: Platform, pool: Any
) -> None:
    await update(platform, json_schema=SCHEMA)
    await platform.publish('{"amount": 0}')
    await update(platform, enforce_schema=True)

    async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_SCHEMA") as error:
        await platform.publish('{"amount": -987654}')
    assert error.violations == {"event.payload": "PAYLOAD_SCHEMA"}
    assert "$.amount" in error.message
    assert "#/properties/amount/minimum" in error.message
    assert "987654" not in error.message
    async with refused(StatusCode.INVALID_ARGUMENT, "PAYLOAD_SCHEMA") as error:
        await platform.publish('{"amount": 5}', content_type="text/plain")
    assert "not JSON" in error.message
    await platform.publish('{"amount": 5}', content_type="application/cloudevents+json")
    await platform.publish("{}", type="payment.failed")
    await update(platform, json_schema='{"type": "object"}')
    await platform.publish('{"amount": 0}')
    await update(platform, json_schema=SCHEMA, enforce_schema=False)
    await platform.publish('{"amount": 0}')
    assert await pool.fetchval("SELECT count(*) FROM events") == 5


async def test_batch_refuses_only_events_that_break_the_schema(platform: Platform) -> None:
    await update(platform, json_schema=SCHEMA, enforce_schema=True)
    answer = await platform.as_producer().PublishEvents(
        events=[
            EventInput(merchant_id="m_1", type=NAME, payload_text=json.dumps({"amount": n}))
            for n in (1, 0, 2)
        ]
    )
    assert [result.reason for result in answer.results] == ["", "PAYLOAD_SCHEMA", ""]
    assert "events[1].payload" in answer.results[1].message


async def test_schema_example_and_enforcement_must_be_consistent(
    platform: Platform, pool: Any
) -> None:
    refusals: list[tuple[dict[str, Any], str, str]] = [
        ({"json_schema": '{"type": "strin"}'}, "json_schema", "JSON_SCHEMA_INVALID"),
        ({"json_schema": '{"$ref": "http://x.test/"}'}, "json_schema", "JSON_SCHEMA_INVALID"),
        ({"enforce_schema": True}, "enforce_schema", "JSON_SCHEMA_MISSING"),
        ({"example": "{"}, "example", "EXAMPLE_INVALID"),
        ({"example": json.dumps("x" * 262_144)}, "example", "EXAMPLE_INVALID"),
        ({"json_schema": SCHEMA, "example": "{}"}, "example", "EXAMPLE_INVALID"),
        ({"description": "two\nlines"}, "description", "DESCRIPTION_INVALID"),
    ]
    for fields, field, reason in refusals:
        async with refused(StatusCode.INVALID_ARGUMENT, reason) as error:
            await update(platform, **fields)
        assert error.violations == {f"event_type.{field}": reason}
        async with refused(StatusCode.INVALID_ARGUMENT, reason):
            await platform.as_operator().CreateEventType(
                event_type=EventType(name="invoice.sent", **fields)
            )
    assert await pool.fetchval("SELECT count(*) FROM audit_entries WHERE result = 'OK'") == 0


async def test_event_type_update_must_fit_stored_fields(platform: Platform) -> None:
    await update(platform, json_schema=SCHEMA, example='{"amount": 1}', enforce_schema=True)
    async with refused(StatusCode.INVALID_ARGUMENT, "EXAMPLE_INVALID"):
        await update(platform, json_schema='{"type": "array"}')
    async with refused(StatusCode.INVALID_ARGUMENT, "EXAMPLE_INVALID"):
        await update(platform, example='{"amount": 0}')
    async with refused(StatusCode.INVALID_ARGUMENT, "JSON_SCHEMA_MISSING"):
        await update(platform, json_schema="")


async def test_event_type_update_changes_only_masked_fields(platform: Platform, pool: Any) -> None:
    before = await update(platform, description="a", deprecated=True)
    async with refused(StatusCode.INVALID_ARGUMENT, "MASK_EMPTY"):
        await update(platform)
    for path in ("name", "create_time", "event_type.description", "*"):
        async with refused(StatusCode.INVALID_ARGUMENT, "MASK_FIELD_UNKNOWN"):
            await platform.as_operator().UpdateEventType(
                event_type=EventType(name=NAME), update_mask=FieldMask(paths=[path])
            )
    for name in ("no.such", "", "\x00", "x" * 200):
        async with refused(StatusCode.NOT_FOUND, "EVENT_TYPE_NOT_FOUND"):
            await update(platform, name, description="b")
    assert await update(platform, description="a") == before
    entries = await pool.fetch(
        "SELECT action, resource, changed_fields FROM audit_entries WHERE result = 'OK'"
    )
    assert [tuple(entry) for entry in entries] == [
        ("UpdateEventType", NAME, ["deprecated", "description"])
    ]


async def test_deprecated_type_refuses_only_new_subscriptions(
    platform: Platform, receiver: Receiver
) -> None:
    mine = (await platform.register(receiver.url, events=(NAME,))).webhook_config
    other = (await platform.register(receiver.url, events=("payment.failed",))).webhook_config
    await update(platform, deprecated=True)

    async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_DEPRECATED") as error:
        await platform.register(receiver.url, events=("payment.failed", NAME))
    assert error.violations == {"webhook_config.events[1]": "EVENT_TYPE_DEPRECATED"}
    async with refused(StatusCode.INVALID_ARGUMENT, "EVENT_TYPE_DEPRECATED"):
        await platform.update(other.id, events=[NAME])
    kept = await platform.update(mine.id, events=["payment.failed", NAME])
    assert list(kept.events) == ["payment.failed", NAME]
    assert (await platform.publish()).event.delivery_count == 1

    await update(platform, deprecated=False)
    await platform.update(other.id, events=[NAME])
