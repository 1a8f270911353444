"""Finds problems of settings that are each valid: offline, and by connecting to their targets."""

import asyncio
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

from cli.process.jwks_fetch import key_set_fetch
from cli.startup import files_for, require_encryption_keys, require_schema
from core.encryption import load_keyring
from core.errors import ConfigurationError, PostriderError
from core.file_secrets import Secret, is_world_readable
from core.postgres.connect import Connector
from core.postgres.pool import CONNECTION_ERRORS, close_soon, open_pool
from core.postgres.protocols import Pool
from core.settings import DatabaseSettings, EgressSettings, EncryptionSettings, SettingsBlock
from delivery.http.proxy import EgressProxy
from delivery.http.tls import client_tls_context
from delivery.settings import DeliverySettings
from server.auth.jwks import FETCH_TIMEOUT_SECONDS, JwksKeys, KeySource, PemKeys, keys_from_jwks
from server.rpc.tls import listeners
from server.settings import AuthSettings, TlsSettings

#: One each to listen, claim, record, admit and sweep.
_ENGINE_CONNECTIONS = 5
_OLDEST_POSTGRESQL = 15
_CLOCK_SKEW_SECONDS_MAX = 1.0


class Blocks:
    """The valid blocks of settings, by class."""

    def __init__(self) -> None:
        self._blocks: dict[type[SettingsBlock], Any] = {}

    def __iter__(self) -> Iterator[SettingsBlock]:
        return iter(self._blocks.values())

    def add(self, block: SettingsBlock) -> None:
        self._blocks[type(block)] = block

    def get[B: SettingsBlock](self, block: type[B]) -> B | None:
        found: B | None = self._blocks.get(block)
        return found


def faults(blocks: Blocks) -> Iterator[str]:
    """Yield the problems that are found without a connection."""
    for check in (_unusable, _readable_by_all, _too_small):
        yield from check(blocks)


async def faults_outside(blocks: Blocks) -> list[str]:
    """Return the problems that the database and the issuer show."""
    found = await asyncio.gather(_database_faults(blocks), _key_set_faults(blocks))
    return [fault for faults in found for fault in faults]


def _unusable(blocks: Blocks) -> Iterator[str]:
    """Yield the errors that would stop a process at its start."""
    attempts: list[Callable[[], object]] = []
    if database := blocks.get(DatabaseSettings):
        attempts.append(lambda: Connector(database, "postrider-config"))
    if encryption := blocks.get(EncryptionSettings):
        attempts.append(lambda: load_keyring(encryption))
    if egress := blocks.get(EgressSettings):
        attempts.append(lambda: client_tls_context(egress.ca_file))
        if (proxy := egress.secret("egress_proxy")).given:
            attempts.append(lambda: EgressProxy(proxy))
    if auth := blocks.get(AuthSettings):
        attempts.append(lambda: _key_source(auth))
    if tls := blocks.get(TlsSettings):
        attempts.append(lambda: listeners("", tls))
    for attempt in attempts:
        try:
            attempt()
        except ConfigurationError as error:
            yield error.message


def _readable_by_all(blocks: Blocks) -> Iterator[str]:
    found = [block.secret(name) for block in blocks for name in block.secret_names()]
    if tls := blocks.get(TlsSettings):
        found.append(Secret("WEBHOOK_TLS_PRIVATE_KEY", file=tls.tls_private_key_file))
    for secret in found:
        if secret.file is not None and is_world_readable(secret.file):
            yield (
                f"{secret.source} can be read by every user of this machine: mount it for one user "
                "or group (mode 0440)"
            )


def _too_small(blocks: Blocks) -> Iterator[str]:
    database, delivery = blocks.get(DatabaseSettings), blocks.get(DeliverySettings)
    if database is None or delivery is None:
        return
    if database.database_pool_size < _ENGINE_CONNECTIONS:
        yield (
            f"WEBHOOK_DATABASE_POOL_SIZE is {database.database_pool_size}: an engine uses up to "
            f"{_ENGINE_CONNECTIONS} connections at once: set "
            f"{_ENGINE_CONNECTIONS} or more"
        )
    needed = files_for(delivery.max_in_flight, database.database_pool_size)
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        yield (
            f"WEBHOOK_MAX_IN_FLIGHT is {delivery.max_in_flight}, so an engine opens up to "
            f"{needed} files, but it may open only {allowed}: raise the limit (ulimit -n, "
            "LimitNOFILE=) or lower the setting"
        )


