"""The rules for the fields of a webhook config."""

from dataclasses import replace
from typing import Any

import pytest

from core.addresses import AddressPolicy
from core.errors import InvalidArgument
from core.urls import UrlPolicy
from server.event_types.cache import is_event_type_prefix
from server.rpc.validation import check_mask
from server.webhooks.rules import (
    UPDATABLE_FIELDS,
    WebhookDraft,
    check_draft,
    check_overlap,
)

POLICY = UrlPolicy(AddressPolicy(()), ports=((443, 443),))
VALID = WebhookDraft(
    url="https://example.com/hook",
    events=("payment.succeeded",),
    description="orders",
    active=True,
    retry_schedule_seconds=(1.0, 86_400.0),
)


def reasons(draft: WebhookDraft, fields: tuple[str, ...] = UPDATABLE_FIELDS) -> dict[str, str]:
    """Reasons by field, of a draft whose event types are all known but `no.such`."""
    try:
        check_draft(draft, fields, POLICY, {"no.such"})
    except InvalidArgument as refused:
        return {v.field.removeprefix("webhook_config."): v.reason for v in refused.violations}
    return {}


def test_the_url_comes_back_in_canonical_form() -> None:
    draft = replace(VALID, url="HTTPS://EXAMPLE.com:443")
    assert check_draft(draft, UPDATABLE_FIELDS, POLICY, ()) == "https://example.com/"


def test_fields_that_are_not_asked_for_are_not_looked_at() -> None:
    wrong = WebhookDraft("http://x", ("no.such",), "\x00", True, (0.0,))
    assert set(reasons(wrong)) == {"url", "events[0]", "description", "retry_schedule[0]"}
    assert reasons(wrong, ("active",)) == {}
    assert reasons(wrong, ("events",)) == {"events[0]": "EVENT_TYPE_UNKNOWN"}
    assert check_draft(wrong, (), POLICY, ()) == "http://x"


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ((), {}),
        ((1.0,) * 20, {}),
        ((1.0,) * 21, {"retry_schedule": "RETRY_SCHEDULE_TOO_LONG"}),
        ((0.999,), {"retry_schedule[0]": "RETRY_WAIT_INVALID"}),
        ((1.0, 86_400.1), {"retry_schedule[1]": "RETRY_WAIT_INVALID"}),
        ((float("nan"),), {"retry_schedule[0]": "RETRY_WAIT_INVALID"}),
        ((float("inf"),), {"retry_schedule[0]": "RETRY_WAIT_INVALID"}),
    ],
)
def test_waits_are_bounded_in_number_and_length(
    schedule: tuple[float, ...], expected: dict[str, str]
) -> None:
    assert reasons(replace(VALID, retry_schedule_seconds=schedule)) == expected


@pytest.mark.parametrize(
    "description", ["line\nbreak", "\x00", "\x7f", "\u202eabc", "\u200f", "\u2028", "x" * 501]
)
def test_a_description_that_would_garble_a_list_is_refused(description: str) -> None:
    assert reasons(replace(VALID, description=description)) == {
        "description": "DESCRIPTION_INVALID"
    }


@pytest.mark.parametrize("description", ["", "naïve façade, 支払い 🎉", "x" * 500])
def test_a_description_may_be_any_printable_text(description: str) -> None:
    assert reasons(replace(VALID, description=description)) == {}


def test_a_mask_names_at_least_one_field_and_only_known_ones() -> None:
    check_mask(UPDATABLE_FIELDS, UPDATABLE_FIELDS)
    for paths, reason in (((), "MASK_EMPTY"), (("url", "secret"), "MASK_FIELD_UNKNOWN")):
        with pytest.raises(InvalidArgument) as refused:
            check_mask(paths, UPDATABLE_FIELDS)
        assert refused.value.reason == reason
        assert refused.value.violations[0].field == "update_mask"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
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
    ],
)
def test_limits_are_bounded_and_looked_at_only_when_asked_for(
    change: dict[str, Any], expected: dict[str, str]
) -> None:
    draft = replace(VALID, **change)
    assert reasons(draft) == expected
    assert reasons(draft, ("url", "events")) == {}


def test_the_values_of_headers_do_not_show_when_a_draft_is_printed() -> None:
    assert "swordfish" not in repr(replace(VALID, headers={"Authorization": "swordfish"}))


@pytest.mark.parametrize("text", ["payment.*", "a.b.c.*", "x_1.*", "p" * 126 + ".*"])
def test_a_prefix_is_segments_and_a_star(text: str) -> None:
    assert is_event_type_prefix(text)


@pytest.mark.parametrize(
    "text", ["*", ".*", "payment*", "payment.*.x", "a..*", "A.*", "a.**", "a.*\n", "p" * 127 + ".*"]
)
def test_nothing_else_is_a_prefix(text: str) -> None:
    assert not is_event_type_prefix(text)


@pytest.mark.parametrize("seconds", [-0.001, 604_800.001, float("nan")])
def test_an_overlap_is_bounded(seconds: float) -> None:
    check_overlap(0)
    check_overlap(604_800)
    with pytest.raises(InvalidArgument):
        check_overlap(seconds)
