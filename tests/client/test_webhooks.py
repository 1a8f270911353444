"""verify_webhook beside the signer of the service: what it believes and what it refuses."""

from collections.abc import Mapping

import pytest

from core.signing import new_secret, signature_headers, standard_secret
from postrider_client import WebhookRefused, verify_webhook

NOW = 1_800_000_000
BODY = b'{"amount": 4200}'
ID = "evt_1"


@pytest.fixture
def secret() -> str:
    return new_secret()


def signed(secret: str, timestamp: int = NOW, body: bytes = BODY) -> dict[str, str]:
    return signature_headers([secret], ID, timestamp, body) | {
        "X-Webhook-Event": "payment.succeeded",
        "X-Webhook-Delivery": "dlv_1",
        "X-Webhook-Attempt": "2",
    }


def test_what_the_service_signs_is_believed_in_both_spellings_of_the_secret(secret: str) -> None:
    for spelling in (secret, standard_secret(secret)):
        webhook = verify_webhook(spelling, signed(secret), BODY, now=NOW)
        assert (webhook.id, webhook.timestamp, webhook.attempt) == (ID, NOW, 2)
        assert (webhook.event_type, webhook.delivery_id) == ("payment.succeeded", "dlv_1")


def test_names_of_headers_may_be_in_any_case(secret: str) -> None:
    for change in (str.lower, str.upper):
        headers = {change(name): value for name, value in signed(secret).items()}
        assert verify_webhook(secret, headers, BODY, now=NOW).id == ID


def with_signature(headers: Mapping[str, str], value: str) -> dict[str, str]:
    return {**headers, "X-Webhook-Signature": value}


def test_one_of_several_signatures_is_enough_while_a_secret_is_rotated(secret: str) -> None:
    other = new_secret()
    ours = signed(secret)["X-Webhook-Signature"].partition("v1=")[2]
    theirs = signed(other)["X-Webhook-Signature"].partition("v1=")[2]
    for order in ((ours, theirs), (theirs, ours)):
        value = f"t={NOW}," + ",".join(f"v1={signature}" for signature in order)
        for each in (secret, other):
            assert verify_webhook(each, with_signature(signed(secret), value), BODY, now=NOW)
        with pytest.raises(WebhookRefused, match="signature"):
            verify_webhook(new_secret(), with_signature(signed(secret), value), BODY, now=NOW)


@pytest.mark.parametrize("offset", [-300, 0, 300])
def test_clocks_may_differ_by_the_tolerance(secret: str, offset: int) -> None:
    assert verify_webhook(secret, signed(secret), BODY, now=NOW + offset)


@pytest.mark.parametrize("offset", [-301, 301])
def test_beyond_the_tolerance_it_is_refused(secret: str, offset: int) -> None:
    with pytest.raises(WebhookRefused, match="timestamp"):
        verify_webhook(secret, signed(secret), BODY, now=NOW + offset)
    assert verify_webhook(secret, signed(secret), BODY, 400, now=NOW + offset)


def test_the_present_time_is_used_when_none_is_given(secret: str) -> None:
    with pytest.raises(WebhookRefused, match="timestamp"):
        verify_webhook(secret, signed(secret, timestamp=1), BODY)


def test_another_body_id_timestamp_or_secret_is_refused(secret: str) -> None:
    headers = signed(secret)
    later = headers["X-Webhook-Signature"].replace(f"t={NOW}", f"t={NOW + 1}")
    for changed, body in (
        (headers, BODY + b" "),
        ({**headers, "webhook-id": "evt_2"}, BODY),
        (with_signature(headers, later), BODY),
        (signed(new_secret()), BODY),
    ):
        with pytest.raises(WebhookRefused, match="signature"):
            verify_webhook(secret, changed, body, now=NOW)


@pytest.mark.parametrize(
    "value",
    ["", "v1=00", f"t={NOW}", "t=,v1=00", "t=-1,v1=00", "t=1e9,v1=00", "t=٣,v1=00", "t=1,t=2,v1=0"],
)
def test_headers_that_make_no_sense_are_refused(secret: str, value: str) -> None:
    with pytest.raises(WebhookRefused):
        verify_webhook(secret, with_signature(signed(secret), value), BODY, now=NOW)


@pytest.mark.parametrize("missing", ["webhook-id", "X-Webhook-Signature"])
def test_a_missing_header_is_refused(secret: str, missing: str) -> None:
    headers = {name: value for name, value in signed(secret).items() if name != missing}
    with pytest.raises(WebhookRefused):
        verify_webhook(secret, headers, BODY, now=NOW)


@pytest.mark.parametrize("text", ["\udcff", "é"])
def test_headers_that_are_no_text_are_refused_and_not_a_crash(secret: str, text: str) -> None:
    for headers in (
        {**signed(secret), "webhook-id": text},
        with_signature(signed(secret), f"t={NOW},v1={text}"),
    ):
        with pytest.raises(WebhookRefused):
            verify_webhook(secret, headers, BODY, now=NOW)


@pytest.mark.parametrize("useless", ["", "whsec_%%%"])
def test_a_secret_that_is_none_is_an_error_of_ours(secret: str, useless: str) -> None:
    with pytest.raises(ValueError, match="secret"):
        verify_webhook(useless, signed(secret), BODY, now=NOW)
