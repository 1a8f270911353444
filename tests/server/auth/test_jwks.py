"""Which keys of a JWKS document the service uses, and from which URLs."""

from typing import Any

import jwt.algorithms
import pytest

from core.errors import ConfigurationError
from server.auth.jwks import JwksKeys, VerificationKey
from tests.support.jwks import (
    EC,
    EC_384,
    ED,
    ED_448,
    RSA,
    URL,
    WEAK_RSA,
    FakeIssuer,
    make_jwk,
    make_jwks,
)


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "HTTPS://id.example.com",
        "http://localhost:8080/jwks",
        "http://127.0.0.2/jwks",
        "http://[::1]:8080/jwks",
    ],
)
def test_url_may_be_https_or_loopback(url: str) -> None:
    JwksKeys(url, FakeIssuer(b""))


@pytest.mark.parametrize(
    "url",
    [
        "http://id.example.com/jwks",
        "http://10.0.0.1/jwks",
        "http://localhost.example.com/jwks",
        "http://127.0.0.1@evil.example/jwks",
        "http://127.0.0.1.evil.example/jwks",
        "file:///etc/passwd",
        "ftp://127.0.0.1/jwks",
        "https:///jwks",
        "https://[::1/jwks",
        "id.example.com",
        "",
    ],
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="WEBHOOK_JWT_JWKS_URL"):
        JwksKeys(url, FakeIssuer(b""))


async def test_key_is_found_by_its_kid(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    issuer.document = make_jwks(make_jwk(ED, "ed"), make_jwk(RSA, "rsa"), make_jwk(EC, "ec"))
    assert issuer.fetches == 0
    for kid, key in (("ed", ED), ("rsa", RSA), ("ec", EC)):
        assert await jwks.keys_for(kid) == (VerificationKey.of(key.public_key()),)
    assert await jwks.keys_for(None) == ()
    assert issuer.fetches == 1


@pytest.mark.parametrize("kid", ["ed", None])
async def test_only_key_of_a_set_serves_a_token_without_kid(
    issuer: FakeIssuer, jwks: JwksKeys, kid: str | None
) -> None:
    issuer.document = make_jwks(make_jwk(ED, kid), make_jwk(RSA, "encryption", use="enc"))
    assert await jwks.keys_for(None) == (VerificationKey.of(ED.public_key()),)
    assert await jwks.keys_for("other") == ()


UNUSABLE_JWKS = {
    "oct": {"kty": "oct", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LTEyMzQ"},
    "unknown kty": {"kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"},
    "no kty": {},
    "kty a list": {"kty": ["RSA"]},
    "weak RSA": make_jwk(WEAK_RSA),
    "P-384": make_jwk(EC_384),
    "Ed448": make_jwk(ED_448),
    "for encryption": make_jwk(RSA, use="enc"),
    "for another operation": make_jwk(RSA, key_ops=["encrypt"]),
    "key_ops a number": make_jwk(RSA, key_ops=1),
    "of another RSA algorithm": make_jwk(RSA, alg="PS256"),
    "claiming HMAC": make_jwk(RSA, alg="HS256"),
    "private": jwt.algorithms.OKPAlgorithm.to_jwk(ED, as_dict=True),
    "damaged": make_jwk(RSA, n="!"),
    "off the curve": make_jwk(EC, x="AAAA" * 10 + "AAA"),
    "a string": "key",
    "null": None,
}


@pytest.mark.parametrize("unusable", UNUSABLE_JWKS.values(), ids=UNUSABLE_JWKS.keys())
async def test_unusable_key_is_skipped(issuer: FakeIssuer, jwks: JwksKeys, unusable: Any) -> None:
    odd = unusable | {"kid": "odd"} if isinstance(unusable, dict) else unusable
    issuer.document = make_jwks(odd, make_jwk(ED, "ed"))
    assert await jwks.keys_for("odd") == ()
    assert await jwks.keys_for("ed") == (VerificationKey.of(ED.public_key()),)


async def test_first_key_of_a_kid_is_used(issuer: FakeIssuer, jwks: JwksKeys) -> None:
    issuer.document = make_jwks(make_jwk(ED, "same"), make_jwk(RSA, "same"))
    assert await jwks.keys_for("same") == (VerificationKey.of(ED.public_key()),)
