"""Secrets at rest: only the right key, the untouched record and the right row give them back."""

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
def test_what_is_encrypted_decrypts(secret: str, row: uuid.UUID) -> None:
    key_id, record = RING.encrypt(secret, row)

    assert RING.decrypt(key_id, record, row) == secret


def test_a_record_does_not_show_the_secret_and_is_never_the_same_twice() -> None:
    secret = new_secret()
    records = {RING.encrypt(secret, ROW)[1] for _ in range(100)}

    assert len({record[:12] for record in records}) == 100
    assert not any(secret.encode() in record for record in records)


@given(index=st.integers(0, 12 + 64 + 16 - 1), bit=st.integers(0, 7))
def test_a_record_with_any_bit_changed_does_not_decrypt(index: int, bit: int) -> None:
    key_id, record = RING.encrypt("s" * 64, ROW)
    tampered = bytearray(record)
    tampered[index] ^= 1 << bit

    with pytest.raises(UndecryptableSecret):
        RING.decrypt(key_id, bytes(tampered), ROW)


def test_a_record_copied_into_another_row_does_not_decrypt() -> None:
    key_id, record = RING.encrypt("secret", ROW)

    with pytest.raises(UndecryptableSecret):
        RING.decrypt(key_id, record, OTHER_ROW)


def test_a_record_of_an_unknown_key_names_the_key_that_is_missing() -> None:
    with pytest.raises(UndecryptableSecret, match="'k9'"):
        RING.decrypt("k9", b"\0" * 60, ROW)


def test_a_record_of_another_key_with_the_same_id_does_not_decrypt() -> None:
    key_id, record = KeyRing({"k1": NEW}).encrypt("secret", ROW)

    with pytest.raises(UndecryptableSecret):
        RING.decrypt(key_id, record, ROW)


def test_after_a_rotation_the_first_key_encrypts_and_every_key_decrypts() -> None:
    old_id, old_record = RING.encrypt("old", ROW)
    rotated = KeyRing({"k2": NEW, "k1": OLD})
    new_id, new_record = rotated.encrypt("new", ROW)

    assert (old_id, new_id) == ("k1", "k2")
    assert rotated.decrypt(old_id, old_record, ROW) == "old"
    assert rotated.decrypt(new_id, new_record, ROW) == "new"
    assert KeyRing({"k2": NEW}).missing({"k1", "k2"}) == {"k1"}
    assert rotated.missing({"k1", "k2"}) == set()


def test_a_ring_shows_the_names_of_its_keys_and_not_the_keys() -> None:
    text = repr(KeyRing({"k2": NEW, "k1": OLD}))

    assert text == "KeyRing(k2, k1)"


# --- configuration


def test_keys_come_from_the_setting_in_its_order() -> None:
    ring = load_keyring(_from_setting(f"{_pair('k2', NEW)}, {_pair('k1', OLD)}"))

    assert ring.current_key_id == "k2"
    assert ring.decrypt(*RING.encrypt("secret", ROW), ROW) == "secret"


@pytest.mark.parametrize("separator", [",", "\n", ",\n", "\n\n", " , "])
def test_keys_come_from_a_file_too_one_a_line_or_with_commas(
    tmp_path: Path, separator: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(separator.join([_pair("k2", NEW), _pair("k1", OLD)]) + "\n")

    ring = load_keyring(EncryptionSettings(encryption_keys=None, encryption_keys_file=path))

    assert repr(ring) == "KeyRing(k2, k1)"


def test_a_new_key_is_ready_to_be_configured_and_never_the_same() -> None:
    made = {new_key() for _ in range(10)}

    assert len(made) == 10
    for pair in made:
        assert load_keyring(_from_setting(pair)).current_key_id == pair.partition(":")[0]


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
    ],
)
def test_a_bad_key_is_refused_with_what_to_do_and_without_the_key(text: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_keyring(_from_setting(text))

    message = refused.value.message
    assert "WEBHOOK_ENCRYPTION_KEYS" in message
    assert "postrider encryption-key" in message
    _holds_no_part_of(text, message)


@pytest.mark.parametrize("text", ["", ",", "\n"])
def test_an_empty_setting_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is empty.*`postrider encryption-key`"):
        load_keyring(_from_setting(text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "missing"

    with pytest.raises(ConfigurationError, match=f"{path}.*cannot be read"):
        load_keyring(EncryptionSettings(encryption_keys=None, encryption_keys_file=path))


def test_a_file_that_is_not_text_is_refused_without_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_bytes(b"\xff\xfesecret")

    with pytest.raises(ConfigurationError, match="cannot be read") as refused:
        load_keyring(EncryptionSettings(encryption_keys=None, encryption_keys_file=path))
    assert "secret" not in refused.value.message.replace("secrets", "")


def _from_setting(text: str) -> EncryptionSettings:
    return EncryptionSettings(encryption_keys=SecretStr(text), encryption_keys_file=None)


def _pair(key_id: str, key: bytes) -> str:
    return f"{key_id}:{base64.b64encode(key).decode()}"


def _holds_no_part_of(text: str, message: str) -> None:
    for pair in text.split(","):
        key = pair.rpartition(":")[2]
        assert not any(key[i : i + 6] in message for i in range(max(1, len(key) - 5)))


def test_two_keys_with_one_id_are_refused() -> None:
    pair = new_key()

    with pytest.raises(ConfigurationError, match="same id"):
        load_keyring(EncryptionSettings(encryption_keys=SecretStr(f"{pair},{pair}")))


def test_a_key_that_is_not_ascii_is_refused_like_any_other_bad_key() -> None:
    with pytest.raises(ConfigurationError, match="prints a valid pair"):
        load_keyring(EncryptionSettings(encryption_keys=SecretStr("k1:ключ")))
