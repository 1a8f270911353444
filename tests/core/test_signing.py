"""Signatures of both schemes, checked with vectors and independent verifiers."""

import base64
import hashlib
import hmac
import re
from datetime import UTC, datetime

import pytest
import svix.webhooks
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from core.ids import format_id, new_id
from core.signing import (
    SignatureScheme,
    new_secret,
    public_key,
    signature_headers,
    standard_secret,
)
from tests.support.signatures import is_genuine

SECRET = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
MESSAGE_ID = "evt_01890a5dac96774bbcceb302099a8057"
TIMESTAMP = 1_767_323_045
BODY = b'{"amount": 1}'
SIGNATURE = signature_headers([SECRET], MESSAGE_ID, TIMESTAMP, BODY)["X-Webhook-Signature"]

BODIES = st.binary(max_size=200)


def test_headers_match_an_independent_computation() -> None:
    signed = b"evt_01890a5dac96774bbcceb302099a8057" + b".1767323045." + b'{"amount": 1}'
    code = hmac.new(SECRET.encode("ascii"), signed, hashlib.sha256)

    assert signature_headers([SECRET], MESSAGE_ID, TIMESTAMP, BODY) == {
        "webhook-id": "evt_01890a5dac96774bbcceb302099a8057",
        "webhook-timestamp": "1767323045",
        "webhook-signature": "v1," + base64.b64encode(code.digest()).decode(),
        "X-Webhook-Signature": "t=1767323045,v1=" + code.hexdigest(),
    }


def test_signature_matches_the_openssl_vector() -> None:
    # `printf '%s' 'evt_….1767323045.{"amount": 1}' | openssl dgst -sha256 -hmac "$SECRET"`
    assert SIGNATURE == (
        "t=1767323045,v1=670ad683b12f544220b1f84adb9a538324ca4e7e60a9fd7bf5d874e1143791d5"
    )


def test_new_secret_is_64_random_hexadecimal_digits() -> None:
    secrets = {new_secret() for _ in range(100)}

    assert len(secrets) == 100
    assert all(re.fullmatch(r"[0-9a-f]{64}", secret) for secret in secrets)


@given(body=st.text(st.characters(exclude_categories=["Cs"])))
def test_standard_webhooks_library_verifies_any_text(body: str) -> None:
    secret, message_id = new_secret(), format_id("evt", new_id())
    now = int(datetime.now(UTC).timestamp())

    headers = signature_headers([secret], message_id, now, body.encode())

    Webhook(standard_secret(secret)).verify(body.encode(), headers, json_parse=False)


def test_standard_webhooks_library_refuses_altered_requests() -> None:
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


@given(body=BODIES, other=BODIES, timestamp=st.integers(0, 10**11))
def test_signature_is_valid_for_one_body_only(body: bytes, other: bytes, timestamp: int) -> None:
    signature = signature_headers([SECRET], MESSAGE_ID, timestamp, body)["X-Webhook-Signature"]

    assert is_genuine(SECRET, MESSAGE_ID, body, signature, now=timestamp)
    assert is_genuine(SECRET, MESSAGE_ID, other, signature, now=timestamp) == (body == other)


@given(index=st.integers(0, len(SIGNATURE) - 1), character=st.sampled_from("0123456789abcdefg,=tv"))
def test_signature_with_a_changed_character_is_invalid(index: int, character: str) -> None:
    changed = SIGNATURE[:index] + character + SIGNATURE[index + 1 :]

    accepted = is_genuine(SECRET, MESSAGE_ID, BODY, changed, now=TIMESTAMP)

    assert accepted == (changed == SIGNATURE)


