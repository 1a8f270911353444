import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from cli.dev import signing_key as development_key
from cli.dev.signing_key import DevelopmentKey, ensure_development_key, mint_token
from core.errors import ConfigurationError
from server.auth.jwks import PemKeys
from server.auth.principal import Principal
from server.auth.tokens import TokenVerifier


def mint(pair: DevelopmentKey, **changes: Any) -> str:
    arguments: dict[str, Any] = {
        "issuer": "postrider-development",
        "audience": "postrider",
        "subject": "developer",
        "scopes": ("webhooks:manage", "events:publish"),
        "merchant_id": "m_1",
        "lifetime": timedelta(hours=1),
    }
    return mint_token(pair.private_key_file, **(arguments | changes))


async def verify(pair: DevelopmentKey, token: str) -> Principal:
    verifier = TokenVerifier(
        PemKeys(pair.public_key_file),
        issuer="postrider-development",
        audience="postrider",
        max_lifetime_seconds=3600,
    )
    return await verifier.verify(token)


async def test_minted_token_is_accepted_by_the_server(tmp_path: Path) -> None:
    pair = ensure_development_key(tmp_path)
    caller = await verify(pair, mint(pair))
    assert caller.subject == "developer"
    assert caller.merchant_id == "m_1"
    assert caller.scopes == {"webhooks:manage", "events:publish"}


async def test_token_of_no_merchant_names_none(tmp_path: Path) -> None:
    pair = ensure_development_key(tmp_path)
    assert (await verify(pair, mint(pair, merchant_id=None))).merchant_id is None


def test_pair_is_its_owners_alone(tmp_path: Path) -> None:
    pair = ensure_development_key(tmp_path / "new" / "keys")
    assert pair.private_key_file.name == "private.pem"
    assert pair.public_key_file.name == "public.pem"
    for path in (pair.private_key_file, pair.public_key_file):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(pair.private_key_file.parent.stat().st_mode) == 0o700


def test_pair_is_kept_when_present(tmp_path: Path) -> None:
    pair = ensure_development_key(tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    assert ensure_development_key(tmp_path) == pair
    after = {path.name: (path.read_bytes(), path.stat().st_ino) for path in tmp_path.iterdir()}
    assert after == before
    assert set(after) == {"private.pem", "public.pem"}


@pytest.mark.parametrize("content", [None, b"of another pair"])
async def test_public_key_is_made_again_from_the_private_one(
    tmp_path: Path, content: bytes | None
) -> None:
    pair = ensure_development_key(tmp_path)
    token = mint(pair)
    if content is None:
        pair.public_key_file.unlink()
    else:
        pair.public_key_file.write_bytes(content)
    ensure_development_key(tmp_path)
    await verify(pair, token)


async def test_processes_that_start_at_once_agree_on_one_pair(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as threads:
        pairs = list(threads.map(ensure_development_key, [tmp_path] * 16))
    assert len(set(pairs)) == 1
    await verify(pairs[0], mint(pairs[0]))
    assert set(os.listdir(tmp_path)) == {"private.pem", "public.pem"}


def test_private_key_made_meanwhile_by_another_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ensure_development_key(tmp_path / "theirs").private_key_file.read_bytes()
    private_key_file = tmp_path / "private.pem"
    private_pem = development_key._private_pem

    def the_other_comes_first(key: Ed25519PrivateKey) -> bytes:
        private_key_file.write_bytes(theirs)
        return private_pem(key)

    monkeypatch.setattr(development_key, "_private_pem", the_other_comes_first)
    ensure_development_key(tmp_path)
    assert private_key_file.read_bytes() == theirs


def test_broken_private_key_is_reported_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "private.pem"
    path.write_bytes(b"broken")
    with pytest.raises(ConfigurationError, match="delete it"):
        ensure_development_key(tmp_path)
    assert path.read_bytes() == b"broken"


def test_key_of_another_kind_is_not_used(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path = tmp_path / "private.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ConfigurationError, match="Ed25519"):
        mint(DevelopmentKey(path, path))


def test_absent_key_and_unusable_directory_are_named(tmp_path: Path) -> None:
    absent = tmp_path / "absent.pem"
    with pytest.raises(ConfigurationError, match=r"absent\.pem cannot be read"):
        mint(DevelopmentKey(absent, absent))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot write a development key"):
        ensure_development_key(tmp_path / "file")
