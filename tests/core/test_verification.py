"""Verifying as a receiver does: what is believed, why the rest is not, and as the client does."""

import base64
from collections.abc import Mapping

import pytest

from core.signing import (
    SignatureScheme,
    new_secret,
    public_key,
    signature_headers,
    standard_secret,
)
from core.verification import Fault, Verdict, verify, verifying_key
from postrider_client import WebhookRefused, verify_webhook

NOW = 1_800_000_000
BODY = b'{"amount": 4200, "name": "M\xc3\xbcller"}'
ID = "evt_1"
SECRET, PAIR = new_secret(), new_secret(SignatureScheme.ED25519)
PUBLIC = str(public_key(PAIR))
OWN, STANDARD = "X-Webhook-Signature", "webhook-signature"


def signed(
    *secrets: str, timestamp: int = NOW, body: bytes = BODY, prefix: str = ""
) -> dict[str, str]:
    return signature_headers(secrets or [SECRET], ID, timestamp, body, prefix)


def judged(
    headers: Mapping[str, str], *secrets: str, body: bytes = BODY, now: float = NOW
) -> Verdict:
    return verify([verifying_key(s) for s in secrets or [SECRET]], headers, body, now=now)


def trouble(verdict: Verdict) -> tuple[Fault | None, str, str]:
    assert verdict.trouble
    assert not verdict.valid
    return verdict.trouble.fault, verdict.trouble.header, verdict.trouble.detail


@pytest.mark.parametrize(
    ("signing", "secret"),
    [(SECRET, SECRET), (SECRET, standard_secret(SECRET)), (PAIR, PUBLIC)],
    ids=["secret", "standard", "key pair"],
)
def test_every_header_form_is_checked_with_every_spelling(signing: str, secret: str) -> None:
    verdict = judged(signed(signing, prefix="acme"), new_secret(), secret)

    assert verdict.valid
    assert [(c.header, c.key) for c in verdict.checks] == [
        (OWN, 1),
        (STANDARD, 1),
        ("acme-signature", 1),
    ]


@pytest.mark.parametrize("header", [OWN, STANDARD, "acme-signature"])
def test_one_wrong_header_among_right_ones_is_told(header: str) -> None:
    other = signed(new_secret(), prefix="acme")

    verdict = judged({**signed(prefix="acme"), header: other[header]})

    assert trouble(verdict)[:2] == (Fault.MISMATCH, header)
    assert [c.header for c in verdict.checks if c.fault] == [header]


def test_during_a_rotation_both_secrets_fit_and_it_is_told_which() -> None:
    after = new_secret()
    for secrets, key in (((SECRET,), 0), ((after,), 0), ((new_secret(), SECRET), 1)):
        assert {c.key for c in judged(signed(after, SECRET), *secrets).checks} == {key}


@pytest.mark.parametrize(
    ("arrived", "how"),
    [
        (BODY + b"\r\n", "white space"),
        (b'{ "amount":4200,"name" : "M\\u00fcller"}', "JSON"),
        (b'{"amount": 4200, "name": "other"}', "another webhook config's secret"),
    ],
)
def test_an_altered_body_is_explained_where_it_can_be(arrived: bytes, how: str) -> None:
    original = b'{"amount":4200,"name":"M\xc3\xbcller"}' if how == "JSON" else BODY

    fault, _, detail = trouble(judged(signed(body=original), body=arrived))

    assert fault is Fault.MISMATCH
    assert how in detail
    assert ("altered on the way: the signature fits" in detail) == (how in {"white space", "JSON"})


def test_the_other_scheme_says_which_key_is_wanted() -> None:
    assert trouble(judged(signed(PAIR), SECRET))[0] is Fault.SCHEME
    assert "whpk_" in trouble(judged(signed(PAIR), SECRET))[2]
    assert "whsec_" in trouble(judged(signed(SECRET), PUBLIC))[2]
    assert judged(signed(PAIR, SECRET), SECRET).valid


@pytest.mark.parametrize(("age", "how"), [(301, "too old: signed 301 s ago"), (-301, "ahead")])
def test_beyond_the_tolerance_the_age_is_told(age: int, how: str) -> None:
    fault, _, detail = trouble(judged(signed(), now=NOW + age))

    assert fault is Fault.TIMESTAMP
    assert how in detail
    assert judged(signed(), now=NOW + age / 301 * 300).valid


def test_what_is_not_ours_at_all_is_unsigned() -> None:
    assert trouble(judged({"content-type": "x"}))[0] is Fault.UNSIGNED


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-id": ""},
        {OWN: "t=1,t=2,v1=00"},
        {OWN: f"t={NOW}"},
        {"webhook-timestamp": "٣"},
        {STANDARD: "v2,AAAA"},
    ],
)
def test_headers_that_make_no_sense_are_malformed(change: dict[str, str]) -> None:
    assert trouble(judged(signed() | change))[0] is Fault.MALFORMED


@pytest.mark.parametrize(
    "text",
    [
        "",
        "whsk_AAAA",
        "whpk_AAAA",
        "whpk_%",
        "whsec_",
        "whsec_%",
        "0" * 63,
        "secret",
        "0" * 63 + "٣",
    ],
)
def test_what_is_no_key_is_refused_before_anything_is_verified(text: str) -> None:
    with pytest.raises(ValueError, match=r"key|secret"):
        verifying_key(text)


def test_a_public_key_is_never_taken_for_a_secret() -> None:
    forged = signature_headers([PUBLIC], ID, NOW, BODY)
    renamed = {name: value.replace("v1", "v1a") for name, value in forged.items()}
    for headers in (forged, renamed):
        assert not judged(headers, PUBLIC).valid


def other_header(value: str) -> dict[str, str]:
    return {"webhook-id": ID, OWN: value}


CASES = {
    "genuine": other_header(signed()[OWN]),
    "pair": other_header(signed(PAIR)[OWN]),
    "rotated": other_header(signed(new_secret(), SECRET)[OWN]),
    "stranger": other_header(signed(new_secret())[OWN]),
    "other body": other_header(signed(body=b"")[OWN]),
    "old": other_header(signed(timestamp=NOW - 301)[OWN]),
    "just": other_header(signed(timestamp=NOW - 300)[OWN]),
    "upper case": other_header(signed()[OWN].replace("v1=", "V1=")),
    "no id": {OWN: signed()[OWN]},
    "two times": other_header(signed()[OWN] + f",t={NOW}"),
    "other version": other_header(signed()[OWN].replace("v1=", "v2=")),
    "base64": other_header(f"t={NOW},v1={base64.b64encode(bytes(32)).decode()}"),
    "surrogate": other_header(f"t={NOW},v1=\udcff"),
    "empty": other_header(""),
}


@pytest.mark.parametrize("headers", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("secret", [SECRET, PUBLIC], ids=["secret", "public key"])
def test_the_client_of_the_wheel_says_the_same(headers: dict[str, str], secret: str) -> None:
    try:
        verify_webhook(secret, headers, BODY, now=NOW)
    except WebhookRefused:
        believed = False
    else:
        believed = True

    assert judged(headers, secret).valid == believed
