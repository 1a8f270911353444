"""Checks and preparations that server and engine run when they start."""

import gc
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import structlog

import migrations
from core.addresses import AddressPolicy
from core.encryption import KeyRing
from core.errors import ConfigurationError
from core.postgres.pool import close_soon, open_pool
from core.postgres.protocols import Pool
from core.settings import DatabaseSettings, EgressSettings
from core.urls import UrlPolicy
from delivery.http.client import WebhookClient, open_client
from delivery.http.resolver import RACED_MAX

log = structlog.get_logger()


async def require_encryption_keys(pool: Pool, keyring: KeyRing) -> None:
    """Raise ConfigurationError if a secret in the database needs a key that is not configured."""
    rows = await pool.fetch(
        "SELECT secret_key_id AS key_id FROM webhook_configs WHERE deleted_at IS NULL UNION "
        "SELECT previous_secret_key_id FROM webhook_configs "
        "WHERE previous_secret_expires_at > now()"
    )
    missing = keyring.missing_keys({row["key_id"] for row in rows})
    if missing:
        raise ConfigurationError(
            f"secrets in the database are encrypted with the key {', '.join(sorted(missing))}, "
            "which is not configured: add it to WEBHOOK_ENCRYPTION_KEYS or its file"
        )


@asynccontextmanager
async def checked_pool(
    settings: DatabaseSettings, application: str, size: int, keyring: KeyRing
) -> AsyncIterator[Pool]:
    """Open a pool on a database that this release can use. Raises ConfigurationError otherwise."""
    pool = await open_pool(settings, application, size)
    try:
        await require_schema(pool)
        await require_encryption_keys(pool, keyring)
        yield pool
    finally:
        await close_soon(pool.close)


def open_receiver_client(
    settings: EgressSettings, policy: UrlPolicy, idle_max: int = 100
) -> WebhookClient:
    """Open the guarded client of the settings. An async context manager."""
    return open_client(
        policy=policy.addresses,
        ca_file=settings.ca_file,
        idle_max=idle_max,
        age_seconds_max=settings.receiver_connection_seconds,
        proxy=settings.secret("egress_proxy"),
    )


def warn_of_allowed_cidrs(settings: EgressSettings) -> None:
    """Log the allow-list at every start, because it lets merchants reach inner addresses."""
    if settings.allowed_cidrs:
        log.warning(
            "private_addresses_allowed",
            setting="WEBHOOK_ALLOWED_CIDRS",
            cidrs=[str(network) for network in settings.allowed_cidrs],
        )


def revisions() -> list[str]:
    """Return the schema revisions of this release, oldest first.

    They are read from file names, because Alembic and SQLAlchemy would cost an engine 20 MB.
    """
    versions = Path(next(iter(migrations.__path__)), "versions")
    return sorted(path.stem for path in versions.glob("[0-9]*.py"))


def head() -> str:
    """Return the newest schema revision of this release."""
    return revisions()[-1]


async def require_schema(pool: Pool) -> None:
    """Raise ConfigurationError if the schema is older than this release needs.

    A newer schema is accepted, because migrations are safe beside the previous release.
    """
    try:
        table = await pool.fetchval("SELECT to_regclass('alembic_version')")
    except (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError):
        raise ConfigurationError(
            "a pooler gives each transaction another connection: "
            "use its session mode, or none (docs/operate/postgresql.md)"
        ) from None
    found = await pool.fetchval("SELECT version_num FROM alembic_version") if table else None
    if found is None or (found in revisions() and found != head()):
        raise ConfigurationError(
            f"the database schema is at {found or 'nothing'}, this release needs {head()}: "
            "run `postrider migrate` first"
        )


#: Files for standard streams, the event loop, DNS and certificates.
_OTHER_FILES = 32


def files_for(in_flight: int, database_connections: int) -> int:
    """Return how many files an engine opens at most: a busy and an idle connection per attempt."""
    return 2 * in_flight + database_connections + _OTHER_FILES


def in_flight_within_file_limit(wanted: int, database_connections: int) -> int:
    """Return how many attempts can be open: `wanted`, or fewer if the file limit is lower.

    Raises the soft limit as far as allowed. Half of the files are for idle connections. More files
    allow for an outage, in which every attempt connects to all addresses of its receiver.
    """
    reserved = database_connections + _OTHER_FILES
    needed = files_for(wanted, database_connections)
    ample = needed + (RACED_MAX - 1) * wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = soft
    if soft != resource.RLIM_INFINITY and soft < ample:
        allowed = ample if hard == resource.RLIM_INFINITY else min(ample, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == resource.RLIM_INFINITY or allowed >= needed:
        return wanted
    fitting = max(min(wanted, (allowed - reserved) // 2), 1)
    if fitting < wanted:
        log.warning(
            "fewer_in_flight",
            setting="WEBHOOK_MAX_IN_FLIGHT",
            wanted=wanted,
            in_flight=fitting,
            open_files=allowed,
            advice=f"let the engine open {needed} files (ulimit -n, LimitNOFILE=)",
        )
    return fitting


#: Higher than the defaults, because cycles are rare and attempts create thousands of objects.
_GC_THRESHOLDS = 10_000, 20, 20


def exclude_modules_from_gc() -> None:
    """Exclude loaded modules from garbage collection. Call it after the imports.

    A full collection that walks them stops the event loop for 60 ms, every few seconds under load.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


def url_policy(settings: EgressSettings) -> UrlPolicy:
    """Return the rules for webhook URLs. Its `addresses` apply to every socket."""
    return UrlPolicy(
        AddressPolicy(settings.allowed_cidrs, settings.denied_cidrs),
        settings.allowed_ports,
        settings.denied_hosts,
    )
