"""Malicious and random messages to every RPC end with an expected status and leak nothing."""

import base64
import random
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode

from server.rpc.pagination import page_token
from tests.support.factories import fail_open_delivery
from tests.support.platform import Platform, bearer
from tests.support.receiver import Receiver
from tests.support.refused_calls import refused
from tests.support.rpcs import call, code_of, methods, name_of, token_for

# Without the limit, because refused registrations would not read their strings.
pytestmark = pytest.mark.server(registration_rate=0)

HOSTILE = (
    *("\x00", "a\x00b", "\u202e\u2066\u200f", "\ufeff\u2028\U000e0001", "\ud7ff\U0010ffff"),
    *("'; DROP TABLE events; --", "' OR 1=1 --", "%s%n{0}{}\\", "\r\nX-Injected: 1"),
    *("../../etc/passwd", "..", "", "%", "-1", "*", "{}", "漢" * 400, "x" * 5000),
)
LARGE = ("x" * 1_000_000, "漢" * 300_000)
EXPECTED = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.ALREADY_EXISTS,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.ABORTED,
    StatusCode.PERMISSION_DENIED,
}
#: In each free text of the other merchant.
CANARY = "belongs-to-m-2"
ID_FIELDS = {"id", "webhook_id", "event_id", "merchant_id"}
FIELDS = ("url", "events", "description", "active", "retry_schedule", "headers", "rate_limit")
NUMBERS = (0, 1, -1, 2, 100, 2**31 - 1, -(2**31))
SCALARS: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_BYTES: (b"{}", b"", b"\xff\x00", b"[1]"),
    FieldDescriptor.TYPE_BOOL: (True, False),
    FieldDescriptor.TYPE_DOUBLE: (0.0, 1.5, -1.0, float("nan"), float("inf"), 1e308),
    FieldDescriptor.TYPE_ENUM: (0, 1, 2, 99),
    FieldDescriptor.TYPE_INT64: (*NUMBERS, 2**63 - 1),
}

type Choose = Callable[[FieldDescriptor], Any]


def fill(message: Message, choose: Choose) -> Message:
    """Fill the fields, also of nested messages. A field is skipped if `choose` returns None."""
    fields: Any = message.DESCRIPTOR.fields
    for field in fields:
        value: Any = getattr(message, field.name)
        if (chosen := choose(field)) is None:
            continue
        if isinstance(value, MutableMapping):
            value[chosen] = chosen
        elif field.message_type is not None:
            fill(value.add() if field.is_repeated else value, choose)
        elif field.is_repeated:
            value.append(chosen)
        else:
            setattr(message, field.name, chosen)
    return message


def everywhere(text: str) -> Choose:
    """The text in every string and bytes field."""
    values = {FieldDescriptor.TYPE_BYTES: text.encode(), FieldDescriptor.TYPE_MESSAGE: text}
    return lambda field: text if field.type == field.TYPE_STRING else values.get(field.type)


def randomly(chance: random.Random, words: list[str]) -> Choose:
    """Random values in some of the fields."""

    def choose(field: FieldDescriptor) -> Any:
        if chance.random() < 0.35:
            return None
        if field.name == "paths":
            return chance.choice((*FIELDS, *words))
        if field.type in {field.TYPE_STRING, field.TYPE_MESSAGE}:
            return chance.choice(words)
        return chance.choice(SCALARS.get(field.type, NUMBERS))

    return choose


