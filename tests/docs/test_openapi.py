"""The OpenAPI document is valid and complete, and describes protobuf's JSON."""

import re

import jsonschema
import pytest
from google.api import annotations_pb2
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.support import rpcs
from tests.support.rest_contract import DOCUMENT, assert_conforms

OPERATIONS = {
    (verb, path): operation
    for path, verbs in DOCUMENT["paths"].items()
    for verb, operation in verbs.items()
}
#: Messages of google.rpc. Their comments address authors of errors, so ours are written by hand.
WRITTEN_BY_HAND = {"Error", "ErrorInfo", "BadRequest", "QuotaFailure", "RetryInfo"}


def test_openapi_document_is_valid() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_openapi_has_exactly_the_merchant_facing_rpcs() -> None:
    mapped = {}
    for method in rpcs.methods():
        rule = method.GetOptions().Extensions[annotations_pb2.http]
        if verb := rule.WhichOneof("pattern"):
            path = getattr(rule, verb).replace("{webhook_config.id}", "{id}")
            mapped[method.name[0].lower() + method.name[1:]] = (verb, path)
    unmapped = {
        rpcs.name_of(method)
        for method in rpcs.methods()
        if method.name[0].lower() + method.name[1:] not in mapped
        and method.containing_service.name != "AdminService"
    }

    assert {o["operationId"]: key for key, o in OPERATIONS.items()} == mapped
    assert unmapped == {"EventService.StreamEvents"}
    assert not any("AdminService" in operation["tags"] for operation in OPERATIONS.values())


def test_openapi_describes_operations_and_fields() -> None:
    for key, operation in OPERATIONS.items():
        assert operation["description"], key
        for parameter in operation.get("parameters", []):
            assert parameter["description"], (key, parameter["name"])
    for name, schema in DOCUMENT["components"]["schemas"].items():
        if name not in WRITTEN_BY_HAND:
            for field, property_ in schema.get("properties", {}).items():
                assert property_["description"], (name, field)


def test_openapi_declares_path_parameters() -> None:
    for (verb, path), operation in OPERATIONS.items():
        declared = [p["name"] for p in operation.get("parameters", []) if p["in"] == "path"]
        assert declared == re.findall(r"\{(\w+)\}", path), (verb, path)


def test_openapi_accepts_only_protobuf_json() -> None:
    event = {"merchantId": "m_1", "type": "payment.succeeded", "payloadText": "{}"}
    config = {"active": True, "headers": {"x-a": "1"}, "retrySchedule": ["1s", "2.500s"]}

    assert_conforms(event, "EventInput")
    assert_conforms(config, "WebhookConfig")
    for wrong, name in (
        ({**event, "payload": "e30="}, "EventInput"),
        ({"retrySchedule": ["soon"]}, "WebhookConfig"),
        ({"headers": {"x-a": 1}}, "WebhookConfig"),
        ({"deactivationReason": 1}, "WebhookConfig"),
        ({"merchant_id": "m_1"}, "WebhookConfig"),
    ):
        with pytest.raises(jsonschema.ValidationError):
            assert_conforms(wrong, name)
