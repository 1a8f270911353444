"""Keys, key sets and an issuer for tests of token verification."""

import asyncio
import json
from typing import Any

import jwt.algorithms
from cryptography.hazmat.primitives.asymmetric import ec, ed448, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

URL = "https://id.example.com/jwks"
ED = Ed25519PrivateKey.generate()
EC = ec.generate_private_key(ec.SECP256R1())
RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
#: Keys that the service refuses.
EC_384 = ec.generate_private_key(ec.SECP384R1())
ED_448 = ed448.Ed448PrivateKey.generate()
WEAK_RSA = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505


def public_pem(key: Any, form: PublicFormat = PublicFormat.SubjectPublicKeyInfo) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, form))


def make_jwk(key: Any = ED, kid: str | None = "ed", **members: Any) -> dict[str, Any]:
    algorithm: Any = jwt.algorithms.OKPAlgorithm
    if isinstance(key, rsa.RSAPrivateKey):
        algorithm = jwt.algorithms.RSAAlgorithm
    elif isinstance(key, ec.EllipticCurvePrivateKey):
        algorithm = jwt.algorithms.ECAlgorithm
    jwk: dict[str, Any] = algorithm.to_jwk(key.public_key(), as_dict=True)
    jwk.pop("key_ops", None)
    return jwk | ({} if kid is None else {"kid": kid}) | members


def make_jwks(*jwks: Any) -> bytes:
    return json.dumps({"keys": jwks}).encode()


class FakeIssuer:
    """Returns or raises `document` and counts the fetches. Waits while `gate` is not set."""

    def __init__(self, document: bytes | Exception):
        self.document = document
        self.fetches = 0
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, url: str) -> bytes:
        assert url == URL
        self.fetches += 1
        self.begun.set()
        await self.gate.wait()
        if isinstance(self.document, Exception):
            raise self.document
        return self.document