def one_field_at_a_time(message: Message, text: str) -> Iterator[Message]:
    """Copies with the text in a single string field, so that its own check decides."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            copy = type(message)()
            copy.CopyFrom(message)
            setattr(copy, field.name, text)
            yield copy


async def test_malicious_string_has_an_expected_status(platform: Platform) -> None:
    for method in methods():
        empty = GetMessageClass(method.input_type)()
        metadata = bearer(token_for(platform, method))
        for text in (*HOSTILE, *LARGE):
            all_fields = fill(type(empty)(), everywhere(text))
            for request in (*one_field_at_a_time(empty, text), all_fields):
                code = await code_of(call(platform.channel, method, request, metadata))
                assert code in EXPECTED, (name_of(method), text[:20], str(request)[:200])


async def call_randomly(
    platform: Platform, token: str, words: list[str], *, admin: bool, seeds: int
) -> AsyncIterator[str]:
    """Call each RPC with random messages.

    Yields the text of each response, with the ids from id fields at its end.
    """
    called = [m for m in methods() if (m.containing_service.name == "AdminService") is admin]
    for seed in range(seeds):
        chance = random.Random(seed)  # noqa: S311 - reproducible, not secret
        for method in called:
            request = fill(GetMessageClass(method.input_type)(), randomly(chance, words))
            try:
                answer = await call(platform.channel, method, request, bearer(token))
                code, text = StatusCode.OK, f"{answer} ids: {' '.join(ids_in(answer))}"
            except grpc.aio.AioRpcError as error:
                code, text = error.code(), error.details() or ""
            assert code in EXPECTED, (seed, name_of(method), text)
            yield text


def ids_in(message: Message) -> Iterator[str]:
    """The ids in id fields, as `field=id`."""
    for field, value in message.ListFields():
        for each in value if field.is_repeated else [value]:
            if isinstance(each, Message):
                yield from ids_in(each)
            elif field.name in ID_FIELDS:
                yield f"{field.name}={each}"


async def rows_of(pool: Any, merchant_id: str) -> list[Any]:
    """All rows of a merchant."""
    tables = ("webhook_configs", "events", "delivery_queue", "finished_deliveries", "audit_entries")
    statement = "SELECT * FROM {} WHERE merchant_id = $1 ORDER BY id"
    return [
        [str(row) for row in await pool.fetch(statement.format(t), merchant_id)] for t in tables
    ]


async def test_random_calls_do_not_reveal_or_change_other_merchants(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    """Many random words are existing ids, so that many calls pass the first checks."""
    words = [*HOSTILE, "m_1", "m_2", "payment.succeeded", "payment.*", receiver.url]
    for merchant_id, note in (("m_1", "own"), ("m_2", CANARY)):
        created = await platform.register(receiver.url, merchant_id, description=note)
        config = created.webhook_config
        event = (await platform.publish(f'"{note}"', merchant_id)).event
        ids = [config.id, event.id, await fail_open_delivery(pool), merchant_id]
        words += [*ids, config.etag]
    before = await rows_of(pool, "m_2")
    token = platform.token("webhooks:manage", "events:publish", merchant_id="m_1")
    foreign = [CANARY, *(f"{field}={each}" for field in ID_FIELDS for each in ids)]
    async for text in call_randomly(platform, token, words, admin=False, seeds=30):
        assert not [each for each in foreign if each in text], text
    assert await rows_of(pool, "m_2") == before


async def test_random_admin_calls_have_an_expected_status(platform: Platform) -> None:
    words = [*HOSTILE, "m_9", "payment.succeeded", "wh_" + "0" * 32, '{"type": "object"}']
    token = platform.token("webhooks:admin")
    assert [text async for text in call_randomly(platform, token, words, admin=True, seeds=40)]


async def test_forged_page_token_is_refused(platform: Platform) -> None:
    lists: dict[str, tuple[Any, ...]] = {
        "WebhookConfigService.ListWebhookConfigs": ("webhooks", "m_1"),
        "WebhookConfigService.ListEventTypes": ("event_types",),
        "AdminService.ListAllWebhookConfigs": ("all_webhooks", "", False, 0),
        "AdminService.RedeliverDeliveries": (*("redeliveries", "None", "None", "", "", (), False),),
        "AdminService.ListAuditEntries": ("audit_entries", "", "", "None", "None"),
        "DeliveryService.ListDeliveries": ("deliveries", "m_1", "", "", 0, "", None, None),
        "EventService.ListEvents": ("events", "m_1", "", None, None),
    }
    with_pages = {
        name_of(method): method
        for method in methods()
        if method.input_type.fields_by_name.get("page_token")
    }
    assert set(with_pages) == set(lists)
    for name, method in with_pages.items():
        request_class = GetMessageClass(method.input_type)
        genuine = page_token("0" * 32, *lists[name])
        for token in (
            page_token("not an id", *lists[name]),
            page_token("\x00", *lists[name]),
            page_token("a\x00.b", *lists[name]),
            base64.urlsafe_b64encode(base64.urlsafe_b64decode(genuine + "==")[:8]).decode(),
            genuine * 10_000,
            genuine[:-1] + "é",
        ):
            fields = {"merchant_id": "m_1"} if method.name == "ListEvents" else {}
            request = request_class(page_token=token, **fields)
            metadata = bearer(token_for(platform, method))
            async with refused(StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID"):
                await call(platform.channel, method, request, metadata)
