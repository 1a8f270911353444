"""Verification of webhooks that `core.signing` signed."""

import base64
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
from postrider_client import (
    Inspection,
    VerificationKey,
    WebhookRefused,
    inspect_webhook,
    verify_webhook,
)

NOW = 1_800_000_000
BODY = b'{"amount": 4200, "name": "M\xc3\xbcller"}'
ID = "evt_1"
SECRET, OTHER_SECRET = new_secret(), new_secret()
PAIR = new_secret(SignatureScheme.ED25519)
PUBLIC = str(public_key(PAIR))
OTHER_PUBLIC = str(public_key(new_secret(SignatureScheme.ED25519)))
OWN, STANDARD = "X-Webhook-Signature", "webhook-signature"


def signed(
    *secrets: str, timestamp: int = NOW, body: bytes = BODY, prefix: str = ""
) -> dict[str, str]:
    return signature_headers(secrets or [SECRET], ID, timestamp, body, prefix) | {
        "X-Webhook-Event": "payment.succeeded",
        "X-Webhook-Delivery": "dlv_1",
        "X-Webhook-Attempt": "2",
    }


def inspected(
    headers: Mapping[str, str], *secrets: str, body: bytes = BODY, now: float = NOW
) -> Inspection:
    keys = [VerificationKey.parse(secret) for secret in secrets or [SECRET]]
    return inspect_webhook(keys, headers, body, now=now)


def failure(inspection: Inspection) -> tuple[str, str]:
    assert inspection.failed
    assert not inspection.valid
    return inspection.failed.header, inspection.failed.error


def refused(
    secret: str | list[str],
    headers: Mapping[str, str],
    body: bytes = BODY,
    match: str | None = None,
) -> None:
    with pytest.raises(WebhookRefused, match=match):
        verify_webhook(secret, headers, body, now=NOW)


@pytest.mark.parametrize(
    ("signer", "key"),
    [(SECRET, SECRET), (SECRET, standard_secret(SECRET)), (PAIR, PUBLIC)],
    ids=["secret", "standard spelling", "key pair"],
)
def test_verify_accepts_signed_request(signer: str, key: str) -> None:
    webhook = verify_webhook(key, signed(signer), BODY, now=NOW)

    assert (webhook.id, webhook.timestamp, webhook.attempt) == (ID, NOW, 2)
    assert (webhook.event_type, webhook.delivery_id) == ("payment.succeeded", "dlv_1")
    inspection = inspected(signed(signer, prefix="acme"), OTHER_SECRET, key)
    assert inspection.valid
    assert [(c.header, c.key) for c in inspection.checks] == [
        (OWN, 1),
        (STANDARD, 1),
        ("acme-signature", 1),
    ]


def test_verify_ignores_case_of_header_names() -> None:
    for headers in (
        {name.lower(): value for name, value in signed().items()},
        {name.upper(): value for name, value in signed().items()},
    ):
        assert verify_webhook(SECRET, headers, BODY, now=NOW).id == ID


@pytest.mark.parametrize(
    "signers", [(SECRET, OTHER_SECRET), (OTHER_SECRET, SECRET)], ids=["first", "second"]
)
def test_one_valid_signature_is_enough_during_rotation(signers: tuple[str, str]) -> None:
    headers = signed(*signers)

    assert verify_webhook(SECRET, headers, BODY, now=NOW)
    assert verify_webhook(OTHER_SECRET, headers, BODY, now=NOW)
    assert {check.key for check in inspected(headers, new_secret(), SECRET).checks} == {1}
    refused(new_secret(), headers, match="signature")


def test_one_valid_secret_of_several_is_enough() -> None:
    others = [OTHER_SECRET, OTHER_PUBLIC]
    for secrets in ([SECRET, *others], [*others, standard_secret(SECRET)]):
        assert verify_webhook(secrets, signed(), BODY, now=NOW).id == ID
    assert verify_webhook([*others, PUBLIC], signed(PAIR), BODY, now=NOW).id == ID
    for none in (others, []):
        refused(none, signed(), match="signature")


@pytest.mark.parametrize("age", [-300, 0, 300])
def test_timestamp_may_differ_by_the_tolerance(age: int) -> None:
    assert verify_webhook(SECRET, signed(), BODY, now=NOW + age)
    assert inspected(signed(), now=NOW + age).valid


@pytest.mark.parametrize(("age", "error"), [(301, "too old: signed 301 s ago"), (-301, "ahead")])
def test_timestamp_beyond_the_tolerance_is_refused(age: int, error: str) -> None:
    for key, headers in ((SECRET, signed()), (PUBLIC, signed(PAIR))):
        with pytest.raises(WebhookRefused, match=error):
            verify_webhook(key, headers, BODY, now=NOW + age)
        assert verify_webhook(key, headers, BODY, 400, now=NOW + age)
    assert error in failure(inspected(signed(), now=NOW + age))[1]


def test_verify_uses_the_current_time_by_default() -> None:
    with pytest.raises(WebhookRefused, match="timestamp"):
        verify_webhook(SECRET, signed(timestamp=1), BODY)