@given(signature=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_invalid(signature: str) -> None:
    assert not is_genuine(SECRET, MESSAGE_ID, BODY, signature, now=TIMESTAMP)


def test_two_secrets_sign_in_order_and_either_verifies() -> None:
    new, old = new_secret(), new_secret()
    now = int(datetime.now(UTC).timestamp())

    headers = signature_headers([new, old], MESSAGE_ID, now, BODY)

    alone = [signature_headers([secret], MESSAGE_ID, now, BODY) for secret in (new, old)]
    assert headers["webhook-signature"] == " ".join(h["webhook-signature"] for h in alone)
    codes = [h["X-Webhook-Signature"].partition("v1=")[2] for h in alone]
    assert headers["X-Webhook-Signature"] == f"t={now},v1={codes[0]},v1={codes[1]}"
    for secret, genuine in ((new, True), (old, True), (new_secret(), False)):
        signature = headers["X-Webhook-Signature"]
        assert is_genuine(secret, MESSAGE_ID, BODY, signature, now=now) is genuine
    for secret in (new, old):
        assert Webhook(standard_secret(secret)).verify(BODY, headers) == {"amount": 1}
    with pytest.raises(WebhookVerificationError):
        Webhook(standard_secret(new_secret())).verify(BODY, headers)


@pytest.mark.parametrize("prefix", ["", "svix"])
def test_svix_library_verifies_with_and_without_prefix(prefix: str) -> None:
    secret, now = new_secret(), int(datetime.now(UTC).timestamp())
    headers = signature_headers([secret], MESSAGE_ID, now, BODY, prefix)
    library = svix.webhooks.Webhook(standard_secret(secret))
    library.verify(BODY, headers)
    if prefix:
        # The library prefers these headers.
        library.verify(BODY, {k: v for k, v in headers.items() if k.startswith("svix-")})
    with pytest.raises(WebhookVerificationError):
        library.verify(BODY + b" ", headers)
    with pytest.raises(WebhookVerificationError):
        svix.webhooks.Webhook(standard_secret(new_secret())).verify(BODY, headers)


def test_signature_matches_the_standard_webhooks_vector() -> None:
    # Our keys have another form, so the vector first validates the library used for comparison.
    library = Webhook("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    message_id, timestamp, body = "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, '{"test": 2432232314}'
    published = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert library.sign(message_id, datetime.fromtimestamp(timestamp, UTC), body) == published

    ours = signature_headers([SECRET], message_id, timestamp, body.encode())
    theirs = Webhook(standard_secret(SECRET)).sign(
        message_id, datetime.fromtimestamp(timestamp, UTC), body
    )
    assert ours["webhook-signature"] == theirs


def test_prefix_adds_three_headers() -> None:
    plain = signature_headers([SECRET], MESSAGE_ID, TIMESTAMP, BODY)
    prefixed = signature_headers([SECRET], MESSAGE_ID, TIMESTAMP, BODY, "acme-hooks")
    assert prefixed == plain | {
        "acme-hooks-id": plain["webhook-id"],
        "acme-hooks-timestamp": plain["webhook-timestamp"],
        "acme-hooks-signature": plain["webhook-signature"],
    }


# RFC 8032, section 7.1, tests 1 to 3: private key, public key.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
    ),
]


@pytest.mark.parametrize(("private", "public"), RFC_8032)
def test_public_keys_match_rfc_8032_vectors(private: str, public: str) -> None:
    pair = "whsk_" + base64.b64encode(bytes.fromhex(private + public)).decode()
    assert public_key(pair) == "whpk_" + base64.b64encode(bytes.fromhex(public)).decode()


def test_new_key_pair_holds_private_and_public_key() -> None:
    pairs = {new_secret(SignatureScheme.ED25519) for _ in range(20)}
    assert len(pairs) == 20
    for pair in pairs:
        raw = base64.b64decode(pair.removeprefix("whsk_"), validate=True)
        assert len(raw) == 64
        assert public_key(pair) == "whpk_" + base64.b64encode(raw[32:]).decode()
    assert public_key(new_secret()) is None


@given(body=BODIES, other=BODIES)
def test_key_pair_signature_is_valid_for_one_body_and_pair(body: bytes, other: bytes) -> None:
    pair, stranger = (new_secret(SignatureScheme.ED25519) for _ in range(2))
    headers = signature_headers([pair], MESSAGE_ID, TIMESTAMP, body)
    version, _, encoded = headers["webhook-signature"].partition(",")
    signature = base64.b64decode(encoded, validate=True)
    assert version == "v1a"
    assert headers["X-Webhook-Signature"] == f"t={TIMESTAMP},v1a={signature.hex()}"
    signed = f"{MESSAGE_ID}.{TIMESTAMP}.".encode()
    _public(pair).verify(signature, signed + body)
    for key, claimed in ((_public(stranger), body), (_public(pair), other + b"!")):
        with pytest.raises(InvalidSignature):
            key.verify(signature, signed + claimed)


def test_change_of_scheme_signs_with_both_schemes() -> None:
    pair, before = new_secret(SignatureScheme.ED25519), new_secret()
    now = int(datetime.now(UTC).timestamp())
    headers = signature_headers([pair, before], MESSAGE_ID, now, BODY)
    versions = [s.partition(",")[0] for s in headers["webhook-signature"].split(" ")]
    assert versions == ["v1a", "v1"]
    Webhook(standard_secret(before)).verify(BODY, headers)
    svix.webhooks.Webhook(standard_secret(before)).verify(BODY, headers)
    assert is_genuine(before, MESSAGE_ID, BODY, headers["X-Webhook-Signature"], now=now)
    signature = base64.b64decode(headers["webhook-signature"].split(" ")[0].partition(",")[2])
    _public(pair).verify(signature, f"{MESSAGE_ID}.{now}.".encode() + BODY)


def _public(pair: str) -> Ed25519PublicKey:
    text = public_key(pair)
    assert text is not None
    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text.removeprefix("whpk_")))
