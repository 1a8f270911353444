"""Random messages to every RPC end with an expected status and reveal no other merchant.

Strings are malicious texts or existing ids, also of another merchant, so that many calls pass the
first checks.
"""

import random
from collections.abc import AsyncIterator, Iterator, MutableMapping
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode

from tests.support.factories import fail_open_delivery
from tests.support.platform import Platform, bearer
from tests.support.receiver import Receiver
from tests.support.rpcs import call, methods, name_of

#: In each free text of the other merchant.
CANARY = "belongs-to-m-2"
EXPECTED = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.ALREADY_EXISTS,
    StatusCode.FAILED_PRECONDITION,
    StatusCode.ABORTED,
    StatusCode.PERMISSION_DENIED,
    StatusCode.RESOURCE_EXHAUSTED,
}
ID_FIELDS = {"id", "webhook_id", "event_id", "merchant_id"}
HOSTILE = ("", "\x00", "' OR 1=1 --", "%", "..", "漢" * 400, "\u202e", "x" * 5000, "-1", "*", "{}")
FIELDS = ("url", "events", "description", "active", "retry_schedule", "headers", "rate_limit")
NUMBERS = (0, 1, -1, 2, 100, 2**31 - 1, -(2**31))


def randomize(message: Message, chance: random.Random, words: list[str]) -> Message:
    """Fill some of the fields, also of nested messages."""
    for field in message.DESCRIPTOR.fields:
        if chance.random() < 0.35:
            continue
        value: Any = getattr(message, field.name)
        if isinstance(value, MutableMapping):
            value[chance.choice(words)] = chance.choice(words)
        elif field.message_type is not None:
            if field.message_type.name == "FieldMask":
                value.paths.extend(chance.choices((*FIELDS, *words), k=chance.randint(0, 3)))
            else:
                randomize(value.add() if field.is_repeated else value, chance, words)
        else:
            is_text = field.type == FieldDescriptor.TYPE_STRING
            drawn = chance.choice(words if is_text else _SCALARS.get(field.type, NUMBERS))
            if field.is_repeated:
                value.append(drawn)
            else:
                setattr(message, field.name, drawn)
    return message


_SCALARS: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_BYTES: (b"{}", b"", b"\xff\x00", b"[1]"),
    FieldDescriptor.TYPE_BOOL: (True, False),
    FieldDescriptor.TYPE_DOUBLE: (0.0, 1.5, -1.0, float("nan"), float("inf"), 1e308),
    FieldDescriptor.TYPE_ENUM: (0, 1, 2, 99),
    FieldDescriptor.TYPE_INT64: (*NUMBERS, 2**63 - 1),
}


async def answer_to(
    platform: Platform, method: Any, request: Message, token: str
) -> tuple[StatusCode, str]:
    """The code and the text of the response, with the ids from id fields at its end."""
    try:
        answer = await call(platform.channel, method, request, bearer(token))
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return StatusCode.OK, f"{answer} ids: {' '.join(ids_in(answer))}"


def ids_in(message: Message) -> Iterator[str]:
    """The ids in id fields, as `field=id`."""
    for field, value in message.ListFields():
        for each in value if field.is_repeated else [value]:
            if isinstance(each, Message):
                yield from ids_in(each)
            elif field.name in ID_FIELDS:
                yield f"{field.name}={each}"


async def everything_of(pool: Any, merchant_id: str) -> list[Any]:
    """All rows of a merchant."""
    tables = ("webhook_configs", "events", "delivery_queue", "finished_deliveries", "audit_entries")
    statement = "SELECT * FROM {} WHERE merchant_id = $1 ORDER BY id"
    return [
        [str(row) for row in await pool.fetch(statement.format(t), merchant_id)] for t in tables
    ]


async def call_randomly(
    platform: Platform, token: str, words: list[str], *, admin: bool, seeds: int
) -> AsyncIterator[str]:
    """Call each RPC with random messages. Yields the text of each response."""
    called = [m for m in methods() if (m.containing_service.name == "AdminService") is admin]
    for seed in range(seeds):
        chance = random.Random(seed)  # noqa: S311 - reproducible, not secret
        for method in called:
            request = randomize(GetMessageClass(method.input_type)(), chance, words)
            code, text = await answer_to(platform, method, request, token)
            assert code in EXPECTED, (seed, name_of(method), text)
            yield text


async def test_random_calls_do_not_reveal_or_change_other_merchants(
    platform: Platform, receiver: Receiver, pool: Any
) -> None:
    words = [*HOSTILE, "m_1", "m_2", "payment.succeeded", "payment.*", receiver.url]
    for merchant_id in ("m_1", "m_2"):
        note = CANARY if merchant_id == "m_2" else "mine"
        config = (
            await platform.register(receiver.url, merchant_id, description=note)
        ).webhook_config
        event = (await platform.publish(f'"{note}"', merchant_id)).event
        ids = [config.id, event.id, await fail_open_delivery(pool), merchant_id]
        words += [*ids, config.etag]
    before = await everything_of(pool, "m_2")
    token = platform.token("webhooks:manage", "events:publish", merchant_id="m_1")
    foreign = [CANARY, *(f"{field}={each}" for field in ID_FIELDS for each in ids)]
    async for text in call_randomly(platform, token, words, admin=False, seeds=30):
        assert not [each for each in foreign if each in text], text
    assert await everything_of(pool, "m_2") == before


async def test_random_admin_calls_have_an_expected_status(platform: Platform) -> None:
    words = [*HOSTILE, "m_9", "payment.succeeded", "wh_" + "0" * 32, '{"type": "object"}']
    token = platform.token("webhooks:admin")
    assert [text async for text in call_randomly(platform, token, words, admin=True, seeds=40)]
