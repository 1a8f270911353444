"""Signatures: a vector computed here by hand, an independent library, and what must not verify."""

import base64
import hashlib
import hmac
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from core.ids import format_id, new_id
from core.signing import new_secret, signature_headers, standard_secret, verify

SECRET = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
MESSAGE_ID = "evt_01890a5dac96774bbcceb302099a8057"
TIMESTAMP = 1_767_323_045
BODY = b'{"amount": 1}'
SIGNATURE = signature_headers([SECRET], MESSAGE_ID, TIMESTAMP, BODY)["X-Webhook-Signature"]

BODIES = st.binary(max_size=200)


def test_the_four_headers_are_as_computed_by_hand() -> None:
    signed = b"evt_01890a5dac96774bbcceb302099a8057" + b".1767323045." + b'{"amount": 1}'
    code = hmac.new(SECRET.encode("ascii"), signed, hashlib.sha256)

    assert signature_headers([SECRET], MESSAGE_ID, TIMESTAMP, BODY) == {
        "webhook-id": "evt_01890a5dac96774bbcceb302099a8057",
        "webhook-timestamp": "1767323045",
        "webhook-signature": "v1," + base64.b64encode(code.digest()).decode(),
        "X-Webhook-Signature": "t=1767323045,v1=" + code.hexdigest(),
    }


def test_the_vector_in_plain_text_never_changes() -> None:
    # `printf '%s' 'evt_….1767323045.{"amount": 1}' | openssl dgst -sha256 -hmac "$SECRET"`
    assert SIGNATURE == (
        "t=1767323045,v1=670ad683b12f544220b1f84adb9a538324ca4e7e60a9fd7bf5d874e1143791d5"
    )


def test_a_new_secret_is_64_hexadecimal_digits_and_never_the_same() -> None:
    secrets = {new_secret() for _ in range(100)}

    assert len(secrets) == 100
    assert all(re.fullmatch(r"[0-9a-f]{64}", secret) for secret in secrets)


@given(body=st.text(st.characters(exclude_categories=["Cs"])))
def test_the_standard_webhooks_library_verifies_whatever_text_we_sign(body: str) -> None:
    secret, message_id = new_secret(), format_id("evt", new_id())
    now = int(datetime.now(UTC).timestamp())

    headers = signature_headers([secret], message_id, now, body.encode())

    Webhook(standard_secret(secret)).verify(body.encode(), headers, json_parse=False)


def test_the_standard_webhooks_library_refuses_what_is_tampered_with_or_old() -> None:
    now = int(datetime.now(UTC).timestamp())
    library = Webhook(standard_secret(SECRET))
    headers = signature_headers([SECRET], MESSAGE_ID, now, BODY)
    assert library.verify(BODY, headers) == {"amount": 1}

    with pytest.raises(WebhookVerificationError):
        library.verify(b'{"amount": 2}', headers)
    with pytest.raises(WebhookVerificationError):
        library.verify(BODY, {**headers, "webhook-id": "evt_other"})
    with pytest.raises(WebhookVerificationError):
        library.verify(BODY, {**headers, "webhook-timestamp": str(now + 1)})
    with pytest.raises(WebhookVerificationError):
        Webhook(standard_secret(new_secret())).verify(BODY, headers)
    with pytest.raises(WebhookVerificationError):
        library.verify(BODY, signature_headers([SECRET], MESSAGE_ID, now - 360, BODY))


@given(body=BODIES, timestamp=st.integers(0, 10**11))
def test_what_is_signed_verifies_whatever_the_bytes(body: bytes, timestamp: int) -> None:
    signature = signature_headers([SECRET], MESSAGE_ID, timestamp, body)["X-Webhook-Signature"]

    assert verify(SECRET, MESSAGE_ID, body, signature, now=timestamp)


