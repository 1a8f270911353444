"""Encryption of secrets at rest, and the configured keys."""

import base64
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from core.encryption import KeyRing, UndecryptableSecret, load_keyring, new_key
from core.errors import ConfigurationError
from core.settings import EncryptionSettings
from core.signing import new_secret

OLD, NEW = bytes(range(32)), bytes(range(32, 64))
ROW, OTHER_ROW = uuid.UUID(int=1), uuid.UUID(int=2)
RING = KeyRing({"k1": OLD})


@given(secret=st.text(st.characters(exclude_categories=["Cs"])), row=st.uuids())
def test_decrypt_reverses_encrypt(secret: str, row: uuid.UUID) -> None:
    key_id, record = RING.encrypt(secret, row)

    assert RING.decrypt(key_id, record, row) == secret


def test_record_hides_the_secret_and_is_unique() -> None:
    secret = new_secret()
    records = {RING.encrypt(secret, ROW)[1] for _ in range(100)}

    assert len({record[:12] for record in records}) == 100
    assert not any(secret.encode() in record for record in records)


@given(index=st.integers(0, 12 + 64 + 16 - 1), bit=st.integers(0, 7))
def test_record_with_a_flipped_bit_does_not_decrypt(index: int, bit: int) -> None:
    key_id, record = RING.encrypt("s" * 64, ROW)
    tampered = bytearray(record)
    tampered[index] ^= 1 << bit

    with pytest.raises(UndecryptableSecret):
        RING.decrypt(key_id, bytes(tampered), ROW)


@pytest.mark.parametrize(
    ("ring", "row"),
    [(RING, OTHER_ROW), (KeyRing({"k1": NEW}), ROW)],
    ids=["other row", "other key"],
)
def test_record_decrypts_only_in_its_row_and_by_its_key(ring: KeyRing, row: uuid.UUID) -> None:
    key_id, record = RING.encrypt("secret", ROW)

    with pytest.raises(UndecryptableSecret):
        ring.decrypt(key_id, record, row)


def test_record_of_an_unknown_key_names_the_key() -> None:
    with pytest.raises(UndecryptableSecret, match="'k9'"):
        RING.decrypt("k9", b"\0" * 60, ROW)


def test_first_key_encrypts_and_every_key_decrypts() -> None:
    old_id, old_record = RING.encrypt("old", ROW)
    rotated = KeyRing({"k2": NEW, "k1": OLD})
    new_id, new_record = rotated.encrypt("new", ROW)

    assert (old_id, new_id) == ("k1", "k2")
    assert rotated.decrypt(old_id, old_record, ROW) == "old"
    assert rotated.decrypt(new_id, new_record, ROW) == "new"
    assert KeyRing({"k2": NEW}).missing_keys({"k1", "k2"}) == {"k1"}
    assert rotated.missing_keys({"k1", "k2"}) == set()


def test_repr_shows_key_ids_only() -> None:
    assert repr(KeyRing({"k2": NEW, "k1": OLD})) == "KeyRing(k2, k1)"


def test_keys_keep_the_order_of_the_setting() -> None:
    ring = load_keyring(configured(f"{pair('k2', NEW)}, {pair('k1', OLD)}"))

    assert ring.current_key_id == "k2"
    assert ring.decrypt(*RING.encrypt("secret", ROW), ROW) == "secret"


@pytest.mark.parametrize("separator", [",", "\n", ",\n", "\n\n", " , "])
def test_key_file_takes_lines_or_commas(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "keys"
    path.write_text(separator.join([pair("k2", NEW), pair("k1", OLD)]) + "\n")

    ring = load_keyring(EncryptionSettings(encryption_keys=None, encryption_keys_file=path))

    assert repr(ring) == "KeyRing(k2, k1)"


def test_new_key_is_random_and_configurable() -> None:
    made = {new_key() for _ in range(10)}

    assert len(made) == 10
    for text in made:
        assert load_keyring(configured(text)).current_key_id == text.partition(":")[0]


@pytest.mark.parametrize(
    "text",
    [
        "k1:" + base64.b64encode(OLD[:16]).decode(),
        "k1:" + base64.b64encode(OLD + b"!").decode(),
        "k1:" + base64.b64encode(OLD).decode().rstrip("="),
        "k1:" + OLD.hex(),
        base64.b64encode(OLD).decode(),
        ":" + base64.b64encode(OLD).decode(),
        "k 1:" + base64.b64encode(OLD).decode(),
        "k1=" + base64.b64encode(OLD).decode(),
        "k1:" + base64.b64encode(OLD).decode() + "," + "k2:hunter2",
        "k1:ключ",
    ],
)
def test_bad_key_is_refused_without_showing_it(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_keyring(configured(text))

    message = refused.value.message
    assert "WEBHOOK_ENCRYPTION_KEYS" in message
    assert "postrider encryption-key" in message
    for entry in text.split(","):
        key = entry.rpartition(":")[2]
        assert not any(key[i : i + 6] in message for i in range(max(1, len(key) - 5)))


@pytest.mark.parametrize("text", ["", ",", "\n"])
def test_empty_setting_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is empty.*`postrider encryption-key`"):
        load_keyring(configured(text))


def test_two_keys_with_one_id_are_refused() -> None:
    text = new_key()

    with pytest.raises(ConfigurationError, match="same id"):
        load_keyring(configured(f"{text},{text}"))


@pytest.mark.parametrize("content", [None, b"\xff\xfesecret"], ids=["missing", "no text"])
def test_unreadable_key_file_is_named_without_its_bytes(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigurationError, match=f"{path}.*cannot be read") as refused:
        load_keyring(EncryptionSettings(encryption_keys=None, encryption_keys_file=path))
    assert "secret" not in refused.value.message


def configured(text: str) -> EncryptionSettings:
    return EncryptionSettings(encryption_keys=SecretStr(text), encryption_keys_file=None)


def pair(key_id: str, key: bytes) -> str:
    return f"{key_id}:{base64.b64encode(key).decode()}"
