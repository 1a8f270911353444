"""The field table of a webhook config and its checks."""

from collections.abc import Collection
from typing import Any

import pytest
from google.protobuf.duration_pb2 import Duration

from core.addresses import AddressPolicy
from core.errors import InvalidArgument
from core.models import WebhookConfig
from core.urls import UrlPolicy
from postrider.v1 import webhook_config_pb2, webhook_config_service_pb2
from server.rpc.validation import check_mask
from server.webhooks.convert import overlap_seconds
from server.webhooks.rules import FIELDS, check_draft, webhook_draft

POLICY = UrlPolicy(AddressPolicy(()), ports=((443, 443),))


def draft(**changes: Any) -> WebhookConfig:
    """Return a valid draft with other column values."""
    values = {
        "url": "https://example.com/hook",
        "events": ["payment.succeeded"],
        "retry_schedule_seconds": [1.0, 86_400.0],
    }
    config = webhook_draft(webhook_config_pb2.WebhookConfig())
    for column, value in (values | changes).items():
        setattr(config, column, value)
    return config


def reasons(config: WebhookConfig, fields: Collection[str] = FIELDS.keys()) -> dict[str, str]:
    """Return the reasons by field. Only the event type `no.such` is unknown."""
    try:
        check_draft(config, fields, POLICY, {"no.such"})
    except InvalidArgument as refused:
        return {v.field.removeprefix("webhook_config."): v.reason for v in refused.violations}
    return {}


def test_every_updatable_field_has_a_column_and_a_message_field() -> None:
    message_fields = webhook_config_pb2.WebhookConfig.DESCRIPTOR.fields_by_name
    columns = WebhookConfig.__table__.columns
    assert all(name in message_fields for name in FIELDS)
    assert all(field.column in columns for field in FIELDS.values())


def test_check_brings_the_url_into_canonical_form() -> None:
    config = draft(url="HTTPS://EXAMPLE.com:443")
    check_draft(config, FIELDS, POLICY)
    assert config.url == "https://example.com/"


def test_check_reads_only_the_named_fields() -> None:
    wrong = draft(
        url="http://x", events=["no.such"], description="\x00", retry_schedule_seconds=[0.0]
    )
    assert set(reasons(wrong)) == {"url", "events[0]", "description", "retry_schedule[0]"}
    assert reasons(wrong, ("active",)) == {}
    assert reasons(wrong, ("events",)) == {"events[0]": "EVENT_TYPE_UNKNOWN"}
    assert wrong.url == "http://x"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"retry_schedule_seconds": []}, {}),
        ({"retry_schedule_seconds": [1.0] * 20}, {}),
        ({"retry_schedule_seconds": [1.0] * 21}, {"retry_schedule": "RETRY_SCHEDULE_TOO_LONG"}),
        ({"retry_schedule_seconds": [0.999]}, {"retry_schedule[0]": "RETRY_WAIT_INVALID"}),
        ({"retry_schedule_seconds": [1.0, 86_400.1]}, {"retry_schedule[1]": "RETRY_WAIT_INVALID"}),
        ({"retry_schedule_seconds": [float("nan")]}, {"retry_schedule[0]": "RETRY_WAIT_INVALID"}),
        ({"retry_schedule_seconds": [float("inf")]}, {"retry_schedule[0]": "RETRY_WAIT_INVALID"}),
        ({"timeout_seconds": 1.0}, {}),
        ({"timeout_seconds": 30.0}, {}),
        ({"timeout_seconds": 0.999}, {"timeout": "TIMEOUT_INVALID"}),
        ({"timeout_seconds": 0.0}, {"timeout": "TIMEOUT_INVALID"}),
        ({"timeout_seconds": 30.001}, {"timeout": "TIMEOUT_INVALID"}),
        ({"rate_limit": 0.0}, {}),
        ({"rate_limit": 0.001}, {}),
        ({"rate_limit": 10_000.0}, {}),
        ({"rate_limit": 10_000.1}, {"rate_limit": "RATE_LIMIT_INVALID"}),
        ({"rate_limit": 5e-324}, {"rate_limit": "RATE_LIMIT_INVALID"}),
        ({"rate_limit": -1.0}, {"rate_limit": "RATE_LIMIT_INVALID"}),
        ({"rate_limit": float("nan")}, {"rate_limit": "RATE_LIMIT_INVALID"}),
        ({"rate_limit": float("inf")}, {"rate_limit": "RATE_LIMIT_INVALID"}),
        ({"max_in_flight": 1000}, {}),
        ({"max_in_flight": 1001}, {"max_in_flight": "MAX_IN_FLIGHT_INVALID"}),
        ({"max_in_flight": -1}, {"max_in_flight": "MAX_IN_FLIGHT_INVALID"}),
        ({"headers": {"Host": "x"}}, {"headers['Host']": "HEADER_DENIED"}),
        ({"description": "naïve façade, 支払い 🎉"}, {}),
        ({"description": "x" * 500}, {}),
        *(
            ({"description": text}, {"description": "DESCRIPTION_INVALID"})
            for text in ("line\nbreak", "\x00", "\x7f", "\u202eabc", "\u200f", "\u2028", "x" * 501)
        ),
    ],
)
def test_check_bounds_each_field(change: dict[str, Any], expected: dict[str, str]) -> None:
    assert reasons(draft(**change)) == expected
    assert reasons(draft(**change), ("url", "events")) == {}


def test_new_headers_are_checked_against_the_current_prefix() -> None:
    config = draft(headers={"acme-id": "x"}, header_prefix="acme")
    assert reasons(config, ("headers",)) == {"header_prefix": "HEADER_PREFIX_INVALID"}


def test_mask_names_at_least_one_field_and_only_known_ones() -> None:
    check_mask(FIELDS, FIELDS)
    for paths, reason in (((), "MASK_EMPTY"), (("url", "secret"), "MASK_FIELD_UNKNOWN")):
        with pytest.raises(InvalidArgument) as refused:
            check_mask(paths, FIELDS)
        assert refused.value.reason == reason
        assert refused.value.violations[0].field == "update_mask"


def test_repr_of_a_draft_hides_header_values() -> None:
    assert "swordfish" not in repr(draft(headers={"Authorization": "swordfish"}))


@pytest.mark.parametrize(
    ("overlap", "is_valid"),
    [
        (Duration(), True),
        (Duration(seconds=604_800), True),
        (Duration(nanos=-1_000_000), False),
        (Duration(seconds=604_800, nanos=1_000_000), False),
    ],
)
def test_overlap_is_at_most_seven_days(overlap: Duration, is_valid: bool) -> None:
    request = webhook_config_service_pb2.RotateSecretRequest(overlap=overlap)
    if is_valid:
        overlap_seconds(request)
    else:
        with pytest.raises(InvalidArgument):
            overlap_seconds(request)