@given(body=BODIES, other=BODIES)
def test_a_signature_fits_one_body_only(body: bytes, other: bytes) -> None:
    signature = signature_headers([SECRET], MESSAGE_ID, TIMESTAMP, body)["X-Webhook-Signature"]

    assert verify(SECRET, MESSAGE_ID, other, signature, now=TIMESTAMP) == (body == other)


def test_a_signature_fits_one_secret_and_one_message_only() -> None:
    assert verify(SECRET, MESSAGE_ID, BODY, SIGNATURE, now=TIMESTAMP)
    assert not verify(new_secret(), MESSAGE_ID, BODY, SIGNATURE, now=TIMESTAMP)
    assert not verify(SECRET, "evt_other", BODY, SIGNATURE, now=TIMESTAMP)


@given(index=st.integers(0, len(SIGNATURE) - 1), character=st.sampled_from("0123456789abcdefg,=tv"))
def test_no_changed_character_of_a_signature_passes(index: int, character: str) -> None:
    changed = SIGNATURE[:index] + character + SIGNATURE[index + 1 :]

    accepted = verify(SECRET, MESSAGE_ID, BODY, changed, now=TIMESTAMP)

    assert accepted == (changed == SIGNATURE)


@pytest.mark.parametrize(
    ("age", "accepted"),
    [(0, True), (300, True), (301, False), (360, False), (-300, True), (-301, False)],
)
def test_a_signature_is_good_for_five_minutes_either_way(age: int, accepted: bool) -> None:
    assert verify(SECRET, MESSAGE_ID, BODY, SIGNATURE, now=TIMESTAMP + age) == accepted


def test_the_tolerance_is_the_callers_to_choose() -> None:
    late = TIMESTAMP + 10

    assert verify(SECRET, MESSAGE_ID, BODY, SIGNATURE, now=late, tolerance_seconds=10)
    assert not verify(SECRET, MESSAGE_ID, BODY, SIGNATURE, now=late, tolerance_seconds=9)


@pytest.mark.parametrize(
    "signature",
    [
        "",
        ",",
        "t=,v1=",
        "v1=" + SIGNATURE.partition("v1=")[2],
        "t=1767323045",
        "t=-1,v1=0",
        "t=1e9,v1=0",
        "t=١,v1=0",
        "t=²,v1=0",
        f"t={'9' * 5000},v1=0",
        "t=1767323045,v1=ü",
        SIGNATURE.replace("v1=", "v0="),
        SIGNATURE.upper(),
    ],
)
def test_what_is_no_signature_is_refused_without_an_error(signature: str) -> None:
    assert not verify(SECRET, MESSAGE_ID, BODY, signature, now=TIMESTAMP)


@given(signature=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_refused_without_an_error(signature: str) -> None:
    assert not verify(SECRET, MESSAGE_ID, BODY, signature, now=TIMESTAMP)


def test_two_secrets_sign_side_by_side_the_first_one_first_and_either_verifies() -> None:
    new, old = new_secret(), new_secret()
    now = int(datetime.now(UTC).timestamp())

    headers = signature_headers([new, old], MESSAGE_ID, now, BODY)

    alone = [signature_headers([secret], MESSAGE_ID, now, BODY) for secret in (new, old)]
    assert headers["webhook-signature"] == " ".join(h["webhook-signature"] for h in alone)
    codes = [h["X-Webhook-Signature"].partition("v1=")[2] for h in alone]
    assert headers["X-Webhook-Signature"] == f"t={now},v1={codes[0]},v1={codes[1]}"
    for secret, genuine in ((new, True), (old, True), (new_secret(), False)):
        signature = headers["X-Webhook-Signature"]
        assert verify(secret, MESSAGE_ID, BODY, signature, now=now) is genuine
    for secret in (new, old):
        assert Webhook(standard_secret(secret)).verify(BODY, headers) == {"amount": 1}
    with pytest.raises(WebhookVerificationError):
        Webhook(standard_secret(new_secret())).verify(BODY, headers)
