"""`postrider keys`: rotation of the encryption keys, and its report."""

import asyncio
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from cli.main import main
from cli.ops.keys import report, rotate
from cli.ops.operator import present_operator
from core import encryption
from core.encryption import KeyRing, UndecryptableSecret, load_keyring, new_key
from core.errors import ConfigurationError
from core.settings import DatabaseSettings, EncryptionSettings
from core.signing import new_secret
from tests.conftest import database_settings
from tests.support.factories import make_webhook_config, until_blocked

OLD, NEW = (f"{name}:{new_key().partition(':')[2]}" for name in ("old", "new"))


def settings(*pairs: str) -> EncryptionSettings:
    return EncryptionSettings(encryption_keys=SecretStr(",".join(pairs)))


def ring(*pairs: str) -> KeyRing:
    return load_keyring(settings(*pairs))


class Operator:
    """Runs the commands on the database of the test. `printed` holds their output."""

    def __init__(self, database: DatabaseSettings):
        self._database = database
        self.printed: list[str] = []

    async def rotate(self, *pairs: str, to: str | None = None) -> bool:
        self.printed.clear()
        return await rotate(self._database, settings(*pairs), to, self.printed.append)

    async def report(self, *pairs: str) -> list[str]:
        self.printed.clear()
        await report(self._database, settings(*pairs), self.printed.append)
        return self.printed


@pytest.fixture
def operator(database_url: str) -> Operator:
    return Operator(database_settings(database_url))


async def make_config(pool: Any, keyring: KeyRing, *, overlap: bool = False) -> tuple[UUID, str]:
    webhook_id, secret = await make_webhook_config(pool), new_secret()
    key_id, record = keyring.encrypt(secret, webhook_id)
    await pool.execute(
        "UPDATE webhook_configs SET secret_key_id = $2, secret_ciphertext = $3 WHERE id = $1",
        *(webhook_id, key_id, record),
    )
    if overlap:
        await pool.execute(
            "UPDATE webhook_configs SET previous_secret_key_id = $2,"
            " previous_secret_ciphertext = $3,"
            " previous_secret_expires_at = now() + interval '1 day' WHERE id = $1",
            *(webhook_id, *keyring.encrypt(f"before {secret}", webhook_id)),
        )
    return webhook_id, secret


async def records(pool: Any, keyring: KeyRing) -> dict[UUID, list[str]]:
    """Return the secrets of each config, decrypted by this ring."""
    rows = await pool.fetch("SELECT * FROM webhook_configs WHERE deleted_at IS NULL")
    return {
        row["id"]: [
            keyring.decrypt(row[f"{name}_key_id"], row[f"{name}_ciphertext"], row["id"])
            for name in ("secret", "previous_secret")
            if row[f"{name}_key_id"] is not None
        ]
        for row in rows
    }


