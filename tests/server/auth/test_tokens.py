"""Verification of tokens. Bad tokens have a valid signature unless the test is about it."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from core.errors import Unauthenticated
from server.auth import tokens
from server.auth.jwks import VerificationKey
from server.auth.principal import Principal, Scope
from server.auth.tokens import TokenVerifier, token_refused
from tests.support.clock import ManualClock
from tests.support.jwks import EC, ED, RSA, public_pem

NOW = 1_800_000_000
ISSUER = "https://id.example.com/"
AUDIENCE = "postrider"
LIFETIME = 3600
LEEWAY = 30

OTHER_ED = Ed25519PrivateKey.generate()
OTHER_RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)

Signer = Callable[[bytes], bytes]


def sign_rsa(key: RSAPrivateKey, digest: hashes.HashAlgorithm | None = None) -> Signer:
    return lambda data: key.sign(data, padding.PKCS1v15(), digest or hashes.SHA256())


def sign_ec(data: bytes) -> bytes:
    r, s = decode_dss_signature(EC.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def sign_hmac(secret: bytes) -> Signer:
    return lambda data: hmac.digest(secret, data, hashlib.sha256)


def encode(part: bytes | dict[str, Any]) -> bytes:
    raw = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def make_jws(header: dict[str, Any], payload: bytes | dict[str, Any], sign: Signer) -> str:
    signing_input = encode(header) + b"." + encode(payload)
    return (signing_input + b"." + encode(sign(signing_input))).decode()


class Absent:
    """As the value of a claim: the token does not have it."""


def present(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not Absent}


def make_claims(**changes: Any) -> dict[str, Any]:
    claims = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "svc-payments",
        "iat": NOW - 60,
        "exp": NOW + 600,
        "scope": "webhooks:manage events:publish",
        "merchant_id": "m_42",
    } | changes
    return present(claims)


def with_claims(**changes: Any) -> str:
    return make_jws({"alg": "EdDSA", "kid": "ed"}, make_claims(**changes), ED.sign)


def with_header(*, sign: Signer | None = None, **changes: Any) -> str:
    header = {"alg": "EdDSA", "kid": "ed", "typ": "JWT"} | changes
    return make_jws(present(header), make_claims(), sign or ED.sign)


def with_other_payload() -> str:
    header, _, signature = with_claims().split(".")
    return f"{header}.{encode(make_claims(merchant_id='m_43')).decode()}.{signature}"


class FakeKeys:
    """A key source whose keys the test changes."""

    def __init__(self) -> None:
        self.asked: list[str | None] = []
        self.keys: dict[str, tuple[VerificationKey, ...]] = {
            "ed": (VerificationKey.of(ED.public_key()),),
            "rsa": (VerificationKey.of(RSA.public_key()),),
            "ec": (VerificationKey.of(EC.public_key()),),
        }

    async def keys_for(self, kid: str | None) -> tuple[VerificationKey, ...]:
        self.asked.append(kid)
        return self.keys.get(kid or "", ())


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(NOW)


@pytest.fixture
def verifier(keys: FakeKeys, clock: ManualClock) -> TokenVerifier:
    return TokenVerifier(
        keys, issuer=ISSUER, audience=AUDIENCE, max_lifetime_seconds=LIFETIME, clock=clock
    )


BAD_TOKENS = {
    "expired": with_claims(iat=NOW - 600, exp=NOW - LEEWAY),
    "no exp": with_claims(exp=Absent),
    "exp null": with_claims(exp=None),
    "exp a string": with_claims(exp=str(NOW + 600)),
    "exp true": with_claims(exp=True),
    "exp a float": with_claims(exp=NOW + 600.5),
    "exp infinite": with_claims(exp=float("inf")),
    "exp not a number": with_claims(exp=float("nan")),
    "exp far in the future": with_claims(exp=10**12),
    "exp with 300 digits": with_claims(exp=10**300),
    "exp one second beyond the lifetime": with_claims(iat=NOW, exp=NOW + LIFETIME + 1),
    "exp before iat": with_claims(iat=NOW + 20, exp=NOW + 10),
    "no iat": with_claims(iat=Absent),
    "iat a float": with_claims(iat=NOW - 60.0),
    "iat in the future": with_claims(iat=NOW + LEEWAY + 1, exp=NOW + 600),
    "iat in the future after nbf": with_claims(iat=NOW + LEEWAY + 1, nbf=NOW, exp=NOW + 600),
    "nbf in the future": with_claims(nbf=NOW + LEEWAY + 1),
    "nbf a string": with_claims(nbf="0"),
    "nbf infinite": with_claims(nbf=float("-inf")),
    "no aud": with_claims(aud=Absent),
    "aud foreign": with_claims(aud="billing"),
    "aud with a suffix": with_claims(aud="postrider-admin"),
    "aud a foreign list": with_claims(aud=["billing", "postrider2"]),
    "aud a list with a number": with_claims(aud=["postrider", 1]),
    "aud an object": with_claims(aud={"postrider": True}),
    "no iss": with_claims(iss=Absent),
    "iss foreign": with_claims(iss="https://id.example.org/"),
    "iss shortened": with_claims(iss=ISSUER[:-1]),
    "iss with a suffix": with_claims(iss=ISSUER + "evil"),
    "iss a list": with_claims(iss=[ISSUER]),
    "no sub": with_claims(sub=Absent),
    "sub empty": with_claims(sub=""),
    "sub a number": with_claims(sub=7),
    "sub too long": with_claims(sub="s" * 256),
    "sub with a NUL": with_claims(sub="svc\x00"),
    "sub with half a surrogate pair": with_claims(sub="svc\ud800"),
    "merchant_id null": with_claims(merchant_id=None),
    "merchant_id empty": with_claims(merchant_id=""),
    "merchant_id a number": with_claims(merchant_id=42),
    "merchant_id with a quote": with_claims(merchant_id="m' OR '1'='1"),
    "merchant_id with a newline": with_claims(merchant_id="m_42\n"),
    "merchant_id not ASCII": with_claims(merchant_id="m_４２"),
    "merchant_id too long": with_claims(merchant_id="m" * 65),
    "scope a number": with_claims(scope=1),
    "scope a list with a number": with_claims(scope=["webhooks:admin", 1]),
    "payload a list": make_jws({"alg": "EdDSA", "kid": "ed"}, b"[]", ED.sign),
    "payload not JSON": make_jws({"alg": "EdDSA", "kid": "ed"}, b"{", ED.sign),
    "payload nested deeply": make_jws({"alg": "EdDSA", "kid": "ed"}, b"[" * 2500, ED.sign),
    "payload tampered with": with_other_payload(),
    "alg none without a signature": with_header(alg="none", sign=lambda _: b""),
    "alg None with a valid signature": with_header(alg="None"),
    "no alg": with_header(alg=Absent),
    "alg a list": with_header(alg=["EdDSA"]),
    "HS256 with the public key as its secret": with_header(
        alg="HS256", kid="rsa", sign=sign_hmac(public_pem(RSA))
    ),
    "HS256 with the Ed25519 public key": with_header(alg="HS256", sign=sign_hmac(public_pem(ED))),
    "HS256 with an empty secret": with_header(alg="HS256", sign=sign_hmac(b"")),
    "RS256 by another key": with_header(alg="RS256", kid="rsa", sign=sign_rsa(OTHER_RSA)),
    "RS512 by the RSA key": with_header(
        alg="RS512", kid="rsa", sign=sign_rsa(RSA, hashes.SHA512())
    ),
    "RS256 in the header of EdDSA": with_header(alg="RS256"),
    "EdDSA with the kid of the RSA key": with_header(kid="rsa"),
    "EdDSA by another key": with_header(sign=OTHER_ED.sign),
    "no signature": with_header(sign=lambda _: b""),
    "no kid": with_header(kid=Absent),
    "kid unknown": with_header(kid="retired"),
    "kid a path": with_header(kid="../../../../dev/null"),
    "kid SQL": with_header(kid="x' UNION SELECT 'secret' --"),
    "kid a number": with_header(kid=1),
    "kid null": with_header(kid=None),
    "crit unknown": with_header(crit=["exp"]),
    "crit b64": with_header(crit=["b64"], b64=True),
    "b64 false": with_header(b64=False),
    "jwk of the forger in the header": with_header(
        sign=OTHER_ED.sign,
        jwk={
            "kty": "OKP",
            "crv": "Ed25519",
            "x": encode(OTHER_ED.public_key().public_bytes_raw()).decode(),
        },
    ),
    "jku of the forger": with_header(sign=OTHER_ED.sign, jku="https://evil.example/jwks"),
    "x5u of the forger": with_header(sign=OTHER_ED.sign, x5u="https://evil.example/cert"),
    "5 KiB": with_claims(padding="x" * 3800),
    "5 MiB": "e" * 5 * 1024 * 1024,
    "empty": "",
    "not a JWT": "hunter2",
    "only dots": "..",
    "five parts": with_claims() + ".AAAA.AAAA",
    "not ASCII": with_claims() + "é",
    "half a surrogate pair": "\ud800.e30.",
    "a space before": " " + with_claims(),
    "a newline behind": with_claims() + "\n",
}


@pytest.mark.parametrize("token", BAD_TOKENS.values(), ids=BAD_TOKENS.keys())
async def test_bad_token_has_the_same_error(verifier: TokenVerifier, token: str) -> None:
    with pytest.raises(Unauthenticated) as caught:
        await verifier.verify(token)
    assert caught.value.message == token_refused().message
    assert caught.value.reason == "TOKEN_INVALID"
    assert caught.value.__cause__ is None


async def test_each_changed_character_makes_the_token_bad(verifier: TokenVerifier) -> None:
    token = with_claims()
    await verifier.verify(token)
    for position, character in enumerate(token):
        changed = token[:position] + ("A" if character != "A" else "B") + token[position + 1 :]
        with pytest.raises(Unauthenticated):
            await verifier.verify(changed)


@pytest.mark.parametrize(
    ("algorithm", "kid", "sign"),
    [
        ("EdDSA", "ed", ED.sign),
        ("RS256", "rsa", sign_rsa(RSA)),
        ("ES256", "ec", sign_ec),
    ],
)
async def test_good_token_becomes_a_principal(
    verifier: TokenVerifier, algorithm: str, kid: str, sign: Signer
) -> None:
    token = with_header(alg=algorithm, kid=kid, sign=sign)
    assert await verifier.verify(token) == Principal(
        subject="svc-payments",
        merchant_id="m_42",
        scopes=frozenset({Scope.MANAGE, Scope.PUBLISH}),
        expires_at=NOW + 600,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["billing", AUDIENCE]},
        {"exp": NOW - LEEWAY + 1},
        {"iat": NOW + LEEWAY},
        {"nbf": NOW + LEEWAY},
        {"iat": NOW, "exp": NOW + LIFETIME},
        {"merchant_id": "m" * 64},
        {"sub": "auth0|José"},
        {"unknown": {"claims": ["are", "ignored"]}},
    ],
    ids=repr,
)
async def test_token_at_a_limit_is_good(verifier: TokenVerifier, changes: dict[str, Any]) -> None:
    await verifier.verify(with_claims(**changes))


@pytest.mark.parametrize(
    ("changes", "scopes"),
    [
        ({"scope": "webhooks:admin"}, {"webhooks:admin"}),
        ({"scope": "  a   b "}, {"a", "b"}),
        ({"scope": ["a", "b"]}, {"a", "b"}),
        ({"scope": Absent, "scp": ["a", "b"]}, {"a", "b"}),
        ({"scope": Absent, "scp": "a b"}, {"a", "b"}),
        ({"scope": ""}, set()),
        ({"scope": Absent}, set()),
    ],
)
async def test_scopes_may_have_several_forms(
    verifier: TokenVerifier, changes: dict[str, Any], scopes: set[str]
) -> None:
    assert (await verifier.verify(with_claims(**changes))).scopes == scopes


async def test_each_candidate_key_verifies_its_own_algorithm_only(
    verifier: TokenVerifier, keys: FakeKeys
) -> None:
    keys.keys = {"": keys.keys["rsa"] + keys.keys["ec"] + keys.keys["ed"]}
    assert await verifier.verify(with_header(kid=Absent))
    assert await verifier.verify(with_header(kid=Absent, alg="RS256", sign=sign_rsa(RSA)))
    with pytest.raises(Unauthenticated):
        await verifier.verify(with_header(kid=Absent, alg="HS256", sign=sign_hmac(public_pem(RSA))))


async def test_known_token_is_not_verified_again(
    verifier: TokenVerifier, keys: FakeKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await verifier.verify(with_claims())
    monkeypatch.delattr(jwt, "decode")
    assert await verifier.verify(with_claims()) is first
    # The same key, loaded again.
    keys.keys["ed"] = (VerificationKey.of(ED.public_key()),)
    assert await verifier.verify(with_claims()) is first
    assert keys.asked == ["ed"] * 3


async def test_known_token_still_expires(verifier: TokenVerifier, clock: ManualClock) -> None:
    await verifier.verify(with_claims())
    clock.now = NOW + 600 + LEEWAY - 1
    await verifier.verify(with_claims())
    clock.now = NOW + 600 + LEEWAY
    with pytest.raises(Unauthenticated):
        await verifier.verify(with_claims())


async def test_known_token_is_refused_once_its_key_is_withdrawn(
    verifier: TokenVerifier, keys: FakeKeys
) -> None:
    await verifier.verify(with_claims())
    keys.keys["ed"] = (VerificationKey.of(OTHER_ED.public_key()),)
    with pytest.raises(Unauthenticated):
        await verifier.verify(with_claims())


async def test_known_token_is_recalled_without_its_key(
    verifier: TokenVerifier, keys: FakeKeys, clock: ManualClock
) -> None:
    assert verifier.recall(with_claims()) is None
    caller = await verifier.verify(with_claims())
    clock.now += tokens.RECALL_SECONDS - 0.1
    assert verifier.recall(with_claims()) is caller
    assert verifier.recall(with_claims(jti="other")) is None
    assert keys.asked == ["ed"]

    clock.now += 0.1
    assert verifier.recall(with_claims()) is None
    assert await verifier.verify(with_claims()) is caller
    assert verifier.recall(with_claims()) is caller
    # The clock goes backwards.
    clock.now -= 1
    assert verifier.recall(with_claims()) is None


async def test_recall_ends_with_the_token_or_its_key(
    verifier: TokenVerifier, keys: FakeKeys, clock: ManualClock
) -> None:
    clock.now = NOW + 600 + LEEWAY - 0.5
    await verifier.verify(with_claims())
    clock.now = NOW + 600 + LEEWAY
    assert verifier.recall(with_claims()) is None

    clock.now = NOW
    await verifier.verify(with_claims())
    keys.keys["ed"] = ()
    clock.now += tokens.RECALL_SECONDS
    assert verifier.recall(with_claims()) is None
    with pytest.raises(Unauthenticated):
        await verifier.verify(with_claims())
    clock.now = NOW
    assert verifier.recall(with_claims()) is None


@pytest.mark.parametrize("token", ["x" * (tokens.MAX_TOKEN_BYTES + 1), "tökén"])
def test_recall_refuses_an_impossible_token(verifier: TokenVerifier, token: str) -> None:
    with pytest.raises(Unauthenticated):
        verifier.recall(token)


async def test_known_tokens_are_bounded_and_the_oldest_is_dropped(
    verifier: TokenVerifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_REMEMBERED_TOKENS", 3)
    made = [with_claims(jti=str(number)) for number in range(5)]
    for token in made:
        await verifier.verify(token)
    assert len(verifier._remembered) == 3
    monkeypatch.delattr(jwt, "decode")
    await verifier.verify(made[2])
    with pytest.raises(AttributeError):
        await verifier.verify(made[1])


async def test_bad_token_is_not_remembered(verifier: TokenVerifier) -> None:
    with pytest.raises(Unauthenticated):
        await verifier.verify(BAD_TOKENS["kid unknown"])
    assert verifier._remembered == {}
