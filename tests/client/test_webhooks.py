"""verify_webhook beside the signer of the service: what it believes and what it refuses."""

import sys
from collections.abc import Mapping

import pytest

from core.signing import (
    SignatureScheme,
    new_secret,
    public_key,
    signature_headers,
    standard_secret,
)
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


@pytest.mark.parametrize("useless", ["", "whsec_%%%", "0a" * 32 + "\n"])
def test_a_secret_that_is_none_is_an_error_of_ours(secret: str, useless: str) -> None:
    with pytest.raises(ValueError, match="secret"):
        verify_webhook(useless, signed(secret), BODY, now=NOW)


# Several secrets, and key pairs.


@pytest.fixture
def pair() -> str:
    return new_secret(SignatureScheme.ED25519)


def public(pair: str) -> str:
    key = public_key(pair)
    assert key is not None
    return key


def test_one_of_several_secrets_is_enough(secret: str, pair: str) -> None:
    others = [new_secret(), public(new_secret(SignatureScheme.ED25519))]
    for secrets in ([secret, *others], [*others, standard_secret(secret)]):
        assert verify_webhook(secrets, signed(secret), BODY, now=NOW).id == ID
    assert verify_webhook([*others, public(pair)], signed(pair), BODY, now=NOW).id == ID
    for none in (others, []):
        with pytest.raises(WebhookRefused, match="signature"):
            verify_webhook(none, signed(secret), BODY, now=NOW)


def test_what_a_key_pair_signs_is_believed_by_its_public_key_alone(pair: str) -> None:
    headers = signed(pair)
    assert verify_webhook(public(pair), headers, BODY, now=NOW).id == ID
    stranger = public(new_secret(SignatureScheme.ED25519))
    for key, changed, body in (
        (stranger, headers, BODY),
        (public(pair), headers, BODY + b" "),
        (public(pair), {**headers, "webhook-id": "evt_2"}, BODY),
        (public(pair), with_signature(headers, f"t={NOW},v1a=00"), BODY),
        (public(pair), with_signature(headers, f"t={NOW},v1a=zz"), BODY),
        (public(pair), with_signature(headers, f"t={NOW}"), BODY),
    ):
        with pytest.raises(WebhookRefused, match="signature"):
            verify_webhook(key, changed, body, now=NOW)
    with pytest.raises(WebhookRefused, match="timestamp"):
        verify_webhook(public(pair), headers, BODY, now=NOW + 301)


def test_a_public_key_is_never_taken_for_a_secret(pair: str) -> None:
    # It is no secret, so whoever has it could make this HMAC.
    forged = signature_headers([public(pair)], ID, NOW, BODY)
    assert ",v1=" in forged["X-Webhook-Signature"]
    for value in (
        forged["X-Webhook-Signature"],
        forged["X-Webhook-Signature"].replace("v1=", "v1a="),
    ):
        with pytest.raises(WebhookRefused, match="signature"):
            verify_webhook(public(pair), with_signature(forged, value), BODY, now=NOW)


@pytest.mark.parametrize("useless", ["whpk_", "whpk_%%%", "whpk_AAAA", "whsk_AAAA"])
def test_a_key_that_is_none_is_an_error_of_ours_too(pair: str, useless: str) -> None:
    with pytest.raises(ValueError, match="key"):
        verify_webhook(useless, signed(pair), BODY, now=NOW)


def test_without_the_extra_a_public_key_says_what_to_install(
    pair: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(RuntimeError, match=r"postrider-client\[ed25519\]"):
        verify_webhook(public(pair), signed(pair), BODY, now=NOW)