@pytest.mark.parametrize(
    ("signer", "key"), [(SECRET, SECRET), (PAIR, PUBLIC)], ids=["secret", "key pair"]
)
def test_altered_request_is_refused(signer: str, key: str) -> None:
    headers = signed(signer)
    later = headers[OWN].replace(f"t={NOW}", f"t={NOW + 1}")
    stranger = new_secret(SignatureScheme.ED25519 if key == PUBLIC else SignatureScheme.HMAC_SHA256)
    for changed, body in (
        (headers, BODY + b" "),
        ({**headers, "webhook-id": "evt_2"}, BODY),
        ({**headers, OWN: later}, BODY),
        (signed(stranger), BODY),
    ):
        refused(key, changed, body, match="signature")


MALFORMED = {
    "missing": "",
    "no timestamp": "v1=00",
    "no signature": f"t={NOW}",
    "empty timestamp": "t=,v1=00",
    "negative timestamp": "t=-1,v1=00",
    "float timestamp": "t=1e9,v1=00",
    "Arabic digit": "t=٣,v1=00",
    "superscript digit": "t=²,v1=00",
    "long timestamp": f"t={'9' * 5000},v1=00",
    "empty parts": ",",
    "two timestamps": "t=1,t=2,v1=0",
    "other version": f"t={NOW},v2=00",
    "upper-case version": f"t={NOW},V1=00",
    "base64": f"t={NOW},v1={base64.b64encode(bytes(32)).decode()}",
    "no hex": f"t={NOW},v1a=zz",
    "short": f"t={NOW},v1a=00",
    "surrogate": f"t={NOW},v1=\udcff",
    "no ASCII": f"t={NOW},v1=é",
}


@pytest.mark.parametrize("value", MALFORMED.values(), ids=MALFORMED.keys())
@pytest.mark.parametrize("key", [SECRET, PUBLIC], ids=["secret", "public key"])
def test_malformed_signature_header_is_refused(key: str, value: str) -> None:
    refused(key, {**signed(), OWN: value})
    assert failure(inspected({**signed(), OWN: value}, key))[0] == OWN


@pytest.mark.parametrize("message_id", [None, "", "\udcff", "é"])
def test_request_without_usable_id_is_refused(message_id: str | None) -> None:
    headers = {name: value for name, value in signed().items() if name != "webhook-id"}
    refused(SECRET, headers if message_id is None else headers | {"webhook-id": message_id})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"webhook-id": ""}, "the id header is missing"),
        ({"webhook-timestamp": "٣"}, "no single timestamp"),
        ({STANDARD: "v2,AAAA"}, "no v1 or v1a signature"),
    ],
)
def test_malformed_standard_headers_are_reported(change: dict[str, str], error: str) -> None:
    assert error in failure(inspected(signed() | change))[1]


@pytest.mark.parametrize("header", [OWN, STANDARD, "acme-signature"])
def test_inspection_names_the_one_invalid_header(header: str) -> None:
    other = signed(OTHER_SECRET, prefix="acme")

    inspection = inspected({**signed(prefix="acme"), header: other[header]})

    assert failure(inspection)[0] == header
    assert [check.header for check in inspection.checks if check.error] == [header]


def test_request_without_signature_header_is_reported() -> None:
    assert "not from Postrider" in failure(inspected({"content-type": "x"}))[1]


@pytest.mark.parametrize(
    ("original", "arrived", "error"),
    [
        (BODY, BODY + b"\r\n", "without the white space"),
        (BODY + b"\n", BODY, "with a line break"),
        (b'{"name":"M\xc3\xbcller"}', b'{ "name" : "M\\u00fcller"}', "as compact JSON"),
        (BODY, b'{"amount": 1}', "another webhook config's secret"),
    ],
)
def test_inspection_explains_an_altered_body(original: bytes, arrived: bytes, error: str) -> None:
    found = failure(inspected(signed(body=original), body=arrived))[1]

    assert error in found
    assert ("altered on the way" in found) == (original != BODY or BODY in arrived)


def test_inspection_names_the_key_of_the_other_scheme() -> None:
    assert "whpk_" in failure(inspected(signed(PAIR), SECRET))[1]
    assert "whsec_" in failure(inspected(signed(SECRET), PUBLIC))[1]
    assert inspected(signed(PAIR, SECRET), SECRET).valid


@pytest.mark.parametrize("scheme", ["v1", "v1a"])
def test_public_key_never_verifies_an_hmac(scheme: str) -> None:
    """A public key is not secret, so anybody could make this HMAC."""
    forged = {
        name: value.replace("v1", scheme)
        for name, value in signature_headers([PUBLIC], ID, NOW, BODY).items()
    }
    assert f"{scheme}=" in forged[OWN]

    refused(PUBLIC, forged, match="signature")
    assert not inspected(forged, PUBLIC).valid


@pytest.mark.parametrize(
    "text",
    [
        *("", "secret", "0" * 63, "0" * 63 + "٣", "0a" * 32 + "\n"),
        *("whsk_AAAA", "whpk_", "whpk_AAAA", "whpk_%%%", "whsec_", "whsec_%%%"),
    ],
)
def test_unusable_key_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"key|secret"):
        verify_webhook(text, signed(), BODY, now=NOW)


def test_public_key_without_the_extra_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(RuntimeError, match=r"postrider-client\[ed25519\]"):
        verify_webhook(PUBLIC, signed(PAIR), BODY, now=NOW)
