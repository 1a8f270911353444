"""Malicious strings in every field of every request end with an expected status."""

import base64
from collections.abc import Iterator, MutableMapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc import StatusCode

from server.rpc.pagination import page_token
from tests.support.platform import Platform, bearer
from tests.support.refused_calls import refused
from tests.support.rpcs import call, code_of, methods, name_of, token_for

HOSTILE = (
    "\x00",
    "a\x00b",
    "\u202e\u2066\u200f",
    "\ufeff\u2028\U000e0001",
    "\ud7ff\U0010ffff",
    "'; DROP TABLE events; --",
    "%s%n{0}{}\\",
    "\r\nX-Injected: 1",
    "../../etc/passwd",
    "x" * 1_000_000,
    "漢" * 300_000,
)
EXPECTED = {
    StatusCode.OK,
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.ABORTED,
    StatusCode.PERMISSION_DENIED,
}


def fill(message: Message, text: str) -> Message:
    """Put the text into every string and bytes field, also of nested messages."""
    for field in message.DESCRIPTOR.fields:
        value: Any = getattr(message, field.name)
        if isinstance(value, MutableMapping):
            value[text] = text
        elif field.message_type is not None:
            if field.message_type.full_name.startswith("postrider."):
                fill(value.add() if field.is_repeated else value, text)
            elif field.message_type.name == "FieldMask":
                value.paths.extend(["description", text])
        elif field.type in {FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES}:
            given = text.encode() if field.type == FieldDescriptor.TYPE_BYTES else text
            if field.is_repeated:
                value.append(given)
            else:
                setattr(message, field.name, given)
    return message


def one_field_at_a_time(message: Message, text: str) -> Iterator[Message]:
    """Copies with the text in a single string field, so that its own check decides."""
    for field in message.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            copy = type(message)()
            copy.CopyFrom(message)
            setattr(copy, field.name, text)
            yield copy


async def answer_code(platform: Platform, method: Any, request: Message) -> StatusCode:
    metadata = bearer(token_for(platform, method))
    return await code_of(call(platform.channel, method, request, metadata))


async def test_malicious_string_has_an_expected_status(platform: Platform) -> None:
    for method in methods():
        empty = GetMessageClass(method.input_type)()
        for text in HOSTILE:
            for request in (*one_field_at_a_time(empty, text), fill(type(empty)(), text)):
                code = await answer_code(platform, method, request)
                assert code in EXPECTED, (name_of(method), text[:20], str(request)[:200])


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


async def test_too_large_message_does_not_end_the_connection(platform: Platform) -> None:
    [method] = [method for method in methods() if method.name == "GetDelivery"]
    request = fill(GetMessageClass(method.input_type)(), "x" * (17 * 1024 * 1024))
    assert await answer_code(platform, method, request) is StatusCode.RESOURCE_EXHAUSTED
    assert (await platform.publish()).event.id