async def test_rotation_reencrypts_every_record(
    pool: Any, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_PAGE_SIZE", 2)
    made = dict([await make_config(pool, ring(OLD), overlap=number == 1) for number in range(5)])
    before = await pool.fetch("SELECT id, version, updated_at FROM webhook_configs ORDER BY id")
    assert await operator.report(NEW, OLD) == [
        "new: 0 records (first: it encrypts)",
        "old: 6 records",
    ]

    assert await operator.rotate(NEW, OLD, to="new")

    # Two configs per page. The second config has two records.
    assert operator.printed == [
        "3 of 6 records are encrypted with new now",
        "5 of 6 records are encrypted with new now",
        "6 of 6 records are encrypted with new now",
        "old is not used: remove it, or put it first to rotate to it",
    ]
    found = await records(pool, ring(NEW))
    assert {webhook_id: secrets[0] for webhook_id, secrets in found.items()} == made
    assert sorted(len(secrets) for secrets in found.values()) == [1, 1, 1, 1, 2]
    assert all(rest == [f"before {secret}"] for secret, *rest in found.values() if rest)
    # Engines do not need to reload anything.
    query = "SELECT id, version, updated_at FROM webhook_configs ORDER BY id"
    assert await pool.fetch(query) == before
    assert await operator.report(NEW, OLD) == [
        "new: 6 records (first: it encrypts)",
        "old: 0 records (not needed)",
    ]


async def test_rotation_with_changes_is_audited_once(
    pool: Any, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_PAGE_SIZE", 1)
    for _ in range(3):
        await make_config(pool, ring(OLD))
    assert await operator.rotate(NEW, OLD)
    assert await operator.rotate(NEW, OLD)
    assert operator.printed[0] == "nothing to do: every record is encrypted with new, the first key"
    [entry] = await pool.fetch("SELECT * FROM audit_entries")
    assert (entry["action"], entry["resource"]) == ("RotateEncryptionKey", "encryption_key:new")
    assert entry["actor"].startswith("cli:")
    assert entry["caller_address"]
    assert entry["user_agent"].startswith("postrider/")
    assert (entry["result"], entry["merchant_id"]) == ("OK", None)
    assert entry["changed_fields"] == ["secret"]


async def test_interrupted_rotation_continues(
    pool: Any, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encryption, "_PAGE_SIZE", 2)
    made = dict([await make_config(pool, ring(OLD)) for _ in range(5)])
    pages = encryption.rotate_records(pool, ring(NEW, OLD), present_operator())
    assert (await anext(pages)).records == 2
    await pages.aclose()
    # Needs both keys now.
    assert {i: [s] for i, s in made.items()} == await records(pool, ring(OLD, NEW))
    assert await operator.report(OLD, NEW) == [
        "old: 3 records (first: it encrypts)",
        "new: 2 records",
    ]

    assert await operator.rotate(NEW, OLD)
    assert operator.printed[0] == "2 of 3 records are encrypted with new now"
    assert {i: [s] for i, s in made.items()} == await records(pool, ring(NEW))


async def test_secret_replaced_during_rotation_is_kept(pool: Any, operator: Operator) -> None:
    webhook_id, _ = await make_config(pool, ring(OLD))
    async with pool.acquire() as other:
        transaction = other.transaction()
        await transaction.start()
        await other.execute(
            "UPDATE webhook_configs SET secret_key_id = $2, secret_ciphertext = $3 WHERE id = $1",
            *(webhook_id, *ring(OLD).encrypt("replaced", webhook_id)),
        )
        rotating = asyncio.create_task(operator.rotate(NEW, OLD))
        await until_blocked(pool)
        await transaction.commit()
    assert await rotating
    assert await records(pool, ring(NEW)) == {webhook_id: ["replaced"]}


async def test_unreadable_record_is_reported_and_skipped(pool: Any, operator: Operator) -> None:
    unreadable = await make_webhook_config(pool, secret_key_id="old", secret_ciphertext=b"x" * 40)
    readable, secret = await make_config(pool, ring(OLD))

    assert not await operator.rotate(NEW, OLD)

    assert any(
        line.startswith(f"wh_{unreadable.hex}: its secret cannot be read")
        for line in operator.printed
    )
    row = await pool.fetchrow("SELECT * FROM webhook_configs WHERE id = $1", unreadable)
    assert (row["secret_key_id"], row["secret_ciphertext"]) == ("old", b"x" * 40)
    row = await pool.fetchrow("SELECT * FROM webhook_configs WHERE id = $1", readable)
    assert ring(NEW).decrypt("new", row["secret_ciphertext"], readable) == secret


async def test_deleted_config_has_no_record(pool: Any, operator: Operator) -> None:
    webhook_id = await make_webhook_config(pool, secret_key_id="long ago", secret_ciphertext=b"")
    await pool.execute("UPDATE webhook_configs SET deleted_at = now() WHERE id = $1", webhook_id)
    assert await operator.rotate(NEW)
    assert await operator.report(NEW) == ["new: 0 records (first: it encrypts)"]


@pytest.mark.parametrize(
    ("pairs", "to", "error"),
    [
        ((OLD, NEW), "new", "new is not the first key of the setting, old is"),
        ((OLD,), "new", "new is not the first key of the setting, old is"),
        ((NEW,), None, "encrypted with the key old, which is not configured"),
    ],
)
async def test_rotation_that_cannot_complete_does_not_start(
    pool: Any, operator: Operator, pairs: tuple[str, ...], to: str | None, error: str
) -> None:
    webhook_id, secret = await make_config(pool, ring(OLD))
    with pytest.raises(ConfigurationError, match=error):
        await operator.rotate(*pairs, to=to)
    assert await records(pool, ring(OLD)) == {webhook_id: [secret]}
    assert await pool.fetchval("SELECT count(*) FROM audit_entries") == 0


async def test_missing_key_is_reported(pool: Any, operator: Operator) -> None:
    await make_config(pool, ring(OLD))
    assert await operator.report(NEW) == [
        "new: 0 records (first: it encrypts)",
        "old: 1 record (not configured: these cannot be read)",
    ]
    with pytest.raises(UndecryptableSecret):
        await records(pool, ring(NEW))


def test_commands_require_the_database_url() -> None:
    for command in ("status", "rotate"):
        result = CliRunner().invoke(main, ["keys", command])
        assert result.exit_code == 2
        assert "WEBHOOK_DATABASE_URL is not set" in result.output