def _key_source(settings: AuthSettings) -> KeySource:
    """Return the issuer's keys without a fetch. Raises ConfigurationError."""
    if settings.jwt_public_key_file is not None:
        return PemKeys(settings.jwt_public_key_file)
    return JwksKeys(settings.jwt_jwks_url or "", _fetch_nothing)


async def _fetch_nothing(_: str) -> bytes:
    raise OSError("`postrider config` fetches no keys without --check")


async def _database_faults(blocks: Blocks) -> list[str]:
    settings = blocks.get(DatabaseSettings)
    if settings is None:
        return []
    try:
        pool = await open_pool(settings, "postrider-config", 1)
    except PostriderError as error:
        return [error.message]
    found: list[str] = []
    try:
        for check in (_server_faults, _schema_faults, _key_faults):
            found += await check(pool, blocks)
    except CONNECTION_ERRORS as error:
        found.append(
            f"the connection to the database was lost (check again) ({type(error).__name__})"
        )
    finally:
        await close_soon(pool.close)
    return found


async def _server_faults(pool: Pool, blocks: Blocks) -> list[str]:
    found: list[str] = []
    asked = time.time()
    row = await pool.fetchrow(
        "SELECT extract(epoch FROM clock_timestamp())::float8 AS clock,"
        " current_setting('server_version_num')::int / 10000 AS version,"
        " current_setting('fsync')::bool AS fsync,"
        " NOT current_setting('enable_seqscan')::bool"
        " AND NOT current_setting('enable_bitmapscan')::bool"
        " AND NOT current_setting('enable_incremental_sort')::bool AS settings_arrived,"
        " current_setting('max_connections')::int"
        " - current_setting('superuser_reserved_connections')::int AS connections"
    )
    answered = time.time()
    skew = (asked + answered) / 2 - row["clock"]
    if abs(skew) - (answered - asked) / 2 > _CLOCK_SKEW_SECONDS_MAX:
        found.append(
            f"this machine's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the "
            "database's: set both by NTP, because receivers check the time in signatures"
        )
    if row["version"] < _OLDEST_POSTGRESQL:
        found.append(
            f"the database is PostgreSQL {row['version']}: use {_OLDEST_POSTGRESQL} or newer"
        )
    if not row["fsync"]:
        found.append(
            "the database runs with fsync = off, so a crash of its machine loses accepted "
            "events: turn it on"
        )
    if not row["settings_arrived"]:
        found.append(
            "a pooler drops session settings such as timeouts: set them for the "
            "role (docs/operate/postgresql.md)"
        )
    database, delivery = blocks.get(DatabaseSettings), blocks.get(DeliverySettings)
    size = database.database_pool_size if database else 0
    wanted = size * (delivery.delivery_processes if delivery else 1)
    if wanted > row["connections"]:
        found.append(
            f"processes with these settings may open {wanted} connections, and PostgreSQL allows "
            f"{row['connections']}: lower WEBHOOK_DATABASE_POOL_SIZE or raise its "
            "max_connections (docs/operate/postgresql.md)"
        )
    return found


async def _schema_faults(pool: Pool, _: Blocks) -> list[str]:
    try:
        await require_schema(pool)
    except ConfigurationError as error:
        return [error.message]
    return []


async def _key_faults(pool: Pool, blocks: Blocks) -> list[str]:
    settings = blocks.get(EncryptionSettings)
    if settings is None or not await pool.fetchval("SELECT to_regclass('webhook_configs')"):
        return []
    try:
        await require_encryption_keys(pool, load_keyring(settings))
    except ConfigurationError as error:
        return [error.message]
    return []


async def _key_set_faults(blocks: Blocks) -> list[str]:
    settings = blocks.get(AuthSettings)
    if settings is None or settings.jwt_jwks_url is None:
        return []
    try:
        async with asyncio.timeout(FETCH_TIMEOUT_SECONDS), key_set_fetch() as fetch:
            keys_from_jwks(await fetch(settings.jwt_jwks_url))
    # Any failure of the issuer is a result of this check.
    except Exception as error:
        fault = (
            f"WEBHOOK_JWT_JWKS_URL: no key set ({type(error).__name__}: {error}), so each token is "
            "refused: check the URL and the network"
        )
        return [fault]
    return []
