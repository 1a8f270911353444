"""Moving the records of signing secrets to the ring's first key, beside everything that runs.

A page is one transaction that locks its rows, so a secret that is rotated or forgotten meanwhile is
neither lost nor brought back. Versions stay: what engines hold in memory is the same secret.
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from core.db import Pool
from core.keyring import KeyRing, UndecryptableSecret
from core.operator import RECORD_COMMAND, Operator, command_entry

_PAGE = 200

_COUNT = """
SELECT key_id, count(*) AS records FROM (
    SELECT secret_key_id AS key_id FROM webhook_configs WHERE deleted_at IS NULL
    UNION ALL
    SELECT previous_secret_key_id FROM webhook_configs WHERE previous_secret_key_id IS NOT NULL
) records
GROUP BY key_id ORDER BY key_id
"""

_TAKE = """
SELECT id, secret_key_id, secret_ciphertext, previous_secret_key_id, previous_secret_ciphertext
FROM webhook_configs
WHERE id > $1 AND deleted_at IS NULL AND (secret_key_id <> $2 OR previous_secret_key_id <> $2)
ORDER BY id LIMIT $3 FOR NO KEY UPDATE
"""

_PUT = """
UPDATE webhook_configs
SET secret_key_id = $2, secret_ciphertext = $3,
    previous_secret_key_id = $4, previous_secret_ciphertext = $5
WHERE id = $1
"""


@dataclass(frozen=True, slots=True)
class RotatedPage:
    """How many records one transaction moved, and the configs with one that no key reads."""

    records: int
    unreadable: list[UUID]


async def count_records(pool: Pool) -> dict[str, int]:
    """How many records each key encrypts; a config in an overlap has two."""
    return {row["key_id"]: row["records"] for row in await pool.fetch(_COUNT)}


async def rotate_records(
    pool: Pool, keyring: KeyRing, operator: Operator
) -> AsyncGenerator[RotatedPage]:
    """Encrypt every record with the ring's first key, a page at a time.

    To stop anywhere is safe: the next run goes on with what is left. The audit entry is in the
    transaction of the first page that changes something.
    """
    last, recorded = UUID(int=0), False
    while True:
        async with pool.acquire() as connection, connection.transaction():
            rows = await connection.fetch(_TAKE, last, keyring.current_key_id, _PAGE)
            if not rows:
                return
            page, changes = _encrypt_anew(keyring, rows)
            await connection.executemany(_PUT, changes)
            if changes and not recorded:
                entry = command_entry(
                    operator,
                    action="RotateEncryptionKey",
                    resource=f"encryption_key:{keyring.current_key_id}",
                    changed_fields=["secret"],
                )
                await connection.execute(RECORD_COMMAND, *entry)
                recorded = True
        last = rows[-1]["id"]
        yield page


def _encrypt_anew(keyring: KeyRing, rows: Sequence[Any]) -> tuple[RotatedPage, list[Any]]:
    """The page's report, and the parameters of _PUT for the rows whose secrets could be read."""
    records, unreadable, changes = 0, [], []
    for row in rows:
        try:
            present = _moved(keyring, row, "secret")
            previous = _moved(keyring, row, "previous_secret")
        except UndecryptableSecret:
            unreadable.append(row["id"])
            continue
        records += (present[0] != row["secret_key_id"]) + (
            previous[0] != row["previous_secret_key_id"]
        )
        changes.append((row["id"], *present, *previous))
    return RotatedPage(records, unreadable), changes


def _moved(keyring: KeyRing, row: Any, name: str) -> tuple[str | None, bytes | None]:
    """Key id and ciphertext of one record as they shall be."""
    key_id, ciphertext = row[f"{name}_key_id"], row[f"{name}_ciphertext"]
    if key_id is None or key_id == keyring.current_key_id:
        return key_id, ciphertext
    return keyring.encrypt(keyring.decrypt(key_id, ciphertext, row["id"]), row["id"])
