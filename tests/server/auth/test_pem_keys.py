"""Verification keys from a PEM file."""

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from core.errors import ConfigurationError
from server.auth.jwks import MAX_PEM_KEYS, PemKeys
from tests.support.certificates import Authority
from tests.support.jwks import EC, EC_384, ED, ED_448, RSA, WEAK_RSA, public_pem

DSA = dsa.generate_private_key(key_size=2048)


def private_pem(key: Any) -> bytes:
    return bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def load(path: Path, content: bytes) -> PemKeys:
    path.write_bytes(content)
    return PemKeys(path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "key.pem"


@pytest.mark.parametrize(
    ("content", "algorithm"),
    [
        (public_pem(RSA), "RS256"),
        (public_pem(RSA, PublicFormat.PKCS1), "RS256"),
        (public_pem(EC), "ES256"),
        (public_pem(ED), "EdDSA"),
        (b"the issuer's key, 2030\n" + public_pem(ED).replace(b"\n", b"\r\n"), "EdDSA"),
    ],
    ids=["RSA", "RSA PKCS1", "EC", "Ed25519", "with comment and CRLF"],
)
async def test_key_determines_its_algorithm_and_has_any_kid(
    path: Path, content: bytes, algorithm: str
) -> None:
    keys = load(path, content)
    (key,) = await keys.keys_for(None)
    assert key.algorithm == algorithm
    assert await keys.keys_for("any") == (key,)


async def test_file_may_hold_several_keys(path: Path) -> None:
    keys = await load(path, public_pem(RSA) + public_pem(ED) + public_pem(EC)).keys_for("any")
    assert [key.algorithm for key in keys] == ["RS256", "EdDSA", "ES256"]


UNUSABLE = {
    "empty": (b"", "is empty"),
    "SSH": (b"ssh-ed25519 AAAA user@example", "must hold 1 to 8"),
    "too many": (public_pem(ED) * (MAX_PEM_KEYS + 1), "must hold 1 to 8"),
    "private": (private_pem(RSA), "openssl pkey -pubout"),
    "public and private": (public_pem(ED) + private_pem(ED), "openssl pkey -pubout"),
    "certificate": (Authority().certificate, "openssl x509 -pubkey"),
    "weak RSA": (public_pem(WEAK_RSA), "2048 bits"),
    "P-384": (public_pem(EC_384), "P-256"),
    "Ed448": (public_pem(ED_448), "Ed25519"),
    "DSA": (public_pem(DSA), "Ed25519"),
    "damaged": (public_pem(ED).replace(b"MCow", b"AAAA"), "unusable"),
    "one good and one weak": (public_pem(ED) + public_pem(WEAK_RSA), "2048 bits"),
}


@pytest.mark.parametrize(("content", "error"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_file_has_a_one_line_error(path: Path, content: bytes, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error) as caught:
        load(path, content)
    assert caught.value.message.startswith(f"WEBHOOK_JWT_PUBLIC_KEY_FILE: {path} ")
    assert "\n" not in caught.value.message


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"absent\.pem cannot be read"):
        PemKeys(tmp_path / "absent.pem")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        PemKeys(tmp_path)


async def test_changed_file_is_loaded_unless_unusable(tmp_path: Path, logged: list[Any]) -> None:
    path = tmp_path / "key.pem"
    keys = load(path, public_pem(RSA))
    path.write_bytes(public_pem(EC) + public_pem(RSA))
    both = await keys.keys_for(None)
    assert [key.algorithm for key in both] == ["ES256", "RS256"]
    path.write_bytes(private_pem(RSA))
    assert await keys.keys_for(None) == both
    assert await keys.keys_for(None) == both
    assert [entry["event"] for entry in logged] == ["secret_file_loaded", "secret_file_unusable"]
